"""A draft in bfloat16 behind a long context: an oracle pair accepts there what it accepts behind a short one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eagle.decode.acceptance_counts import Acceptance
from eagle.decode.drafter import StaticDrafter
from eagle.decode.fitting_draft import load_fitting_draft
from eagle.decode.generate import SpeculativeDecoder
from eagle.decode.sampling import Sampling
from eagle.decode.target import load_target
from eagle.decode.tree import chain_paths
from tests.oracle import Shape, random_prompts, write_pair

CPU, K, NEW = torch.device("cpu"), 3, 60


def tau(folder: Path, context: int, dtype: torch.dtype) -> float:
    target = load_target(folder / "target", dtype, CPU)
    draft = load_fitting_draft(folder / "draft", folder / "target", target)
    decoder = SpeculativeDecoder(target, draft, StaticDrafter(chain_paths(K), CPU, Sampling()), Sampling())
    acceptance = Acceptance(K)
    for prompt in random_prompts(3, context):
        for step in decoder.generate(prompt, NEW).steps:
            acceptance.add(step)
    return acceptance.tau()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("oracle") / "pair"
    write_pair(folder, Shape())
    return folder


@pytest.mark.parametrize("context", [100, 900])
def test_bfloat16_accepts_as_much_as_float32(pair: Path, context: int) -> None:
    exact = tau(pair, context, torch.float32)
    assert exact > 3.5, "the pair is no oracle"
    assert tau(pair, context, torch.bfloat16) > exact - 0.6, "rounded frequencies come to 3.0 at 900 tokens"
