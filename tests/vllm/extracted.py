"""Features out of engines beside those of transformers, for the tests of the feature source.

The child is ``python -m tests.vllm.extracted ASKED.json ANSWERED.json``: one engine after the other in its own process.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eagle.errors import WorkError
from eagle.generate.source_options import EngineOptions, SourceOptions
from eagle.generate.sources import open_source
from tests.vllm.exact import exact_features

CPU = torch.device("cpu")
#: Of the prompts: ends of a cache block and of a chunk, several chunks, one of a few tokens.
LENGTHS = (300, 257, 129, 128, 127, 64, 3)
#: Tokens that the last prompts begin with alike; one of them is there twice.
SHARED = 140


def prompts() -> list[np.ndarray]:
    drawn = np.random.default_rng(0)
    found = [drawn.integers(5, 400, length).astype(np.int32) for length in LENGTHS]
    begin = drawn.integers(5, 400, SHARED)
    found += [np.concatenate([begin, drawn.integers(5, 400, more)]).astype(np.int32) for more in (1, 30)]
    return [*found, found[-1].copy()]


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two ``[T, W]``, of the largest value."""
    if not one.isfinite().all():
        return float("inf")
    return float((one.double() - other.double()).abs().max() / other.abs().max())


def compare(asked: dict[str, Any]) -> dict[str, float]:
    """By feature how far the engine's are from what they should be, the worst of all positions, in units of the dtype's
    own noise: of how far the worst of transformers' is in that dtype.

    asked: reads, the folder of another target that these should be the features of, where the engine's is quantized;
    tells, one more whose features they should not be, the best of whose sequences is measured.
    """
    model, names = Path(asked["model"]), tuple(asked["features"])
    reads = Path(asked.get("reads", model))
    dtype, sequences = getattr(torch, asked["dtype"]), prompts()
    exact = exact_features(reads, names, sequences)
    theirs = open_source(SourceOptions(reads, dtype, CPU, names)).features(sequences)
    engine = EngineOptions(**asked["engine"])
    longest = max(map(len, sequences))
    source: Any = open_source(SourceOptions(model, dtype, CPU, names, engine=engine, longest=longest), "vllm")

    def far(own: dict[str, torch.Tensor], name: str) -> list[float]:
        return [distance(own[name][row, : len(one)], exact[name][row]) for row, one in enumerate(sequences)]

    noise = {name: max(far(theirs, name)) for name in names}
    found: dict[str, float] = {}
    for _ in range(2):  # the second time in blocks that were used before
        own = source.features(sequences)
        for name in names:
            found[name] = max(found.get(name, 0.0), max(far(own, name)) / noise[name])
    if asked.get("tells"):
        others = exact_features(Path(asked["tells"]), names, sequences)
        for name in names:
            apart = [distance(other, one) for other, one in zip(others[name], exact[name], strict=True)]
            found[f"another {name}"] = min(apart) / noise[name]
    if asked.get("leaves_out"):
        found["left out"] = leave_out(source, sequences)
    return found


def leave_out(source: Any, sequences: list[np.ndarray]) -> float:
    """Have vLLM keep no states of one position: 1 where that is noticed."""
    from vllm.model_executor.models import extract_hidden_states

    keep = extract_hidden_states.basic_cache

    def keep_less(states: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        keep(states[1:], cache, slots[1:])

    extract_hidden_states.basic_cache = keep_less
    try:
        source.features(sequences)
    except WorkError as error:
        return float("left hidden states" in str(error))
    finally:
        extract_hidden_states.basic_cache = keep
    return 0.0


def main(argv: list[str]) -> int:
    from vllm.distributed import cleanup_dist_env_and_memory

    asked, answered = (Path(argument) for argument in argv)
    found: dict[str, Any] = {}
    for name, one in json.loads(asked.read_text(encoding="utf-8")).items():
        try:
            found[name] = compare(one)
        except Exception:
            found[name] = traceback.format_exc()
        gc.collect()
        cleanup_dist_env_and_memory()
    answered.write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
