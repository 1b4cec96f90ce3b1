"""The draft is transformers' own decoder layer, fed by fc and without its input norm."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from eagle.drafts.eagle1.network import Eagle1Network
from eagle.drafts.saved import load_draft, read_draft_state, save_draft
from eagle.errors import RequestError
from eagle.target.config import load_config
from eagle.target.weights import Weights, read_embedding
from tests.tiny import make_target

TARGETS = {
    "llama MHA": {"family": "llama", "kv_heads": 4},
    "llama GQA": {"family": "llama", "kv_heads": 2},
    "llama biases": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "llama linear rope": {
        "family": "llama",
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    },
    "qwen2": {"family": "qwen2", "rope_theta": 1e6},
    "qwen2 tied": {"family": "qwen2", "tied": True},
    "own head_dim": {"family": "llama", "head_dim": 12},
}


@pytest.fixture(params=TARGETS, scope="module")
def target(request, tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("target"), **TARGETS[request.param])


def draft_of(target) -> Eagle1Network:
    config = load_config(target)
    torch.manual_seed(1)
    model = Eagle1Network(config.draft(), read_embedding(Weights(target), config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def test_equals_the_targets_own_layer(target):
    """With the last layer's weights, and its input norm taken out, the draft computes what transformers does."""
    model = AutoModelForCausalLM.from_pretrained(target).eval()
    layer = model.model.layers[-1]
    layer.input_layernorm = nn.Identity()
    draft = draft_of(target)
    draft.layers[0].load_state_dict(layer.state_dict())
    tokens, features = torch.arange(2, 22).view(2, 10), torch.randn(2, 10, 32)
    hidden = draft.fc(torch.cat([model.get_input_embeddings()(tokens), features], -1))
    positions = torch.arange(10)[None]
    mask = torch.full((10, 10), float("-inf")).triu(1)[None, None]
    rotary = model.model.rotary_emb(hidden, positions)
    with torch.no_grad():
        expected = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        expected = expected[0] if isinstance(expected, tuple) else expected
        torch.testing.assert_close(draft(tokens, features), expected, rtol=1e-4, atol=1e-5)


def test_sees_the_past_only(target):
    draft = draft_of(target)
    tokens, features = torch.arange(2, 12)[None], torch.randn(1, 10, 32)
    before = draft(tokens, features)
    tokens[0, 6], features[0, 6] = 1, 9.0
    after = draft(tokens, features)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


def test_folder_loads_by_itself(target, tmp_path):
    draft = draft_of(target)
    save_draft(draft, tmp_path / "state")
    again = load_draft(tmp_path / "state")
    assert again.config == draft.config
    tokens, features = torch.arange(2, 12)[None], torch.randn(1, 10, 32)
    assert torch.equal(draft(tokens, features), again(tokens, features))


def test_only_the_layer_and_fc_are_trained(target):
    names = draft_of(target).trained_state().keys()
    assert "embed_tokens.weight" not in names
    assert not any("norm" in name and "post_attention" not in name for name in names)
    assert "fc.bias" not in names


def test_foreign_names_are_read(target, tmp_path):
    """Public drafts come with a model. prefix, rotary buffers and a pickle."""
    draft = draft_of(target)
    save_draft(draft, tmp_path)
    state = {f"model.{name}": tensor.clone() for name, tensor in draft.state_dict().items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert read_draft_state(Weights(tmp_path)).keys() == {*draft.trained_state(), "embed_tokens.weight"}
    again = load_draft(tmp_path)
    tokens, features = torch.arange(2, 12)[None], torch.randn(1, 10, 32)
    assert torch.equal(draft(tokens, features), again(tokens, features))


def test_what_is_no_draft(target, tmp_path):
    draft = draft_of(target)
    save_draft(draft, tmp_path)
    state = dict(draft.state_dict())
    state["layers.0.input_layernorm.weight"] = torch.ones(32)
    state["fc.weight"] = state["fc.weight"].T
    del state["layers.0.mlp.up_proj.weight"]
    (tmp_path / "model.safetensors").unlink()
    torch.save({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(RequestError) as error:
        load_draft(tmp_path)
    for expected in ("up_proj.weight is missing", "input_layernorm.weight is not part", "fc.weight is [64, 32]"):
        assert expected in str(error.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_frequencies_stay_in_float32(target, dtype):
    """Whatever the network is cast to: at 900 tokens rounded ones would turn by a wrong angle."""
    wide, narrow = draft_of(target), draft_of(target).to(dtype)
    positions = torch.arange(900)[None]
    for found, expected in zip(
        narrow.rotary(torch.zeros(1, dtype=torch.float32), positions),
        wide.rotary(torch.zeros(1, dtype=torch.float32), positions),
        strict=True,
    ):
        assert torch.equal(found, expected)
    assert narrow.fc.weight.dtype == dtype
