"""These tests run in vLLM's own environment (``runs/vllm_environment.sh``); anywhere else they are skipped."""

from __future__ import annotations

import importlib.util

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if "vllm" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="vLLM is not in this environment"))
