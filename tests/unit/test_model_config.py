"""config.json as `ModelConfig`: both transformers generations, drafts in vLLM's shapes, what cannot be read."""

from __future__ import annotations

import dataclasses
import json

import pytest

from eagle.errors import RequestError
from eagle.target.config import ModelConfig, load_config, parse_config
from eagle.target.quantization import Quantization, Use
from tests.unit.config_cases import (
    BASES,
    QWEN2,
    ROPES,
    base,
    without,
    write,
)

# Both transformers generations


@pytest.mark.parametrize("family", ["llama_2_chat_7B", "qwen2_7B"])
@pytest.mark.parametrize("rope", ROPES)
def test_both_generations_parse_equal(family, rope):
    old_keys, new_keys, theta, scaling = ROPES[rope]
    common = without(base(family), "rope_theta", "rope_scaling", "torch_dtype")
    old = parse_config({**common, **old_keys, "torch_dtype": "bfloat16"})
    new = parse_config({**common, "rope_parameters": new_keys, "dtype": "bfloat16"})
    assert old == new
    assert old.digest() == new.digest()
    assert (old.rope_theta, old.rope_scaling, old.dtype) == (theta, scaling, "bfloat16")


def test_parsing_leaves_its_argument_alone():
    raw = {**base(), "rope_parameters": {"type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    before = json.dumps(raw)
    parse_config(raw)
    assert json.dumps(raw) == before


def test_both_thetas_may_stand_side_by_side_if_equal():
    raw = {**base(), "rope_theta": 500000, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert parse_config(raw).rope_theta == 5e5


def test_a_whole_theta_has_the_digest_of_its_float():
    whole, fraction = (parse_config({**base("qwen2_7B"), "rope_theta": theta}) for theta in (1000000, 1e6))
    assert whole.digest() == fraction.digest()


@pytest.mark.parametrize("rope_type", ["default", "linear"])
def test_two_different_thetas_are_refused(rope_type):
    parameters = {"rope_type": rope_type, "factor": 2.0, "rope_theta": 500000.0}
    with pytest.raises(RequestError, match=r"rope_theta is 10000\.0 but rope_parameters says 500000\.0"):
        parse_config({**base(), "rope_theta": 10000.0, "rope_parameters": parameters})


# Drafts, in every shape they are written in


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("draft", [False, True], ids=["target", "draft"])
def test_round_trip_is_identity(name, draft):
    config = parse_config(base(name))
    config = config.draft() if draft else config
    assert parse_config(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("name", BASES)
def test_as_llama_keeps_all_but_the_family(name):
    draft = parse_config(base(name)).draft()
    written = draft.to_json(as_llama=True)
    assert (written["model_type"], written["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert written.get("qkv_bias", False) == (name in QWEN2)
    assert written["attention_bias"] is False  # true would promise an o_proj bias
    assert parse_config(written) == dataclasses.replace(draft, family="llama")


@pytest.mark.parametrize("as_llama", [False, True])
@pytest.mark.parametrize("rope", ROPES)
def test_round_trip_keeps_the_rope(rope, as_llama):
    config = parse_config({**without(base(), "rope_scaling"), **ROPES[rope][0]})
    written = config.to_json(as_llama=as_llama)
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == ROPES[rope][2]
    assert parse_config(written) == config
    # Each generation's reader sees only its own keys.
    assert parse_config(without(written, "rope_parameters")) == config
    assert parse_config(without(written, "rope_theta", "rope_scaling")) == config


def test_what_to_json_gives_away_is_a_copy():
    config = parse_config({**base(), "rope_scaling": {"type": "linear", "factor": 2.0}})
    digest = config.digest()
    written = config.to_json()
    written["rope_scaling"]["rope_theta"] = 5.0
    written["rope_parameters"]["factor"] = 3.0
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    assert config.digest() == digest


@pytest.mark.parametrize("biases", [{"attention_bias": True}, {"attention_bias": True, "mlp_bias": True}])
def test_llama_biases_survive(biases):
    config = parse_config({**base(), **biases})
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, "mlp_bias" in biases)
    assert "qkv_bias" not in config.to_json()
    assert parse_config(config.to_json()) == config


@pytest.mark.parametrize("as_llama", [False, True])
@pytest.mark.parametrize("name", ["llama_2_chat_70B", "qwen2_0.5B"])
def test_nested_eagle_config_is_the_same_layer(name, as_llama):
    draft = parse_config(base(name)).draft()
    inner = draft.to_json(as_llama=as_llama)
    plain = parse_config(inner)
    nested = {"model_type": "eagle", "architectures": ["EAGLEModel"], "model": inner, "torch_dtype": draft.dtype}
    assert parse_config(nested) == plain
    assert parse_config(without(nested, "model_type")) == plain
    assert parse_config({**nested, "model": without(inner, "torch_dtype")}) == plain


@pytest.mark.parametrize("inner", [None, "draft", ["draft"]])
def test_eagle_config_without_a_model_object_is_refused(inner):
    with pytest.raises(RequestError, match="no 'model' object"):
        parse_config({"model_type": "eagle", "architectures": ["EAGLEModel"], "model": inner})


# What cannot be read


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({**base(), "model_type": "falcon", "architectures": ["FalconForCausalLM"]}, "'FalconForCausalLM'"),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 768}, "'GPT2LMHeadModel'"),
        ({"model_type": "gpt2", "n_embd": 768}, "'gpt2'"),
        ({**base("qwen2_7B"), "model_type": "qwen4", "architectures": ["Qwen4ForCausalLM"]}, "'Qwen4ForCausalLM'"),
        ({}, "None"),
    ],
    ids=["falcon", "gpt2", "gpt2_without_architectures", "qwen4", "empty"],
)
def test_other_architectures_are_refused(raw, named):
    with pytest.raises(RequestError, match=f"source: the architecture {named} is not supported; expected one of Llama"):
        parse_config(raw, "source")


@pytest.mark.parametrize("window", [{"sliding_window": 4096}, {}], ids=["window", "default_window"])
def test_a_sliding_window_that_is_on_is_refused(window):
    raw = {**without(base("qwen2_7B"), "sliding_window"), "use_sliding_window": True, **window}
    with pytest.raises(RequestError, match="use_sliding_window is on"):
        parse_config(raw)


def test_a_sliding_window_that_is_off_changes_nothing():
    raw = base("qwen2_7B")
    assert raw["sliding_window"] == 131072
    assert parse_config({**raw, "sliding_window": None, "use_sliding_window": True}) == parse_config(raw)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_quantized_models_are_for_engines_alone(method):
    raw = {**base(), "quantization_config": {"quant_method": method, "bits": 4}}
    with pytest.raises(RequestError, match=rf"quantized model \({method}\)"):
        parse_config(raw)
    config = parse_config(raw, use=Use.SERVED)
    assert config.quantization.to_json() == {"method": method, "bits": 4}
    assert config.draft() == parse_config(base()).draft()
    assert not any("quanti" in key for key in [*config.to_json(), *config.draft().to_json()])


@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
)
@pytest.mark.parametrize("name", ["llama_2_chat_7B", "qwen2_7B"])
def test_a_missing_size_is_named(name, key):
    raw = base(name)
    for damaged in (without(raw, key), {**raw, key: None}):
        with pytest.raises(RequestError, match=f"source has no '{key}'; a {raw['model_type']} config must"):
            parse_config(damaged, "source")


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(RequestError, match="num_attention_heads 32 is not a multiple of num_key_value_heads 5"):
        parse_config({**base(), "num_key_value_heads": 5})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"hidden_size": 4096,', "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[1, 2]", "a JSON object, but holds a list"),
    ],
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path, content, said):
    file = write(tmp_path, content)
    with pytest.raises(RequestError, match=said) as caught:
        load_config(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("name", ["missing.json", "."], ids=["file", "folder"])
def test_a_missing_file_is_named(tmp_path, name):
    expected = tmp_path / ("config.json" if name == "." else name)
    with pytest.raises(FileNotFoundError) as caught:
        load_config(tmp_path / name)
    assert str(expected) in str(caught.value)


def test_a_file_and_its_folder_load_alike(tmp_path):
    file = write(tmp_path, base("qwen2_7B"))
    assert load_config(file) == load_config(tmp_path) == parse_config(base("qwen2_7B"))


# The digest

COMPUTES = {
    "family": "qwen2",
    "hidden_size": 4097,
    "intermediate_size": 11009,
    "num_hidden_layers": 1,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32001,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10001.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "hidden_act": "gelu",
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
    "logit_scale": 0.5,
    "own": {"sliding_window": 4096},
    "quantization": Quantization("awq", {"quant_method": "awq", "bits": 4}, "config.json"),
}
COMPUTES_NOTHING = {
    "dtype": "bfloat16",
    "bos_token_id": 5,
    "eos_token_id": [2, 5],
    "pad_token_id": 0,
    "initializer_range": 0.01,
    "extra": {"a_key": 1},
}


def test_the_digest_tests_cover_every_field():
    assert {field.name for field in dataclasses.fields(ModelConfig)} == {*COMPUTES, *COMPUTES_NOTHING}


@pytest.mark.parametrize("field", COMPUTES)
def test_digest_changes_with_what_is_computed(field):
    config = parse_config(base())
    changed = dataclasses.replace(config, **{field: COMPUTES[field]})
    assert getattr(changed, field) != getattr(config, field)
    assert changed.digest() != config.digest()


@pytest.mark.parametrize("field", COMPUTES_NOTHING)
def test_digest_ignores_dtype_and_ids(field):
    config = parse_config(base())
    changed = dataclasses.replace(config, **{field: COMPUTES_NOTHING[field]})
    assert changed != config
    assert changed.digest() == config.digest()


def test_digests_tell_the_bases_apart():
    digests = {name: parse_config(base(name)).digest() for name in BASES}
    assert len(set(digests.values())) == len(BASES)
    assert digests == {name: parse_config(base(name)).digest() for name in BASES}
