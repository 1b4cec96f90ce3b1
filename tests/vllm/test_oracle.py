"""Oracle pairs through our converter into vLLM: a correct export is accepted nearly always, a damaged one hardly ever.

The damage is done to the exported folder, behind the converter's self-check: these are the drafts that vLLM loads
without a word.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eagle.vllm.engine import EngineRequest, EngineResult
from eagle.vllm.export import export
from tests.oracle import Shape, random_prompts, write_pair
from tests.vllm.damage import drop_theta, edit_config, edit_tensors, table, wrong_theta
from tests.vllm.engines import run_engines

ACCEPTED, REFUSED = 0.85, 0.20

SHAPES = {
    "Llama, MHA": Shape(),
    "Llama, GQA": Shape(kv_heads=2),
    "Llama, GQA, tied": Shape(kv_heads=2, tied=True),
    "Llama, GQA, theta 500": Shape(kv_heads=2, rope_theta=500.0),
    "Llama, GQA, theta 1e6": Shape(kv_heads=2, rope_theta=1e6),
    "Qwen2, GQA": Shape("qwen2", kv_heads=2),
    "Qwen2, GQA, tied": Shape("qwen2", kv_heads=2, tied=True),
}


def zero_bias(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda t: t[f"layers.0.self_attn.{name}_proj.bias"].zero_())


def drop_biases(folder: Path) -> None:
    """Declared and not there: vLLM leaves them as they were in memory."""
    edit_tensors(folder, lambda t: [t.pop(f"layers.0.self_attn.{name}_proj.bias") for name in "qkv"])


def swap_halves(tensors: dict[str, torch.Tensor]) -> None:
    first, second = tensors["fc.weight"].chunk(2, dim=1)
    tensors["fc.weight"] = torch.cat([second, first], dim=1)


def transpose(tensors: dict[str, torch.Tensor]) -> None:
    tensors["fc.weight"] = tensors["fc.weight"].t().reshape(tensors["fc.weight"].shape)


#: A damage and the shape it is done to.
DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "biases dropped": ("Qwen2, GQA", drop_biases),
    "q bias zeroed": ("Qwen2, GQA", zero_bias("q")),
    "k bias zeroed": ("Qwen2, GQA", zero_bias("k")),
    "v bias zeroed": ("Qwen2, GQA", zero_bias("v")),
    "qkv_bias not declared": ("Qwen2, GQA, tied", lambda f: edit_config(f, lambda config: config.pop("qkv_bias"))),
    "theta 10000 for 500": ("Llama, GQA, theta 500", wrong_theta),
    "theta not written": ("Llama, GQA, theta 1e6", drop_theta),
    "halves of fc swapped": ("Llama, GQA", lambda f: edit_tensors(f, swap_halves)),
    "fc transposed": ("Llama, MHA", lambda f: edit_tensors(f, transpose)),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, EngineResult]:
    """Acceptance of every pair and every damaged draft. One child runs all engines, so this is where the time goes."""
    root = tmp_path_factory.mktemp("oracle")
    folders = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        target, draft = write_pair(root / str(number), shape)
        folders[name] = target, export(target, draft, root / str(number) / "export", "v1")["v1"]
    for number, (name, (shape_name, damage)) in enumerate(DAMAGES.items()):
        target, exported = folders[shape_name]
        folders[name] = target, Path(shutil.copytree(exported, root / f"damaged-{number}"))
        damage(folders[name][1])
    # Damaged ones first: a bias that is left as it was in memory must not find a right one there.
    names = [*DAMAGES, *SHAPES]
    measured = dict(zip(names, run_engines([request_for(*folders[name]) for name in names], root), strict=True))
    print("\n" + "\n".join(table({name: measured[name] for name in folders}, DAMAGES)))
    return measured


def request_for(target: Path, draft: Path) -> EngineRequest:
    prompts = random_prompts()
    return EngineRequest(
        str(target), prompts, str(draft), dtype="float32", max_new_tokens=40, batch_size=len(prompts), warm_up=False
    )


@pytest.mark.parametrize("name", SHAPES)
def test_a_correct_export_is_accepted(results: dict[str, EngineResult], name: str) -> None:
    assert results[name].drafted > 0
    assert results[name].acceptance() > ACCEPTED


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_draft_is_refused(results: dict[str, EngineResult], name: str) -> None:
    """The test above can fail."""
    assert results[name].drafted > 0
    assert results[name].acceptance() < REFUSED
