"""Files of step costs with known numbers, as `eagle.vllm.step_costs` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eagle.decode.step_costs import FORMAT, Shape

LAYER = "a layer"
ENGINE = {
    "vllm": "0.32.0",
    "torch": "2.13.0",
    "device": "cpu",
    "dtype": "float32",
    "tensor_parallel_size": 1,
    "enforce_eager": True,
    "in_process": True,
}


def shape(family: str = "eagle3", size: int = 8192, layer: str = LAYER) -> Shape:
    return Shape(family, size, layer)


def write_costs(
    path: Path,
    alone: Mapping[int, float],
    drafts: Mapping[Shape, Mapping[int, Mapping[int, float]]],
    target: str = "all-1",
    rounds: int = 1,
    hardware: str = "a machine",
    **engine: Any,
) -> Path:
    """alone: milliseconds by batch size. drafts: by shape, batch size and K. rounds: of each, all the same."""
    measured = [
        {"draft": draft, "num_speculative_tokens": tokens, "batch_size": batch, "rounds_ms": [[ms]] * rounds}
        for draft, tokens, batch, ms in (
            *((None, 0, batch, ms) for batch, ms in alone.items()),
            *(
                (one.to_json(), tokens, batch, ms)
                for one, by_batch in drafts.items()
                for batch, by_tokens in by_batch.items()
                for tokens, ms in by_tokens.items()
            ),
        )
    ]
    content = {
        "format": FORMAT,
        "base": "base",
        "target": target,
        "hardware": hardware,
        "is_finished": True,
        "asked": {"dtype": "auto", "context": 128},
        "engine": {**ENGINE, **engine},
        "measured": measured,
    }
    path.write_text(json.dumps(content))
    return path
