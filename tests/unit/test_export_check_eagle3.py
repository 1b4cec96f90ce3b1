"""The self-check of an EAGLE-3 export names every way in which vLLM takes a wrong one without a word, or dies of it.

What no folder shows by itself (that another layer was read in training, that the norms were others, another theta) is
seen by comparing with the draft as it was saved.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from eagle.drafts.choices import DraftChoices
from eagle.drafts.eagle3.draft_config import draft_config_for
from eagle.drafts.eagle3.network import Eagle3Network
from eagle.drafts.families import DRAFT_FAMILIES
from eagle.drafts.saved import save_draft
from eagle.errors import WorkError
from eagle.target.config import load_config
from eagle.target.weights import Weights, read_embedding
from eagle.vllm import export as export_module
from eagle.vllm.export import export
from eagle.vllm.self_check import check_export
from tests.tiny import make_target
from tests.unit.exports import read

#: Of config.json as a whole, of what the layer's numbers stand in (the same in the plain form), of the tensors.
Change = Callable[[dict, dict, dict[str, torch.Tensor]], object]

AUX, DRAFTED, H, V = "eagle_aux_hidden_state_layer_ids", 150, 32, 424
FORMS = tuple(DRAFT_FAMILIES["eagle3"].layouts)
ATTENTION = "midlayer.self_attn"
NORMS = (
    "midlayer.input_layernorm.weight",
    "midlayer.hidden_norm.weight",
    "midlayer.post_attention_layernorm.weight",
    "norm.weight",
)


def says(**keys: object) -> Change:
    """In the draft's own keys, at the top in both forms."""
    return lambda raw, layer, tensors: raw.update(keys)


def of_layer(**keys: object) -> Change:
    return lambda raw, layer, tensors: layer.update(keys)


def without_key(*keys: str) -> Change:
    return lambda raw, layer, tensors: [where.pop(key, None) for key in keys for where in (raw, layer)]


def without(name: str) -> Change:
    return lambda raw, layer, tensors: tensors.pop(name)


