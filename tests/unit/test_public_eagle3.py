"""EAGLE-3 drafts of other trainers go through step 5 into both forms, or are refused by what they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eagle.decode.fitting_draft import load_fitting_draft
from eagle.decode.target import load_target
from eagle.drafts.choices import DraftChoices
from eagle.drafts.families import DRAFT_FAMILIES
from eagle.drafts.saved import load_draft, save_draft, warm_start
from eagle.errors import RequestError
from eagle.target.config import ModelConfig, load_config
from eagle.target.weights import Weights, read_embedding, read_head
from eagle.train.draft_choice import draft_config
from eagle.train.options import TrainOptions
from eagle.vllm.export import export
from tests.tiny import make_target
from tests.unit.exports import read

H, V, D, LAYERS = 32, 424, 150, 7
IDS = torch.arange(0, 2 * D, 2)
AUX = "eagle_aux_hidden_state_layer_ids"
FORMS = DRAFT_FAMILIES["eagle3"].layouts

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("base"), layers=LAYERS)


def draft(layers: int = 3, drafted: int = D, heads: int = 4, kv: int = 2, width: int = 8, inner: int = 64) -> Tensors:
    """Under the names of the public checkpoints; nothing of the target's, no table of tokens."""
    torch.manual_seed(1)
    shapes = {
        "fc.weight": (H, layers * H),
        "midlayer.self_attn.q_proj.weight": (heads * width, 2 * H),
        "midlayer.self_attn.k_proj.weight": (kv * width, 2 * H),
        "midlayer.self_attn.v_proj.weight": (kv * width, 2 * H),
        "midlayer.self_attn.o_proj.weight": (H, heads * width),
        "midlayer.mlp.gate_proj.weight": (inner, H),
        "midlayer.mlp.up_proj.weight": (inner, H),
        "midlayer.mlp.down_proj.weight": (H, inner),
        **{f"midlayer.{name}.weight": (H,) for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")},
        "norm.weight": (H,),
        "lm_head.weight": (drafted, H),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def d2t() -> Tensors:
    return {"d2t": IDS - torch.arange(D)}


def t2d() -> Tensors:
    return {"t2d": torch.zeros(V, dtype=torch.bool).index_fill_(0, IDS, True)}


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}


def prefixed(tensors: Tensors) -> Tensors:
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


#: What SafeAILab's EAGLE publishes: no rope, no layers, its own short context.
PLAIN = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": H,
    "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "torch_dtype": "float16",
    "vocab_size": V, "draft_vocab_size": D, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
OURS = ("architectures", "draft_vocab_size", "torch_dtype")


def speculators(**own: object) -> dict:
    """As the speculators library writes it."""
    return {
        "architectures": ["Eagle3Speculator"], "auto_map": {"": "eagle3.Eagle3SpeculatorConfig"}, "draft_vocab_size": D,
        "speculators_model_type": "eagle3", "speculators_version": "0.1.0", "target_hidden_size": None, "dtype": None,
        "norm_before_residual": True, "tie_word_embeddings": False,
        "speculators_config": {
            "algorithm": "eagle3", "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5}],
            "verifier": {"name_or_path": "org/base-7b", "architectures": ["LlamaForCausalLM"]},
        },
        "transformer_layer_config": {key: value for key, value in PLAIN.items() if key not in OURS},
    } | own  # fmt: skip


def without(config: dict, *keys: str) -> dict:
    return {key: value for key, value in config.items() if key not in keys}


#: By whom or what: the config, the tensors, and what must come out of it beside what is the same for all.
BROUGHT: dict[str, tuple[dict, Callable[[], Tensors], dict]] = {
    "EAGLE's own: both tables": (PLAIN, lambda: draft() | d2t() | t2d(), {"rope_theta": 10000.0, AUX: [2, 3, 4]}),
    "a config of as many layers as the target": (PLAIN | {"num_hidden_layers": 40}, lambda: draft() | d2t(), {}),
    "by layers.0": (PLAIN, lambda: renamed(draft() | d2t(), "midlayer.", "layers.0."), {}),
    "with a prefix": (PLAIN, lambda: prefixed(draft() | d2t()), {}),
    "rotary buffers": (PLAIN, lambda: draft() | d2t() | {"midlayer.self_attn.rotary_emb.inv_freq": torch.ones(4)}, {}),
    "t2d alone": (PLAIN, lambda: draft() | t2d(), {}),
    "t2d as numbers": (PLAIN, lambda: draft() | {"t2d": t2d()["t2d"].long()}, {}),
    "d2t in 32 bits": (PLAIN, lambda: draft() | {"d2t": d2t()["d2t"].int()}, {}),
    "half precision": (PLAIN, lambda: {n: t.half() for n, t in draft().items()} | d2t(), {}),
    "bfloat16": (PLAIN, lambda: {n: t.bfloat16() for n, t in draft().items()} | d2t(), {}),
    "no draft_vocab_size": (without(PLAIN, "draft_vocab_size"), lambda: draft() | d2t(), {}),
    "SpecForge's": (
        PLAIN | {"architectures": ["LlamaForCausalLMEagle3"], "rope_theta": 5e5, "rope_scaling": None,
                 "attention_bias": False, "sliding_window": None, "use_sliding_window": False, "use_cache": True},
        lambda: draft() | d2t() | t2d(), {"rope_theta": 5e5},
    ),
    "nvidia's: layers in an object": (
        PLAIN | {"eagle_config": {AUX: [0, 3, 6], "use_aux_hidden_state": True, "use_last_layernorm": True}},
        lambda: draft() | d2t(), {AUX: [0, 3, 6]},
    ),
    "SpecForge's layers, by their outputs": (
        PLAIN | {"eagle_config": {AUX: [1, 3, 4], "use_aux_hidden_state": True}},
        lambda: draft() | d2t(), {AUX: [2, 4, 5]},
    ),
    "layers at the top are vLLM's": (
        PLAIN | {"eagle_config": {AUX: [1, 3, 4]}, AUX: [1, 3, 4]}, lambda: draft() | d2t(), {AUX: [1, 3, 4]}
    ),
    "empty layers": (PLAIN | {"eagle_config": {AUX: []}, AUX: None}, lambda: draft() | d2t(), {AUX: [2, 3, 4]}),
    "one layer": (PLAIN | {AUX: [6]}, lambda: draft(1) | d2t(), {AUX: [6], "num_aux_hidden_states": 1}),
    "four layers": (PLAIN | {AUX: [0, 2, 4, 6]}, lambda: draft(4) | d2t(), {"num_aux_hidden_states": 4}),
    "its own heads": (
        PLAIN | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "intermediate_size": 48},
        lambda: draft(heads=8, kv=4, width=16, inner=48) | d2t(), {"head_dim": 16, "intermediate_size": 48},
    ),
    "normed residual": (PLAIN | {"norm_before_residual": True}, lambda: draft() | d2t(),
                        {"norm_before_residual": True}),
    "q, k, v biases": (
        PLAIN | {"attention_bias": True},
        lambda: draft() | d2t() | {f"midlayer.self_attn.{n}_proj.bias": torch.randn(s)
                                   for n, s in (("q", 32), ("k", 16), ("v", 16))},
        {"attention_bias": True},
    ),
    "an fc.bias of zeros": (PLAIN, lambda: draft() | d2t() | {"fc.bias": torch.zeros(H)}, {}),
    "the speculators library's": (
        speculators(), lambda: renamed(draft() | d2t() | t2d(), "midlayer.", "layers.0."),
        {"norm_before_residual": True},
    ),
    "speculators, residual not said": (
        without(speculators(**{AUX: [1, 3, 5]}), "norm_before_residual"),
        lambda: renamed(draft() | d2t(), "midlayer.", "layers.0."), {"norm_before_residual": True, AUX: [1, 3, 5]},
    ),
    "speculators, residual not normed": (
        speculators(norm_before_residual=False), lambda: draft() | d2t(), {"norm_before_residual": False}
    ),
}  # fmt: skip


