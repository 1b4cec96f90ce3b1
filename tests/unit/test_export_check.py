"""The self-check of step 5: every rule fails when it is broken, names itself and leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eagle.drafts.vllm_layout import Layout
from eagle.errors import WorkError
from eagle.vllm import export as export_module
from eagle.vllm.export import export
from eagle.vllm.self_check import check_export
from tests.tiny import make_target
from tests.unit.exports import make_draft, read

Change = Callable[[dict, dict[str, torch.Tensor]], object]


def set_in_config(**values: object) -> Change:
    return lambda config, _: config.get("model", config).update(values)


def outer(**values: object) -> Change:
    return lambda config, _: config.update(values)


def drop(name: str) -> Change:
    return lambda _, tensors: tensors.pop(name)


def add(name: str, *shape: int) -> Change:
    return lambda _, tensors: tensors.update({name: torch.zeros(shape)})


def change(name: str, to: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda _, tensors: tensors.update({name: to(tensors[name])})


def lose_theta_in_parameters(config: dict, _: dict) -> None:
    config.get("model", config)["rope_parameters"].pop("rope_theta")


def move_both_thetas(config: dict, _: dict) -> None:
    plain = config.get("model", config)
    plain["rope_theta"] = plain["rope_parameters"]["rope_theta"] = 777.0


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[0] = float("nan")
    return tensor


NORM, Q, Q_BIAS = (
    "layers.0.post_attention_layernorm.weight",
    "layers.0.self_attn.q_proj.weight",
    "layers.0.self_attn.q_proj.bias",
)
BOTH = ("v1", "v0")

#: What is broken, in which layouts, and what the message says. The base model is a Qwen2 with every bias.
CORRUPTIONS: list[tuple[tuple[str, ...], Change, str]] = [
    (("v1",), set_in_config(architectures=["EagleLlamaForCausalLM"]), "architectures"),
    (("v1",), set_in_config(architectures=None), "architectures"),
    (("v1",), set_in_config(model_type="qwen2"), "model_type"),
    (("v0",), outer(architectures=["LlamaForCausalLM"]), "a v0 config is nested"),
    (("v0",), outer(model_type="llama"), "a v0 config is nested"),
    (("v0",), lambda config, _: config.pop("model"), "cannot be read back"),
    (BOTH, set_in_config(model_type="gpt2"), "cannot be read back"),
    (BOTH, set_in_config(layer_types=["full_attention"]), "layer_types"),
    (BOTH, set_in_config(num_hidden_layers=2), "num_hidden_layers"),
    (BOTH, set_in_config(rope_theta=777.0), "rope_theta"),
    (BOTH, set_in_config(rope_theta=None), "rope_theta"),
    (BOTH, set_in_config(rope_parameters=None), "rope_parameters"),
    (BOTH, lose_theta_in_parameters, "rope_parameters"),
    (BOTH, move_both_thetas, "rope_theta"),
    (BOTH, set_in_config(hidden_size=64, head_dim=8), "hidden_size"),
    (BOTH, set_in_config(intermediate_size=65), "intermediate_size"),
    (BOTH, set_in_config(num_attention_heads=8), "num_attention_heads"),
    (BOTH, set_in_config(num_key_value_heads=4), "num_key_value_heads"),
    (BOTH, set_in_config(head_dim=16), "head_dim"),
    (BOTH, set_in_config(vocab_size=1), "vocab_size"),
    (BOTH, set_in_config(rms_norm_eps=0.5), "rms_norm_eps"),
    (BOTH, set_in_config(max_position_embeddings=128), "max_position_embeddings"),
    (BOTH, set_in_config(rope_scaling={"rope_type": "linear", "factor": 2.0}, rope_parameters=None), "rope_scaling"),
    (BOTH, set_in_config(hidden_act="gelu"), "hidden_act"),
    (("v1",), set_in_config(qkv_bias=False), "not declared but among the tensors"),
    (("v1",), set_in_config(attention_bias=True), "attention_bias and o_proj.bias"),
    (("v1",), set_in_config(mlp_bias=True), "mlp_bias"),
    (BOTH, drop(Q_BIAS), "declared but not among the tensors"),
    (BOTH, drop(NORM), f"{NORM} is missing"),
    (("v0",), drop("lm_head.weight"), "lm_head.weight is missing"),
    (("v0",), drop("embed_tokens.weight"), "embed_tokens.weight is missing"),
    (BOTH, add("norm.weight", 32), "norm.weight is extra"),
    (("v1",), add("lm_head.weight", 4, 4), "lm_head.weight must not be in a v1 draft"),
    (("v1",), add("embed_tokens.weight", 4, 4), "embed_tokens.weight must not be in a v1 draft"),
    (("v1",), add("fc.bias", 32), "fc.bias must not be in a v1 draft"),
    (BOTH, change("fc.weight", lambda t: t.t()), "fc.weight is [64, 32]"),
    (BOTH, change(Q, torch.Tensor.half), f"{Q} is [32, 32] torch.float16"),
    (BOTH, change(Q, torch.Tensor.half), "different dtypes"),
    (BOTH, change(Q, with_nan), f"{Q} holds NaN"),
    (BOTH, change(Q_BIAS, lambda t: t / 0), f"{Q_BIAS} holds NaN"),
    (BOTH, change("fc.weight", lambda t: t + 1), "fc.weight did not come back"),
    (("v0",), change("lm_head.weight", lambda t: t.flip(0)), "lm_head.weight is not the target's"),
]
CASES = [
    pytest.param(layout, corruption, message, id=f"{layout}-{number}-{message}")
    for number, (layouts, corruption, message) in enumerate(CORRUPTIONS)
    for layout in layouts
]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("qwen")
    base = make_target(root / "base", "qwen2")
    return base, make_draft(root / "draft", base)


def corrupt(folder: Path, corruption: Change) -> None:
    config, tensors = read(folder)
    corruption(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize(("layout", "corruption", "message"), CASES)
def test_every_rule_of_the_self_check_holds_and_leaves_nothing(
    qwen: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
    corruption: Change,
    message: str,
) -> None:
    """The files are damaged between being written and being read back."""

    def corrupted_first(folder: Path, *rest: object) -> None:
        corrupt(folder, corruption)
        check_export(folder, *rest)

    monkeypatch.setattr(export_module, "check_export", corrupted_first)
    with pytest.raises(WorkError) as raised:
        export(*qwen, tmp_path / "out", layout)
    assert message in str(raised.value)
    assert f"self-check of the {layout} export" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_second_layout_takes_the_first_with_it(
    qwen: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    def fail_v0(folder: Path, layout: Layout, *rest: object) -> None:
        if layout.name == "v0":
            raise WorkError("v0 is damaged")

    monkeypatch.setattr(export_module, "check_export", fail_v0)
    if exists:
        (tmp_path / "out").mkdir()
    with pytest.raises(WorkError, match="v0 is damaged"):
        export(*qwen, tmp_path / "out", "both")
    assert list(tmp_path.rglob("*")) == ([tmp_path / "out"] if exists else [])
