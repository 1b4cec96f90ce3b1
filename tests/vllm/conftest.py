"""These tests run in vLLM's own environment (``runs/vllm_environment.sh``); anywhere else they are skipped."""

from __future__ import annotations

import importlib.util
import os

import pytest


def pytest_configure() -> None:
    """Cores of its own for each process of pytest-xdist: vLLM binds its threads to all that it may use."""
    number, count = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if number and importlib.util.find_spec("vllm") and hasattr(os, "sched_setaffinity"):
        own = sorted(os.sched_getaffinity(0))[int(number.removeprefix("gw")) :: count]
        if own:
            os.sched_setaffinity(0, own)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if "vllm" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="vLLM is not in this environment"))
