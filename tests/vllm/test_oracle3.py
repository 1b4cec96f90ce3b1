"""EAGLE-3's oracle pairs through our converter into vLLM, and drafts damaged behind its self-check."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eagle.vllm.engine import EngineRequest, EngineResult
from eagle.vllm.export import export
from tests.oracle import Shape, random_prompts
from tests.oracle3 import READ, write_oracle
from tests.vllm.damage import drop_theta, edit_config, edit_tensors, table, wrong_theta
from tests.vllm.engines import run_engines

ACCEPTED, REFUSED = 0.85, 0.50

#: By name: the target, and the form of the draft's folder.
PAIRS = {
    "Llama, MHA, plain": (Shape(), "plain"),
    "Llama, GQA, theta 500, plain": (Shape(kv_heads=2, rope_theta=500.0), "plain"),
    "Llama, GQA, speculators": (Shape(kv_heads=2, seed=1), "speculators"),
    "Qwen2, GQA, plain": (Shape("qwen2", kv_heads=2), "plain"),
}
AUX = "eagle_aux_hidden_state_layer_ids"

Tensors = dict[str, torch.Tensor]


def swap_halves(tensors: Tensors) -> None:
    for name in "qkv":
        weight = tensors[f"midlayer.self_attn.{name}_proj.weight"]
        tensors[f"midlayer.self_attn.{name}_proj.weight"] = torch.cat(weight.chunk(2, dim=1)[::-1], dim=1)


def reverse_blocks(tensors: Tensors) -> None:
    tensors["fc.weight"] = torch.cat(tensors["fc.weight"].chunk(len(READ), dim=1)[::-1], dim=1)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(name))


def with_config(**keys: object) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, lambda config: config.update(keys))


#: A damage and the pair it is done to.
DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "d2t missing": ("Llama, MHA, plain", without("d2t")),
    "q, k, v halves exchanged": ("Llama, MHA, plain", lambda f: edit_tensors(f, swap_halves)),
    "blocks of fc reversed": ("Llama, MHA, plain", lambda f: edit_tensors(f, reverse_blocks)),
    "aux layers off by one": ("Llama, MHA, plain", with_config(**{AUX: [layer + 1 for layer in READ]})),
    "hidden_norm missing": ("Llama, MHA, plain", without("midlayer.hidden_norm.weight")),
    "input_layernorm missing": ("Llama, MHA, plain", without("midlayer.input_layernorm.weight")),
    "post_attention_layernorm missing": ("Llama, MHA, plain", without("midlayer.post_attention_layernorm.weight")),
    "norm missing": ("Llama, MHA, plain", without("norm.weight")),
    "norm_before_residual": ("Llama, MHA, plain", with_config(norm_before_residual=True)),
    "theta 10000 for 500": ("Llama, GQA, theta 500, plain", wrong_theta),
    "theta not written": ("Llama, GQA, theta 500, plain", drop_theta),
    "attention_bias declared": ("Qwen2, GQA, plain", with_config(attention_bias=True)),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, EngineResult]:
    """Acceptance of the first draft token of every pair and every damaged draft, from one child."""
    root = tmp_path_factory.mktemp("oracle3")
    folders = {}
    for number, (name, (shape, layout)) in enumerate(PAIRS.items()):
        pair = write_oracle(root / str(number), shape)
        folders[name] = pair.target, export(pair.target, pair.draft, root / str(number) / "export", layout)[layout]
    for number, (name, (pair_name, damage)) in enumerate(DAMAGES.items()):
        target, exported = folders[pair_name]
        folders[name] = target, Path(shutil.copytree(exported, root / f"damaged-{number}"))
        damage(folders[name][1])
    names = [*DAMAGES, *PAIRS]  # damaged ones first: what is left as it was in memory must not be right by chance
    measured = dict(zip(names, run_engines([request_for(*folders[name]) for name in names], root), strict=True))
    print("\n" + "\n".join(table({name: measured[name] for name in folders}, DAMAGES)))
    return measured


def request_for(target: Path, draft: Path) -> EngineRequest:
    prompts = random_prompts()
    return EngineRequest(
        str(target), prompts, str(draft), method="eagle3", num_speculative_tokens=1, dtype="float32",
        max_new_tokens=40, batch_size=len(prompts), warm_up=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_a_correct_export_is_accepted(results: dict[str, EngineResult], name: str) -> None:
    assert results[name].drafted > 0
    assert results[name].acceptance() > ACCEPTED


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_draft_is_refused(results: dict[str, EngineResult], name: str) -> None:
    """The test above can fail."""
    assert results[name].drafted > 0
    assert results[name].acceptance() < REFUSED