def write(folder: Path, config: dict, tensors: Tensors, name: str = "model.safetensors") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if name.endswith(".bin"):
        torch.save(tensors, folder / name)
    else:
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / name)
    return folder


@pytest.mark.parametrize("brought", BROUGHT)
def test_it_converts_into_both_forms_and_back(base: Path, tmp_path: Path, brought: str):
    config, make, expected = BROUGHT[brought]
    name = "pytorch_model.bin" if len(brought) % 2 else "model.safetensors"
    source = write(tmp_path / "draft", config, make(), name)
    folders = export(base, source, tmp_path / "out", "both")
    for form, folder in folders.items():
        raw, tensors = read(folder)
        found = raw if form == "plain" else raw["transformer_layer_config"] | raw
        wanted = {"norm_before_residual": False, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096} | expected
        assert {key: found[key] for key in wanted} == wanted
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32, torch.int64, torch.bool}
        assert torch.equal(tensors["d2t"], d2t()["d2t"]) and torch.equal(tensors["t2d"], t2d()["t2d"])
        biases = {key for key in tensors if key.endswith(".bias")}
        assert len(biases) == (4 if "biases" in brought else 0)
        assert "embed_tokens.weight" not in tensors
        for name, tensor in draft().items() if "own heads" not in brought and "layer" not in brought else ():
            torch.testing.assert_close(tensors[name], tensor, rtol=0.01, atol=1e-3)
    back = export(base, folders["speculators"], tmp_path / "back", "plain")["plain"]
    assert (back / "config.json").read_text() == (folders["plain"] / "config.json").read_text()
    assert (back / "model.safetensors").read_bytes() == (folders["plain"] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("has_head", [True, False], ids=["own head", "the target's head"])
@pytest.mark.parametrize("said", [{"draft_vocab_size": V}, {"draft_vocab_size": None}], ids=["said", "not said"])
def test_the_whole_vocabulary(base: Path, tmp_path: Path, form: str, has_head: bool, said: dict):
    """vLLM has no place for a d2t then; without an lm_head the draft has the target's."""
    target, weights = load_config(base), Weights(base)
    tensors = draft(drafted=V)
    if not has_head:
        del tensors["lm_head.weight"]
    source = write(tmp_path / "draft", PLAIN | said, tensors)
    folder = export(base, source, tmp_path / "out", form)[form]
    raw, found = read(folder)
    assert raw["draft_vocab_size"] == V and not {"d2t", "t2d"} & found.keys()
    head = read_head(weights, target)
    assert torch.equal(found["lm_head.weight"], tensors.get("lm_head.weight", head))
    loaded = load_draft(folder, read_embedding(weights, target), target)
    assert torch.equal(loaded.ids, torch.arange(V))
    measured = load_fitting_draft(source, base, load_target(base, torch.float32, torch.device("cpu")))
    assert torch.equal(measured.lm_head.weight, found["lm_head.weight"])
    with torch.no_grad():
        loaded.lm_head.weight.copy_(head)  # as a new draft's is
    assert warm_start(loaded, source, "--init", DRAFT_FAMILIES["eagle3"], target, lambda: head) == []
    assert torch.equal(loaded.lm_head.weight, found["lm_head.weight"])


def test_training_goes_on_in_the_network_that_the_weights_are_of(tmp_path: Path):
    """As it is measured and exported: by its own rotary settings, which a public config often does not say."""
    rope = {"rope_type": "default", "rope_theta": 500.0}
    base = make_target(tmp_path / "base", layers=LAYERS, rope_parameters=rope)
    target, weights = load_config(base), Weights(base)
    source = write(tmp_path / "draft", PLAIN | {"rms_norm_eps": 1e-3}, draft() | d2t())
    options = TrainOptions(tmp_path / "run", base, tmpdir=tmp_path, draft="eagle3", init=str(source))
    config = draft_config(options, target, {})
    assert (config.rope_theta, config.rms_norm_eps) == (10000.0, 1e-3) and target.rope_theta == 500.0
    family, head = DRAFT_FAMILIES["eagle3"], read_head(weights, target)
    network = family.build(config, read_embedding(weights, target).float(), draft())
    assert warm_start(network, source, "--init", family, target, lambda: head) == []
    new = family.config(target, None, DraftChoices((2, 3, 4), D))
    other = family.build(new, read_embedding(weights, target).float(), draft())
    with pytest.raises(RequestError, match=r"rms_norm_eps is 0.001 there and 1e-06 here; rope_theta is 10000.0 there"):
        warm_start(other, source, "--init", family, target, lambda: head)


@pytest.mark.parametrize("brought", ["q k v", "q k v o", "gate up down", "q k v up"])
def test_training_goes_on_with_the_biases(base: Path, tmp_path: Path, brought: str):
    """Of attention all four, of the MLP all three: one that the draft has not is zero, or is missing."""
    names = brought.split()
    sizes = {"q": 32, "k": 16, "v": 16, "o": H, "gate": 64, "up": 64, "down": H}
    biases = {
        f"midlayer.{'self_attn' if name in 'qkvo' else 'mlp'}.{name}_proj.bias": torch.randn(sizes[name])
        for name in names
    }
    said = {"attention_bias": "q" in names, "mlp_bias": "up" in names}
    source = write(tmp_path / "draft", PLAIN | said, draft() | d2t() | biases)
    options = TrainOptions(tmp_path / "run", base, tmpdir=tmp_path, draft="eagle3", init=str(source))
    target, weights, family = load_config(base), Weights(base), DRAFT_FAMILIES["eagle3"]
    network = family.build(draft_config(options, target, {}), read_embedding(weights, target).float())

    def start() -> list[str]:
        return warm_start(network, source, "--init", family, target, lambda: read_head(weights, target))

    if "up" in names and "gate" not in names:
        with pytest.raises(RequestError, match=r"mlp.gate_proj.bias is missing"):
            start()
        return
    assert start() == []
    found = {name: tensor for name, tensor in network.trained_state().items() if name.endswith(".bias")}
    assert len(found) == 4 * ("q" in names) + 3 * ("up" in names)
    for name, tensor in found.items():
        assert torch.equal(tensor, biases.get(name, torch.zeros(len(tensor))))
    save_draft(network, tmp_path / "saved")
    assert load_draft(tmp_path / "saved").config == network.config


def test_training_goes_on_with_the_layers_of_an_object(base: Path, tmp_path: Path):
    """Whatever more the store holds."""
    source = write(tmp_path / "draft", PLAIN | {"eagle_config": {AUX: [0, 3, 6]}}, draft() | d2t())
    options = TrainOptions(tmp_path / "run", base, tmpdir=tmp_path, draft="eagle3", init=str(source))
    target, weights, family = load_config(base), Weights(base), DRAFT_FAMILIES["eagle3"]
    config = draft_config(options, target, {"hidden_state": H, "aux_0_1_3_6": 4 * H})
    assert config.extra[AUX] == [0, 3, 6]
    network = family.build(config, read_embedding(weights, target).float(), draft())
    assert warm_start(network, source, "--init", family, target, lambda: read_head(weights, target)) == []


def test_a_run_goes_on_without_the_draft_that_it_began_with(base: Path, tmp_path: Path):
    """In the network that its own checkpoint is of."""
    source = write(tmp_path / "draft", PLAIN | {AUX: [0, 3, 6], "rms_norm_eps": 1e-3}, draft() | d2t())
    target, weights, family = load_config(base), Weights(base), DRAFT_FAMILIES["eagle3"]

    def config() -> ModelConfig:
        options = TrainOptions(tmp_path / "run", base, tmpdir=tmp_path, draft="eagle3", init=str(source))
        return draft_config(options, target, {})

    first = config()
    save_draft(family.build(first, read_embedding(weights, target).float(), draft()), tmp_path / "run" / "state_2")
    shutil.rmtree(source)
    assert config() == first
    (tmp_path / "run" / "state_2").rename(tmp_path / "elsewhere")
    with pytest.raises(RequestError, match=r"--init .*there is no such folder"):
        config()


#: What is not read: config, tensors, what is said.
REFUSED: dict[str, tuple[dict, Callable[[], Tensors], str]] = {
    "no table": (PLAIN, draft, "d2t is missing"),
    "d2t as token ids": (PLAIN, lambda: draft() | {"d2t": IDS}, "d2t of .* holds token ids; expected offsets"),
    "d2t as token ids beside t2d": (PLAIN, lambda: draft() | {"d2t": IDS} | t2d(), "d2t holds token ids .t2d names"),
    "tables that differ": (
        PLAIN, lambda: draft() | d2t() | {"t2d": t2d()["t2d"].roll(1)}, "t2d and d2t .* name different tokens"
    ),
    "d2t of nothing": (PLAIN, lambda: draft() | {"d2t": d2t()["d2t"] - 5}, "leads to other than 150 ascending tokens"),
    "no head": (PLAIN, lambda: without(draft() | d2t(), "lm_head.weight"), "lm_head.weight is missing"),
    "a whole head and a small vocabulary": (PLAIN, lambda: draft(drafted=V) | d2t(), r"lm_head.weight is \[424, 32\]"),
    "norm_output": (PLAIN | {"norm_output": True}, lambda: draft() | d2t(), "says norm_output, which is not read"),
    "norm_before_fc": (
        PLAIN | {"eagle_config": {"norm_before_fc": True}}, lambda: draft() | d2t(), "says norm_before_fc, which"
    ),
    "one feature": (
        PLAIN | {"eagle_config": {"use_aux_hidden_state": False}}, lambda: draft() | d2t(), "use_aux_hidden_state false"
    ),
    "fc_norm": (PLAIN, lambda: draft() | d2t() | {"fc_norm.0.weight": torch.ones(H)}, "has norms before fc"),
    "a wider target": (PLAIN | {"target_hidden_size": 64}, lambda: draft() | d2t(), "target_hidden_size 64 beside"),
    "scaled logits": (PLAIN | {"logit_scale": 0.5}, lambda: draft() | d2t(), "logit_scale 0.5, which is not read"),
    "two layers": (
        PLAIN | {"num_hidden_layers": 2},
        lambda: draft() | d2t() | {"layers.1.mlp.up_proj.weight": torch.ones(64, H)}, "has several layers",
    ),
    "Qwen3's layer": (
        PLAIN, lambda: draft() | d2t() | {"midlayer.self_attn.q_norm.weight": torch.ones(8)}, "norms of queries and key"
    ),
    "Qwen3's config": (
        PLAIN | {"architectures": ["Eagle3Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 8},
        lambda: draft() | d2t(), "its model_type is 'qwen3', and an EAGLE-3 draft is a Llama layer here",
    ),
    "quantized": (PLAIN, lambda: draft() | d2t() | {"fc.weight_scale": torch.ones(1)}, "has quantized weights"),
    "a trained fc.bias": (PLAIN, lambda: draft() | d2t() | {"fc.bias": torch.ones(H)}, "has a trained fc.bias"),
    "another vocabulary": (PLAIN | {"vocab_size": D}, lambda: draft() | d2t(), "vocab_size is 150, the base model"),
    "another width": (PLAIN | {"hidden_size": 64}, lambda: draft() | d2t(), "hidden_size is 64, the base model"),
    "layers out of range": (PLAIN | {AUX: [2, 3, 7]}, lambda: draft() | d2t(), "there is no 7"),
    "layers as words": (PLAIN | {AUX: "2,3,4"}, lambda: draft() | d2t(), "is '2,3,4', expected a list of layers"),
    "layers unsorted": (PLAIN | {AUX: [4, 2, 3]}, lambda: draft() | d2t(), "once, in ascending order.*: 2,3,4"),
    "two layers' fc": (PLAIN | {AUX: [2, 3]}, lambda: draft() | d2t(), r"fc.weight is \[32, 96\], expected \[32, 64\]"),
    "no norm": (PLAIN, lambda: without(draft() | d2t(), "norm.weight"), "norm.weight is missing"),
    "single-width q": (
        PLAIN, lambda: draft() | d2t() | {"midlayer.self_attn.q_proj.weight": torch.ones(32, H)},
        r"q_proj.weight is \[32, 32\], expected \[32, 64\]",
    ),
    "an embedding of its own": (
        PLAIN, lambda: draft() | d2t() | {"embed_tokens.weight": torch.randn(V, H)}, "brings an embedding of its own"
    ),
}  # fmt: skip


@pytest.mark.parametrize("brought", REFUSED)
def test_it_is_refused_by_what_it_is(base: Path, tmp_path: Path, brought: str):
    config, make, says = REFUSED[brought]
    source = write(tmp_path / "draft", config, make())
    with pytest.raises(RequestError, match=says) as raised:
        export(base, source, tmp_path / "out", "both")
    assert str(source) in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_the_targets_own_embedding_may_come_along(base: Path, tmp_path: Path):
    """Rounded, as a draft in another dtype has it."""
    embedding = read_embedding(Weights(base), load_config(base)).bfloat16()
    source = write(tmp_path / "draft", PLAIN, draft() | d2t() | {"embed_tokens.weight": embedding})
    assert "embed_tokens.weight" not in read(export(base, source, tmp_path / "out", "plain")["plain"])[1]


def test_too_few_layers_for_what_vllm_would_read(tmp_path: Path):
    base = make_target(tmp_path / "base", layers=4)
    source = write(tmp_path / "draft", PLAIN, draft() | d2t())
    with pytest.raises(RequestError, match=f"has no {AUX}, and the base model has 4 layers, too few"):
        export(base, source, tmp_path / "out", "plain")
