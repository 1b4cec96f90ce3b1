"""config.json: both transformers generations, drafts in vLLM's shapes, and the files in configs/.

`base_configs/` holds the released config.json of each base model (instruct variants for Qwen2).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from transformers import AutoConfig, LlamaConfig, Qwen2Config

from eagle.cli import RequestError
from eagle.model_config import ModelConfig, draft_config_for, load_config, parse_config

BASES_FOLDER = Path(__file__).parent / "base_configs"
CONFIGS_FOLDER = Path(__file__).parents[2] / "configs"

# Parameters of the released checkpoints: a second source for every size that a base config names.
PARAMETERS = {
    "llama_2_chat_7B": 6_738_415_616,
    "llama_2_chat_13B": 13_015_864_320,
    "llama_2_chat_70B": 68_976_648_192,
    "vicuna_7B": 6_738_415_616,
    "vicuna_13B": 13_015_864_320,
    "vicuna_33B": 32_528_943_616,
    "qwen2_0.5B": 494_032_768,
    "qwen2_1.5B": 1_543_714_304,
    "qwen2_7B": 7_615_616_512,
    "qwen2_72B": 72_706_203_648,
}
BASES = sorted(PARAMETERS)
QWEN2 = [name for name in BASES if name.startswith("qwen2")]

LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def base(name: str = "llama_2_chat_7B") -> dict:
    return json.loads((BASES_FOLDER / f"{name}.json").read_text())


def without(raw: dict, *keys: str) -> dict:
    return {key: value for key, value in raw.items() if key not in keys}


def write(folder: Path, content: object, name: str = "config.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


# The files in configs/


def test_every_config_has_a_base_and_every_base_a_config():
    assert sorted(file.stem for file in BASES_FOLDER.glob("*.json")) == BASES
    assert sorted(file.name for file in CONFIGS_FOLDER.glob("*.json")) == sorted(f"{n}_config.json" for n in BASES)


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


@pytest.mark.parametrize("name", ["llama_2_chat_13B", "llama_2_chat_70B", "qwen2_7B"])
def test_shipped_config_of_another_size_is_refused(name):
    with pytest.raises(RequestError, match="hidden_size is"):
        draft_config_for(parse_config(base("llama_2_chat_7B")), CONFIGS_FOLDER / f"{name}_config.json")


@pytest.mark.parametrize("name", BASES)
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


# Both transformers generations

ROPES = {
    "nothing": ({}, {"rope_type": "default", "rope_theta": 1e4}, 1e4, None),
    "theta": ({"rope_theta": 1e6, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 1e6}, 1e6, None),
    "whole_theta": ({"rope_theta": 1000000}, {"rope_type": "default", "rope_theta": 1000000}, 1e6, None),
    "linear_type": (
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        1e4,
        {"rope_type": "linear", "factor": 2.0},
    ),
    "linear_both_names": (
        {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        1e4,
        {"rope_type": "linear", "factor": 4.0},
    ),
    "llama3": (
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3_SCALING}},
        {"rope_type": "llama3", **LLAMA3_SCALING, "rope_theta": 5e5},
        5e5,
        {"rope_type": "llama3", **LLAMA3_SCALING},
    ),
    "llama3_type": (
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3_SCALING}},
        {"type": "llama3", **LLAMA3_SCALING, "rope_theta": 5e5},
        5e5,
        {"rope_type": "llama3", **LLAMA3_SCALING},
    ),
}


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


# --configpath


def draft_file(folder: Path, **changes: object) -> Path:
    return write(folder, {**base(), "num_hidden_layers": 1, **changes}, "draft.json")


def test_without_a_file_the_draft_is_derived():
    target = parse_config(base("qwen2_1.5B"))
    assert draft_config_for(target, None) == dataclasses.replace(target, num_hidden_layers=1)


def test_the_base_config_with_one_layer_is_accepted(tmp_path):
    target = parse_config(base())
    stale = draft_file(tmp_path, layer_types=["full_attention"] * 32, max_window_layers=32)
    assert draft_config_for(target, stale) == target.draft()


def test_a_folder_is_accepted(tmp_path):
    target = parse_config(base())
    write(tmp_path, {**base(), "num_hidden_layers": 1})
    assert draft_config_for(target, tmp_path) == target.draft()


@pytest.mark.parametrize("layers", [2, 32])
def test_more_than_one_layer_is_refused(tmp_path, layers):
    file = draft_file(tmp_path, num_hidden_layers=layers)
    with pytest.raises(RequestError, match=f"num_hidden_layers is {layers}; a draft has exactly one") as caught:
        draft_config_for(parse_config(base()), file)
    assert str(file) in str(caught.value)


LENGTH_AND_IDS = {
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
    "initializer_range": 0.01,
    "bos_token_id": 0,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("key", LENGTH_AND_IDS)
def test_the_bases_length_and_ids_are_taken(tmp_path, key):
    target = parse_config(base())
    assert draft_config_for(target, draft_file(tmp_path, **{key: LENGTH_AND_IDS[key]})) == target.draft()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": 5120, "head_dim": 128}, "hidden_size is 5120, the base model's is 4096"),
        ({"intermediate_size": 13824}, "intermediate_size is 13824, the base model's is 11008"),
        ({"num_attention_heads": 64, "head_dim": 128}, "num_attention_heads is 64, the base model's is 32"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8, the base model's is 32"),
        ({"head_dim": 64}, "head_dim is 64, the base model's is 128"),
        ({"vocab_size": 128256}, "vocab_size is 128256, the base model's is 32000"),
        ({"rope_theta": 5e5}, "rope_theta is 500000.0, the base model's is 10000.0"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling is {'factor': 2.0, 'rope_type': 'linear'}, the base model's is None",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', the base model's is 'silu'"),
        ({"qkv_bias": True}, "qkv_bias is True, the base model's is False"),
        ({"mlp_bias": True}, "mlp_bias is True, the base model's is False"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_field_that_does_not_fit_is_named(tmp_path, changes, named):
    file = draft_file(tmp_path, **changes)
    with pytest.raises(RequestError) as caught:
        draft_config_for(parse_config(base()), file)
    message = str(caught.value)
    assert f"--configpath {file}" in message
    assert f": {named}. Use" in message  # it alone is named


def test_every_misfit_is_named_at_once(tmp_path):
    file = draft_file(tmp_path, vocab_size=32001, intermediate_size=1)
    with pytest.raises(RequestError, match=r"intermediate_size is 1, .*; vocab_size is 32001, .*32000"):
        draft_config_for(parse_config(base()), file)


def test_another_familys_config_is_refused(tmp_path):
    raw = {**base("qwen2_7B"), "num_hidden_layers": 1, "model_type": "llama", "qkv_bias": True}
    with pytest.raises(RequestError, match="family is 'llama', the base model's is 'qwen2'"):
        draft_config_for(parse_config(base("qwen2_7B")), write(tmp_path, raw))


# What cannot be read


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({**base(), "model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "'MistralForCausalLM'"),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 768}, "'GPT2LMHeadModel'"),
        ({"model_type": "gpt2", "n_embd": 768}, "'gpt2'"),
        ({**base("qwen2_7B"), "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, "'Qwen3ForCausalLM'"),
        ({}, "None"),
    ],
    ids=["mistral", "gpt2", "gpt2_without_architectures", "qwen3", "empty"],
)
def test_other_architectures_are_refused(raw, named):
    with pytest.raises(RequestError, match=f"source: the architecture {named} is not supported; expected a Llama"):
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
def test_quantized_models_are_refused(method):
    with pytest.raises(RequestError, match=rf"quantized model \({method}\)"):
        parse_config({**base(), "quantization_config": {"quant_method": method, "bits": 4}})


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


@pytest.mark.parametrize("name", BASES)
def test_a_config_that_transformers_saved_again_is_the_same(tmp_path, name):
    config = parse_config(base(name))
    write(tmp_path / "ours", config.to_json())
    theirs = AutoConfig.from_pretrained(tmp_path / "ours")
    assert_transformers_agrees(theirs, config)
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_config(tmp_path / "theirs") == config


@pytest.mark.parametrize("name", BASES)
def test_a_base_config_that_transformers_saved_again_is_the_same(tmp_path, name):
    write(tmp_path / "released", base(name))
    AutoConfig.from_pretrained(tmp_path / "released").save_pretrained(tmp_path / "again")
    assert load_config(tmp_path / "again") == load_config(tmp_path / "released")


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
}
COMPUTES_NOTHING = {
    "dtype": "bfloat16",
    "bos_token_id": 5,
    "eos_token_id": [2, 5],
    "pad_token_id": 0,
    "initializer_range": 0.01,
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
