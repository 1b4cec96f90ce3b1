"""--configpath: what fits a base model, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from eagle.drafts.eagle1.draft_config import draft_config_for
from eagle.drafts.eagle3.draft_config import draft_config_for as eagle3_config_for
from eagle.drafts.interface import DraftChoices
from eagle.errors import RequestError
from eagle.target.config import parse_config
from tests.unit.config_cases import (
    base,
    write,
)


def draft_file(folder: Path, **changes: object) -> Path:
    return write(folder, {**base(), "num_hidden_layers": 1, **changes}, "draft.json")


def test_without_a_file_the_draft_is_derived():
    target = parse_config(base("qwen2_1.5B"))
    assert draft_config_for(target, None) == dataclasses.replace(target, num_hidden_layers=1)


def test_the_base_config_with_one_layer_is_accepted(tmp_path):
    target = parse_config(base())
    stale = draft_file(tmp_path, layer_types=["full_attention"] * 32, max_window_layers=32)
    assert draft_config_for(target, stale) == target.draft()


def test_how_the_base_model_is_quantized_is_no_matter(tmp_path):
    """The base model's config.json with one layer says it too."""
    target = parse_config(base())
    quantized = draft_file(tmp_path, quantization_config={"quant_method": "awq", "bits": 4})
    assert draft_config_for(target, quantized) == target.draft()
    assert eagle3_config_for(target, quantized, DraftChoices()).quantization is None


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
