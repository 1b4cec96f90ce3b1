"""Our own chain decoding accepts what vLLM accepts: same prompts, K, dtype and greedy decoding."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle.data.loss_mask import load_encoder
from eagle.data.prompts import encode_first_turn, load_prompts, stop_tokens
from eagle.decode.acceptance_counts import Acceptance
from eagle.decode.drafter import StaticDrafter
from eagle.decode.fitting_draft import load_fitting_draft
from eagle.decode.generate import SpeculativeDecoder
from eagle.decode.sampling import Sampling
from eagle.decode.target import load_target
from eagle.decode.tree import chain_paths
from eagle.target.config import load_config
from eagle.vllm.engine import EngineRequest
from eagle.vllm.export import export
from tests.oracle import Shape, random_prompts, write_pair
from tests.vllm.engines import ROOT, run_engines

QUICKSTART = Path(os.environ.get("EAGLE_QUICKSTART", ROOT / "quickstart"))
MODEL = QUICKSTART / "model"
#: Of the quickstart, by vLLM's method: one as it is documented, one with DRAFT=eagle3.
DRAFTS = {"eagle": QUICKSTART / "draft-vllm" / "v1", "eagle3": QUICKSTART / "draft-vllm-eagle3" / "plain"}

K, NEW = 4, 64
WITHIN = 0.03


def ours(
    model: Path, draft: Path, prompts: list[list[int]], stop: list[int], k: int = K, new: int = NEW
) -> tuple[Acceptance, list[list[int]]]:
    """What our own decoding accepts of chains of `k` tokens, and its replies of `new` tokens."""
    sampling = Sampling()
    target = load_target(model, torch.float32, torch.device("cpu"))
    drafter = StaticDrafter(chain_paths(k), target.device, sampling)
    decoder = SpeculativeDecoder(target, load_fitting_draft(draft, model, target), drafter, sampling)
    replies = [decoder.generate(prompt, new, stop) for prompt in prompts]
    return Acceptance.of((step for reply in replies for step in reply.steps), k), [reply.tokens for reply in replies]


def request(model: Path, draft: Path, prompts: list[list[int]], stop: list[int], method: str) -> EngineRequest:
    return EngineRequest(
        method=method,
        model=str(model),
        draft=str(draft),
        prompts=prompts,
        num_speculative_tokens=K,
        max_new_tokens=NEW,
        dtype="float32",
        stop_token_ids=stop,
    )


def compare(
    name: str,
    model: Path,
    draft: Path,
    prompts: list[list[int]],
    stop: list[int],
    folder: Path,
    method: str = "eagle",
) -> None:
    mine, outputs = ours(model, draft, prompts, stop)
    (theirs,) = run_engines([request(model, draft, prompts, stop, method)], folder)
    per_position = [count / theirs.drafts for count in theirs.accepted_per_position]
    print(f"\n{name}: tau {mine.tau():.4f} ours, {theirs.tau():.4f} vLLM's; drafts {mine.steps}, {theirs.drafts}")
    print("by position", *(f"{a:.3f}/{b:.3f}" for a, b in zip(mine.per_position(), per_position, strict=True)))
    print(f"{sum(a == b for a, b in zip(outputs, theirs.outputs, strict=True))} of {len(outputs)} outputs are the same")
    assert mine.tau() == pytest.approx(theirs.tau(), rel=WITHIN)
    assert mine.per_position() == pytest.approx(per_position, abs=WITHIN)


# What vLLM accepts of the quickstart's EAGLE-1 draft is shown by test_quickstart.py too.
@pytest.mark.parametrize("method", [pytest.param("eagle", marks=pytest.mark.long), "eagle3"])
def test_the_quickstarts_draft(tmp_path: Path, method: str) -> None:
    draft = DRAFTS[method]
    if not (draft / "config.json").is_file():
        pytest.skip(f"the quickstart has not run: no {draft}/config.json")
    config = load_config(MODEL)
    encoder = load_encoder(MODEL, config)
    prompts = [encode_first_turn(prompt, encoder) for prompt in load_prompts(None, 6)]
    compare(f"quickstart, {method}", MODEL, draft, prompts, stop_tokens(MODEL, config, encoder), tmp_path, method)


def test_an_oracle_that_is_sometimes_wrong(tmp_path: Path) -> None:
    """Needs no trained draft: an oracle whose ``fc`` was shaken, so that it is neither always nor never right."""
    model, draft = write_pair(tmp_path, Shape("qwen2", kv_heads=2, tied=True, rope_theta=1e6))
    file = draft / "model.safetensors"
    tensors = load_file(file)
    noise = torch.randn(tensors["fc.weight"].shape, generator=torch.Generator().manual_seed(0))
    tensors["fc.weight"] += 0.01 * noise
    save_file(tensors, file)
    exported = export(model, draft, tmp_path / "v1", "v1")["v1"]
    compare("shaken oracle", model, exported, random_prompts(), [], tmp_path)
