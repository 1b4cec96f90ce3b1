"""The simulated device for every test here, or a skip that says why there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.npu.simulated import NotHere, library


@pytest.fixture(scope="session", autouse=True)
def device() -> Path:
    """Its library, built by the first of the processes that run the tests."""
    try:
        return library()
    except NotHere as why:
        pytest.skip(str(why))
