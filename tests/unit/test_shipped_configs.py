"""The files in configs/ against the released base models', and what transformers reads in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, LlamaConfig, Qwen2Config

from eagle.drafts.choices import DraftChoices
from eagle.drafts.eagle1.draft_config import draft_config_for
from eagle.drafts.eagle3.vllm_layouts import PLAIN
from eagle.drafts.families import DRAFT_FAMILIES
from eagle.drafts.vllm_layout import SavedDraft
from eagle.dtypes import parse_dtype
from eagle.errors import RequestError
from eagle.target.config import ModelConfig, load_config, parse_config
from tests.unit.config_cases import (
    AS_THEMSELVES,
    BASES,
    BASES_FOLDER,
    CONFIGS_FOLDER,
    PARAMETERS,
    QWEN2,
    ROPES,
    base,
    skip_unless_known,
    without,
    write,
)

EAGLE3 = DRAFT_FAMILIES["eagle3"]


def test_every_config_has_a_base_and_every_base_a_config():
    assert sorted(file.stem for file in BASES_FOLDER.glob("*.json")) == BASES
    of_each = [f"{name}{kind}_config.json" for name in BASES for kind in ("", "_eagle3")]
    assert sorted(file.name for file in CONFIGS_FOLDER.glob("*.json")) == sorted(of_each)


@pytest.mark.parametrize("name", BASES)
def test_shipped_config_is_what_the_base_gives(name):
    shipped = json.loads((CONFIGS_FOLDER / f"{name}_config.json").read_text())
    derived = parse_config(base(name)).draft().to_json()
    # As text, so that true is not 1 and 10000 is not 10000.0.
    assert json.dumps(shipped, indent=1, sort_keys=True) == json.dumps(derived, indent=1, sort_keys=True)
    assert shipped["num_hidden_layers"] == 1


@pytest.mark.parametrize("name", BASES)
def test_shipped_config_fits_its_base(name):
    target = parse_config(base(name))
    assert draft_config_for(target, CONFIGS_FOLDER / f"{name}_config.json") == target.draft()


@pytest.mark.parametrize("name", BASES)
def test_the_bases_own_config_with_one_layer_fits_it(tmp_path, name):
    target = parse_config(base(name))
    write(tmp_path, base(name) | {"num_hidden_layers": 1})
    assert draft_config_for(target, tmp_path / "config.json") == target.draft()
    third = EAGLE3.config(target, tmp_path / "config.json", DraftChoices())
    assert third == EAGLE3.config(target, None, DraftChoices())
    with pytest.raises(RequestError, match="hidden_size is"):
        write(tmp_path, base(name) | {"num_hidden_layers": 1, "hidden_size": 2 * target.hidden_size})
        draft_config_for(target, tmp_path / "config.json")


@pytest.mark.parametrize("name", ["llama_2_chat_13B", "llama_2_chat_70B", "qwen2_7B"])
def test_shipped_config_of_another_size_is_refused(name):
    with pytest.raises(RequestError, match="hidden_size is"):
        draft_config_for(parse_config(base("llama_2_chat_7B")), CONFIGS_FOLDER / f"{name}_config.json")


# EAGLE-3


def eagle3_file(name: str) -> Path:
    return CONFIGS_FOLDER / f"{name}_eagle3_config.json"


@pytest.mark.parametrize("name", BASES)
def test_shipped_eagle3_config_is_what_vllm_is_given(name):
    shipped, target = json.loads(eagle3_file(name).read_text()), parse_config(base(name))
    draft = EAGLE3.config_of(target, EAGLE3.config(target, None, DraftChoices()), {})
    dtype = parse_dtype(draft.dtype)
    exported = PLAIN.config(SavedDraft("eagle3", draft, {}, Path(), {}), dtype)
    assert exported.pop("num_aux_hidden_states") == 3  # which is what vLLM takes where it is not said
    assert json.dumps(shipped, indent=1, sort_keys=True) == json.dumps(exported, indent=1, sort_keys=True)


@pytest.mark.parametrize("name", BASES)
def test_shipped_eagle3_config_fits_its_base(name):
    target = parse_config(base(name))
    config = EAGLE3.config(target, eagle3_file(name), DraftChoices())
    assert config == EAGLE3.config(target, None, DraftChoices())
    depth = target.num_hidden_layers
    assert config.extra["eagle_aux_hidden_state_layer_ids"] == [2, depth // 2, depth - 3]
    assert (config.num_hidden_layers, config.family, config.qkv_bias) == (1, "llama", False)
    size = EAGLE3.config(target, eagle3_file(name), DraftChoices(draft_vocab_size=8192)).extra["draft_vocab_size"]
    assert size == 8192


@pytest.mark.parametrize("name", ["llama_2_chat_13B", "qwen2_7B"])
def test_shipped_eagle3_config_of_another_size_is_refused(name):
    with pytest.raises(RequestError, match="hidden_size is"):
        EAGLE3.config(parse_config(base("llama_2_chat_7B")), eagle3_file(name), DraftChoices())


# What the released models are


@pytest.mark.parametrize("name", AS_THEMSELVES)
def test_base_sizes_give_the_released_parameter_count(name):
    config = parse_config(base(name))
    hidden, query = config.hidden_size, config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    layer = 2 * hidden * query + 2 * hidden * key_value + 3 * hidden * config.intermediate_size + 2 * hidden
    layer += (query + 2 * key_value) * config.qkv_bias
    matrices = 1 if config.tie_word_embeddings else 2
    total = config.num_hidden_layers * layer + hidden + matrices * config.vocab_size * hidden
    assert total == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "theta", "eps", "length", "dtype"),
    [
        ("llama_2_chat_7B", 1e4, 1e-5, 4096, "float16"),
        ("vicuna_7B", 1e4, 1e-6, 2048, "float16"),
        ("vicuna_33B", 1e4, 1e-6, 2048, "float16"),  # its config.json names no max_position_embeddings
        ("qwen2_0.5B", 1e6, 1e-6, 32768, "bfloat16"),
        ("qwen2_72B", 1e6, 1e-6, 32768, "bfloat16"),
    ],
)
def test_what_the_parameter_count_does_not_show(name, theta, eps, length, dtype):
    config = parse_config(base(name))
    assert (config.rope_theta, config.rms_norm_eps) == (theta, eps)
    assert (config.max_position_embeddings, config.dtype) == (length, dtype)
    assert config.rope_scaling is None
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (name in QWEN2, False, False)


def test_absent_kv_heads_and_head_dim_follow_from_the_heads():
    config = parse_config(base("vicuna_33B"))
    assert (config.num_key_value_heads, config.head_dim) == (52, 128)


# transformers' own reading


def rope_of(config) -> tuple[float, dict]:
    """theta and scaling as transformers holds them: in `rope_parameters` (5.x), or in two attributes (4.x)."""
    parameters = getattr(config, "rope_parameters", None) or {}
    scaling = dict(parameters or getattr(config, "rope_scaling", None) or {})
    theta = scaling.pop("rope_theta", None)
    scaling.pop("type", None)
    return (config.rope_theta if theta is None else theta), scaling


def assert_transformers_agrees(theirs, ours: ModelConfig) -> None:
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "hidden_act",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    ):
        assert getattr(theirs, key) == getattr(ours, key), key
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    theta, scaling = rope_of(theirs)
    assert head_dim == ours.head_dim
    assert theta == ours.rope_theta
    assert scaling.pop("rope_type", "default") == (ours.rope_scaling or {}).get("rope_type", "default")
    if ours.rope_scaling:
        assert scaling == without(ours.rope_scaling, "rope_type")


@pytest.mark.parametrize("as_llama", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_transformers_reads_a_draft_config_alike(name, as_llama):
    draft = parse_config(base(name)).draft()
    written = draft.to_json(as_llama=as_llama)
    config_class = {"llama": LlamaConfig, "qwen2": Qwen2Config}[written["model_type"]]
    assert_transformers_agrees(config_class(**written), draft)


@pytest.mark.parametrize("rope", ROPES)
def test_transformers_reads_the_rope_alike(rope):
    raw = {**without(base(), "rope_scaling"), **ROPES[rope][0], "max_position_embeddings": 131072}
    config = parse_config(raw)
    assert_transformers_agrees(LlamaConfig(**config.to_json()), config)


@pytest.mark.parametrize("name", AS_THEMSELVES)
def test_a_config_that_transformers_saved_again_is_the_same(tmp_path, name):
    config = parse_config(base(name))
    write(tmp_path / "ours", config.to_json())
    theirs = AutoConfig.from_pretrained(tmp_path / "ours")
    assert_transformers_agrees(theirs, config)
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_config(tmp_path / "theirs") == config


@pytest.mark.parametrize("name", BASES)
def test_a_base_config_that_transformers_saved_again_is_the_same(tmp_path, name):
    skip_unless_known(name)
    write(tmp_path / "released", base(name))
    AutoConfig.from_pretrained(tmp_path / "released").save_pretrained(tmp_path / "again")
    assert load_config(tmp_path / "again") == load_config(tmp_path / "released")