def tensor(name: str, to: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda raw, layer, tensors: tensors.update({name: to(tensors[name])})


def added(name: str, *shape: int) -> Change:
    return lambda raw, layer, tensors: tensors.update({name: torch.zeros(shape)})


def moved_theta(raw: dict, layer: dict, tensors: dict) -> None:
    layer["rope_theta"] = layer["rope_parameters"]["rope_theta"] = 500.0


def undeclared_biases(raw: dict, layer: dict, tensors: dict) -> None:
    tensors |= {f"{ATTENTION}.{name}_proj.bias": tensors[f"{ATTENTION}.{name}_proj.weight"][:, 0] for name in "qkv"}


def biases_as_eagle1(raw: dict, layer: dict, tensors: dict) -> None:
    undeclared_biases(raw, layer, tensors)
    layer["qkv_bias"] = True


def biases_without_o(raw: dict, layer: dict, tensors: dict) -> None:
    undeclared_biases(raw, layer, tensors)
    layer["attention_bias"] = True


#: What is done, in which forms, and what the message says.
DAMAGES: dict[str, tuple[tuple[str, ...], Change, str]] = {
    "d2t missing": (FORMS, without("d2t"), "d2t is missing"),
    "d2t as token ids": (FORMS, tensor("d2t", lambda t: t + torch.arange(len(t))), "d2t holds no offsets"),
    "d2t of other tokens": (FORMS, tensor("d2t", lambda t: torch.zeros_like(t)), "t2d and d2t name different tokens"),
    "d2t in 32 bits": (FORMS, tensor("d2t", torch.Tensor.int), "d2t holds no offsets (int64"),
    "t2d of other tokens": (FORMS, tensor("t2d", lambda t: ~t), "t2d and d2t name different tokens"),
    "lm_head missing": (FORMS, without("lm_head.weight"), "lm_head.weight is missing"),
    "the target's whole lm_head": (FORMS, tensor("lm_head.weight", lambda t: torch.ones(V, H)), "lm_head.weight is"),
    "draft_vocab_size missing": (FORMS, without_key("draft_vocab_size"), "draft_vocab_size is None"),
    "draft_vocab_size smaller": (FORMS, says(draft_vocab_size=9), "draft_vocab_size is 9, the draft's is 150"),
    "vocab_size the draft's": (FORMS, of_layer(vocab_size=DRAFTED), "vocab_size reads back as 150"),
    "other layers": (FORMS, says(**{AUX: [1, 2, 3]}), f"{AUX} is [1, 2, 3], the draft's is [0, 2, 3]"),
    "layers off by one": (FORMS, says(**{AUX: [1, 3, 4]}), f"{AUX} is [1, 3, 4], the draft's is [0, 2, 3]"),
    "layers unsorted": (FORMS, says(**{AUX: [3, 0, 2]}), "names each layer once, ascending"),
    "a layer twice": (FORMS, says(**{AUX: [0, 2, 2]}), "names each layer once, ascending"),
    "a layer that is not there": (FORMS, says(**{AUX: [0, 2, 30]}), "the draft's is [0, 2, 3]"),
    "no layers": (FORMS, without_key(AUX), f"{AUX} is None"),
    "fewer layers": (FORMS, says(**{AUX: [0, 2]}), "fc.weight is [32, 96], its config says [32, 64]"),
    "their number missing": (FORMS, without_key("num_aux_hidden_states"), "num_aux_hidden_states is None"),
    **{
        f"{name} of single width": (
            FORMS, tensor(f"{ATTENTION}.{name}_proj.weight", lambda t: t[:, :H]), f"{name}_proj.weight is ["
        )
        for name in "qkv"
    },
    "halves of q exchanged": (
        FORMS, tensor(f"{ATTENTION}.q_proj.weight", lambda t: t.roll(H, 1)), "q_proj.weight did not come back"
    ),
    "fc of other width": (FORMS, tensor("fc.weight", lambda t: t[:, :H]), "its config says [32, 96]"),
    "fc with a bias": (FORMS, added("fc.bias", H), "fc.bias is dropped by vLLM"),
    "blocks of fc reversed": (FORMS, tensor("fc.weight", lambda t: t.roll(H, 1)), "fc.weight did not come back"),
    "fc missing": (FORMS, without("fc.weight"), "fc.weight is missing"),
    "biases undeclared": (FORMS, undeclared_biases, "attention_bias does not declare midlayer.self_attn.q_proj.bias"),
    "biases by EAGLE-1's key": (FORMS, biases_as_eagle1, "qkv_bias is not read in an EAGLE-3 draft"),
    "biases but o_proj's": (FORMS, biases_without_o, "not among the tensors: midlayer.self_attn.o_proj.bias"),
    "attention_bias alone": (FORMS, of_layer(attention_bias=True), "attention_bias declares biases"),
    "mlp_bias alone": (FORMS, of_layer(mlp_bias=True), "mlp_bias declares biases"),
    "other theta": (FORMS, moved_theta, "rope_theta is 500.0"),
    "other theta in one place": (FORMS, of_layer(rope_theta=500.0), "rope_theta is 500.0"),
    "theta missing": (FORMS, without_key("rope_theta"), "rope_theta is None"),
    "rope_parameters missing": (FORMS, without_key("rope_parameters"), "in rope_parameters None"),
    "rope missing": (FORMS, without_key("rope_theta", "rope_parameters"), "rope_theta is None"),
    "other rope": (
        FORMS, of_layer(rope_scaling={"rope_type": "linear", "factor": 2.0}, rope_parameters=None), "rope_scaling"
    ),
    **{f"{name} missing": (FORMS, without(name), f"{name} is missing, and vLLM takes ones") for name in NORMS},
    "residual not as trained": (FORMS, says(norm_before_residual=True), "norm_before_residual is True, the draft's is"),
    "norm_output": (FORMS, says(norm_output=True), "norm_output is said"),
    "norm_before_fc": (FORMS, says(norm_before_fc=True), "norm_before_fc is said"),
    "norm_before_fc in an object": (FORMS, says(eagle_config={"norm_before_fc": True}), "eagle_config is said"),
    "fc_norm": (FORMS, says(fc_norm=True), "fc_norm is said"),
    "parallel drafting": (FORMS, says(parallel_drafting=True), "parallel_drafting is said"),
    "width of another target": (FORMS, says(target_hidden_size=64), "target_hidden_size is 64"),
    "other rms_norm_eps": (FORMS, of_layer(rms_norm_eps=1e-3), "rms_norm_eps reads back as 0.001"),
    "rms_norm_eps missing": (FORMS, without_key("rms_norm_eps"), "rms_norm_eps must be said"),
    "shorter context": (FORMS, of_layer(max_position_embeddings=64), "max_position_embeddings reads back as 64"),
    "context missing": (FORMS, without_key("max_position_embeddings"), "max_position_embeddings must be said"),
    "two layers": (FORMS, of_layer(num_hidden_layers=2), "num_hidden_layers is 2"),
    "kv heads missing": (FORMS, without_key("num_key_value_heads"), "num_key_value_heads must be said"),
    "other kv heads": (FORMS, of_layer(num_key_value_heads=4), "num_key_value_heads reads back as 4"),
    "other heads": (FORMS, of_layer(num_attention_heads=8, head_dim=4), "num_attention_heads reads back as 8"),
    "layer_types": (FORMS, of_layer(layer_types=["full_attention"] * 4), "layer_types must not be"),
    "other activation": (FORMS, of_layer(hidden_act="gelu"), "hidden_act reads back as 'gelu'"),
    "tied": (FORMS, of_layer(tie_word_embeddings=True), "tie_word_embeddings must be false"),
    "an embedding": (FORMS, added("embed_tokens.weight", V, H), "embed_tokens.weight is extra"),
    "names with a prefix": (
        FORMS, lambda raw, layer, tensors: tensors.update({"model.fc.weight": tensors.pop("fc.weight")}),
        "model.fc.weight is extra",
    ),
    "NaN": (FORMS, tensor("norm.weight", lambda t: t * float("nan")), "norm.weight holds NaN"),
    "architecture": (("plain",), says(architectures=["Qwen2ForCausalLM"]), "a plain config says model_type 'llama'"),
    "no architecture": (("plain",), without_key("architectures"), "a plain config says model_type 'llama'"),
    "model_type": (("plain",), says(model_type="qwen2"), "a plain config says model_type 'llama'"),
    "model_type at the top": (("speculators",), says(model_type="llama"), "no model_type at the top"),
    "another kind": (("speculators",), says(speculators_model_type="peagle"), "has speculators_model_type 'eagle3'"),
    "a layer of Qwen2": (("speculators",), of_layer(model_type="qwen2"), "model_type of the layer is 'qwen2'"),
    "residual not said": (("speculators",), without_key("norm_before_residual"), "must be said: this form takes true"),
    "no verifier": (("speculators",), says(speculators_config={"proposal_methods": [{"speculative_tokens": 3}]}),
                    "the base model is None"),
    "a verifier from here": (
        ("speculators",), says(speculators_config={"proposal_methods": [{"speculative_tokens": 3}],
                                                   "verifier": {"name_or_path": "base"}}),
        "the base model is 'base' in speculators_config's verifier; its whole path",
    ),
    "no proposal": (("speculators",), lambda raw, *_: raw["speculators_config"].pop("proposal_methods"),
                    "do not say how many speculative_tokens"),
}  # fmt: skip
CASES = [
    pytest.param(form, change, message, id=f"{form}-{name}")
    for name, (forms, change, message) in DAMAGES.items()
    for form in forms
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, tuple]]:
    """A folder of each form, and what its self-check was called with."""
    root = tmp_path_factory.mktemp("exported")
    base = make_target(root / "base", layers=4)
    config = load_config(base)
    torch.manual_seed(2)
    network = Eagle3Network(
        draft_config_for(config, None, DraftChoices((0, 2, 3), DRAFTED)), read_embedding(Weights(base), config)
    )
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    network.choose(torch.arange(0, 2 * DRAFTED, 2))
    save_draft(network, root / "draft")
    asked: list[tuple] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module, "check_export", lambda folder, *rest: asked.append(rest))
        folders = export(base, root / "draft", root / "export", "both")
    return {form: (folders[form], rest) for form, rest in zip(folders, asked, strict=True)}


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_wrong_with_what_is_written(exported: dict, form: str):
    folder, rest = exported[form]
    check_export(folder, *rest)


@pytest.mark.parametrize(("form", "change", "message"), CASES)
def test_every_damage_is_named(exported: dict, tmp_path: Path, form: str, change: Change, message: str):
    folder, rest = exported[form]
    folder = Path(shutil.copytree(folder, tmp_path / "damaged"))
    config, tensors = read(folder)
    change(config, config if form == "plain" else config["transformer_layer_config"], tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: found.contiguous() for name, found in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(WorkError) as raised:
        check_export(folder, *rest)
    assert message in str(raised.value)
    assert f"self-check of the {form} export" in str(raised.value)
