"""Drafts of other kinds are told apart by their config and the names of their tensors; see also tests/e2e/brought."""

from __future__ import annotations

import pytest

from eagle.drafts.families import DRAFT_FAMILIES
from eagle.drafts.foreign import KINDS, Found, check_is_draft
from tests.tiny import make_target
from tests.unit.exports import make_draft


def kinds(config=None, names=(), files=()):
    found = Found(config or {}, frozenset(names), frozenset(files))
    return [name for name, kind in KINDS.items() if kind.is_this(found)]


@pytest.mark.parametrize(
    ("config", "names", "files", "expected"),
    [
        ({}, ["fc.weight", "layers.0.self_attn.q_proj.weight", "embed_tokens.weight"], [], []),
        ({"num_hidden_layers": 1}, ["layers.0.self_attn.q_proj.weight"], [], []),
        ({"num_hidden_layers": 2, "model_type": "llama"}, ["fc.weight"], [], []),
        ({"model_type": "eagle", "model": {}}, ["fc.weight", "lm_head.weight"], [], []),
        ({}, ["fc.weight", "midlayer.hidden_norm.weight"], [], []),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, ["fc.weight", "layers.0.hidden_norm.weight"], [], []),
        ({"speculators_model_type": "eagle3"}, ["fc.weight", "layers.0.hidden_norm.weight"], [], []),
        ({"speculators_model_type": "mlp"}, [], [], ["speculators"]),
        ({"medusa_num_heads": 3}, [], [], ["medusa"]),
        ({}, ["medusa_heads.2.0.linear.weight"], [], ["medusa"]),
        ({}, ["layers.1.mlp.up_proj.weight"], [], ["full model"]),
        ({}, ["norm.weight", "layers.0.mlp.up_proj.weight"], [], ["full model"]),
        ({"num_hidden_layers": 32}, ["lm_head.weight"], [], ["full model"]),
        ({}, [], ["adapter_config.json"], ["lora"]),
        ({}, [], ["data_12.ckpt"], ["store"]),
        ({}, [], ["train_options.json"], ["unfinished run"]),
        ({}, ["fc.weight"], ["train_options.json"], []),
        ({}, [], [], []),
    ],
)
def test_kinds(config, names, files, expected):
    assert kinds(config, names, files) == expected


def test_what_a_family_reads_is_no_kind_of_others(tmp_path):
    for family in ("llama", "qwen2"):
        base = make_target(tmp_path / family, family)
        check_is_draft(make_draft(tmp_path / f"{family}-draft", base), "--draft-path")


def test_every_kind_says_something():
    found = Found({}, frozenset(), frozenset())
    for kind in KINDS.values():
        assert kind.says(found) and kind.fix
    assert not set(KINDS) & set(DRAFT_FAMILIES)
