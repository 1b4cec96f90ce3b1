"""The check of a target from headers, and the fingerprint that covers every tensor."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from eagle.errors import RequestError
from eagle.target import tokenizer as tokenizers
from eagle.target import trunk as trunks
from eagle.target.check import check_target
from eagle.target.config import load_config, parse_config
from eagle.target.identity import Identity, spread
from eagle.target.refusals import ROPE_TYPES
from eagle.target.tokenizer import load_tokenizer, tokens_without_row
from eagle.target.trunk import expected_tensors, load_trunk, trunk_values
from eagle.target.weights import WEIGHT_FILES, Weights, fingerprint
from eagle.versions import transformers_release
from tests.tiny import VOCAB, keep_only_tokenizer_model, make_target, sentencepiece_model
from tests.unit.config_cases import PARAMETERS, base, skip_unless_known
from tests.unit.test_target import LAYOUTS

TARGETS = {
    "llama": {},
    "llama tied": {"tied": True},
    "llama biases": {"attention_bias": True, "mlp_bias": True},
    "llama own head_dim": {"head_dim": 12},
    "llama linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "llama dynamic rope": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    "qwen2": {"family": "qwen2"},
    "qwen2 tied": {"family": "qwen2", "tied": True},
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_good_targets_pass(tmp_path, target, layout):
    folder = make_target(tmp_path / "m", **TARGETS[target], **LAYOUTS[layout])
    checked = check_target(folder, "--model_name")
    assert checked.config == load_config(folder)
    assert checked.identity.current == Identity(folder, Weights(folder)).current


@pytest.mark.parametrize("target", TARGETS)
def test_expected_tensors_are_what_transformers_saves(tmp_path, target):
    folder = make_target(tmp_path / "m", **TARGETS[target])
    saved = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert expected_tensors(load_config(folder)) == saved


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"use_cache": "perhaps"}, "use_cache"),
        ({"attention_bias": None}, "attention_bias"),
        ({"dtype": "auto"}, "auto"),
    ],
)
def test_what_transformers_does_not_read_is_said_before_anything_begins(tmp_path, said, named):
    if transformers_release() < (5,):
        pytest.skip("transformers 4 takes these values")
    folder = make_target(tmp_path / "m")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | said))
    with pytest.raises(RequestError, match=rf"config\.json: transformers \S+ does not read it: .*{named}"):
        check_target(folder, "--model_name")


def test_what_changes_no_feature_may_be_odd(tmp_path):
    """A padding id behind the vocabulary, as Llama-2's with 32000 of 32000, and an empty quantization_config."""
    folder, ids = make_target(tmp_path / "m"), torch.arange(3, 20)[None]
    plain = load_trunk(folder, torch.float32, torch.device("cpu"))(input_ids=ids).last_hidden_state
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(raw | {"pad_token_id": raw["vocab_size"], "quantization_config": {}})
    )
    assert check_target(folder, "--model_name").config.quantization is None
    trunk = load_trunk(folder, torch.float32, torch.device("cpu"))
    assert torch.equal(trunk(input_ids=ids).last_hidden_state, plain)


def test_text_is_what_the_tokens_say(tmp_path):
    """A tokenizer_config.json may ask for spaces to be taken out before a full stop; vLLM takes out none."""
    folder = make_target(tmp_path / "m", "qwen2")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"clean_up_tokenization_spaces": True}))
    tokenizer = load_tokenizer(folder)
    text = "It does n't end . Does it ?"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_a_tokenizer_of_a_class_that_is_none_of_transformers(tmp_path, monkeypatch):
    """As mistral_common's in transformers 4.57: tokenizer.json says what it is."""
    folder = make_target(tmp_path / "m", "qwen2")
    expected = load_tokenizer(folder)("Hello, you.")["input_ids"]
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **more: object())
    assert load_tokenizer(folder)("Hello, you.")["input_ids"] == expected

    def missing(*args: object, **more: object) -> None:
        raise ValueError("No tokenizer file found in directory: m")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", missing)
    assert load_tokenizer(folder)("Hello, you.")["input_ids"] == expected


def test_a_tokenizer_that_a_newer_transformers_saved_is_named(tmp_path, monkeypatch):
    folder = make_target(tmp_path / "m", "qwen2")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"extra_special_tokens": ["<a>"]}))

    def fails(*args: object, **more: object) -> None:
        raise AttributeError("'list' object has no attribute 'keys'")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fails)
    monkeypatch.setattr(tokenizers, "transformers_release", lambda: (4, 57, 1))
    with pytest.raises(RequestError, match=r"Rename extra_special_tokens in tokenizer_config\.json"):
        load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["plain", "llama3", "linear"])
def test_both_generations_configs_give_the_same_features(tmp_path, kind):
    """Whichever transformers wrote the config, and whichever reads it."""
    scaling: dict = {
        "plain": {"rope_type": "default"},
        "linear": {"rope_type": "linear", "factor": 4.0},
        "llama3": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    }[kind]  # fmt: skip
    folder, ids = make_target(tmp_path / "m"), torch.arange(200)[None] % VOCAB
    raw = json.loads((folder / "config.json").read_text())
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        raw.pop(key, None)
    forms = {
        4: {"rope_theta": 5e5, "rope_scaling": None if kind == "plain" else scaling},
        5: {"rope_parameters": {**scaling, "rope_theta": 5e5}},
    }
    found = []
    for form in forms.values():
        (folder / "config.json").write_text(json.dumps(raw | form))
        with torch.no_grad():
            found.append(load_trunk(folder, torch.float32, torch.device("cpu"))(input_ids=ids).last_hidden_state)
    assert torch.equal(*found)
    (folder / "config.json").write_text(json.dumps(raw | {"rope_theta": 1e4}))
    with torch.no_grad():
        other = load_trunk(folder, torch.float32, torch.device("cpu"))(input_ids=ids).last_hidden_state
    assert not torch.allclose(found[0], other, atol=1e-2)


def test_a_yarn_that_an_old_transformers_computes_otherwise_is_refused(tmp_path, monkeypatch):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    folder = make_target(tmp_path / "m", max_position_embeddings=256)
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("rope_theta", None), raw.pop("rope_scaling", None)
    (folder / "config.json").write_text(json.dumps(raw | {"rope_parameters": yarn}))
    monkeypatch.setattr(trunks, "transformers_release", lambda: (4, 45, 2))
    with pytest.raises(RequestError, match=r"'yarn' over 64 original positions.*write max_position_embeddings 64"):
        check_target(folder, "--model_name")
    (folder / "config.json").write_text(json.dumps(raw | {"rope_parameters": yarn, "max_position_embeddings": 64}))
    check_target(folder, "--model_name")
    monkeypatch.setattr(trunks, "transformers_release", lambda: (4, 57))
    (folder / "config.json").write_text(json.dumps(raw | {"rope_parameters": yarn}))
    check_target(folder, "--model_name")


@pytest.mark.parametrize("name", PARAMETERS)
def test_expected_tensors_of_released_models_have_their_parameters(name):
    skip_unless_known(name)
    config = parse_config(base(name))
    total = sum(torch.Size(shape).numel() for shape in expected_tensors(config).values())
    assert total == PARAMETERS[name]
    head = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    assert trunk_values(config) == total - head


@pytest.mark.parametrize("kind", ROPE_TYPES)
def test_every_known_rope_is_parsed_and_has_tensors(kind):
    numbers = {key: 2.0 for key in ROPE_TYPES[kind]} | {"original_max_position_embeddings": 2048}
    numbers |= {key: [1.0] * 64 for key in ROPE_TYPES[kind] if key in ("short_factor", "long_factor")}
    config = parse_config({**base(), "num_hidden_layers": 1, "rope_scaling": {"rope_type": kind, **numbers}})
    assert len(expected_tensors(config)) == 12


def test_weight_files_are_taken_in_transformers_order(tmp_path):
    """Of every pair of layouts in one folder, trunk, head and fingerprint are those that transformers loads."""
    makers = dict(zip(WEIGHT_FILES, ("one safetensors", "sharded safetensors", "one bin", "sharded bin"), strict=True))
    folders = {file: make_target(tmp_path / str(i), seed=i, **LAYOUTS[layout])
               for i, (file, layout) in enumerate(makers.items())}  # fmt: skip
    for first in range(4):
        for second in range(first + 1, 4):
            both = tmp_path / f"{first}{second}"
            for file in (WEIGHT_FILES[second], WEIGHT_FILES[first]):
                shutil.copytree(folders[file], both, dirs_exist_ok=True)
            model = AutoModelForCausalLM.from_pretrained(both)
            weights, own = Weights(both), Weights(folders[WEIGHT_FILES[first]])
            for name in ("model.layers.1.mlp.down_proj.weight", "lm_head.weight"):
                assert torch.equal(weights[name], model.get_parameter(name)), (first, second)
            assert Identity(both, weights).current == Identity(folders[WEIGHT_FILES[first]], own).current


def test_the_fingerprint_is_of_the_model_not_of_its_files(tmp_path):
    folders = [make_target(tmp_path / str(i), **layout) for i, layout in enumerate(LAYOUTS.values())]
    assert len({Identity(folder, Weights(folder)).current for folder in folders}) == 1
    others = [
        make_target(tmp_path / "other theta", rope_theta=5e5),
        make_target(tmp_path / "other dtype"),
        make_target(tmp_path / "other weights", seed=1),
    ]
    tensors = load_file(others[1] / "model.safetensors")
    half = {n: t.bfloat16() for n, t in tensors.items()}
    save_file(half, others[1] / "model.safetensors", metadata={"format": "pt"})
    prints = [Identity(folder, Weights(folder)).current for folder in [folders[0], *others]]
    assert len(set(prints)) == 4


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_change_in_any_tensor_changes_the_fingerprint(tmp_path, family):
    folder = make_target(tmp_path / "m", family)
    before, tensors = Identity(folder, Weights(folder)).current, load_file(folder / "model.safetensors")
    assert set(tensors) == set(expected_tensors(load_config(folder)))
    for name, tensor in tensors.items():
        changed = tensors | {name: tensor * 1.01}
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        assert Identity(folder, Weights(folder)).current != before, name


def test_what_the_fingerprint_does_not_look_at(tmp_path):
    folder = make_target(tmp_path / "m", tied=True)
    before, tensors = Identity(folder, Weights(folder)).current, load_file(folder / "model.safetensors")
    tensors |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert Identity(folder, Weights(folder)).current == before


def test_stores_of_0_1_are_recognised(tmp_path):
    folder = make_target(tmp_path / "m")
    identity, old = Identity(folder, Weights(folder)), fingerprint(folder)
    assert identity.is_named(old) and identity.is_named(identity.current) and identity.is_named(None)
    assert identity.as_in(old) == old
    assert not identity.is_named("0" * 64)
    assert not identity.is_named("all-" + "0" * 64)


@pytest.mark.parametrize("size", [0, 1, 1024, 4096, 4097, 100_000, (16 << 20) * 4, (16 << 20) * 50 + 7])
def test_pieces_lie_in_the_tensor_and_reach_both_ends(size):
    pieces = spread(size)
    assert pieces[0][0] == 0
    assert sum(pieces[-1]) == size
    assert all(start + length <= size for start, length in pieces)
    assert sum(length for _, length in pieces) <= max(4, size // (16 << 20)) * 1024


def test_pieces_are_the_tensors_bytes_in_every_layout(tmp_path):
    found = []
    for i, layout in enumerate(LAYOUTS.values()):
        weights = Weights(make_target(tmp_path / str(i), **layout))
        whole = weights["model.embed_tokens.weight"].view(torch.uint8).numpy().tobytes()
        found.append(weights.pieces("model.embed_tokens.weight", [(0, 10), (1000, 100)]))
        assert found[-1] == [whole[:10], whole[1000:1100]]
        header = weights.header("model.embed_tokens.weight")
        assert (header.dtype, header.shape, header.size) == ("F32", (VOCAB + 24, 32), len(whole))
    assert all(pieces == found[0] for pieces in found)


def test_a_named_file_may_hold_a_part(tmp_path):
    folder = make_target(tmp_path / "m", max_shard_size="40KB")
    whole = check_target(folder, "--base-path")
    part = next(folder.glob("model-00001*"))
    checked = check_target(folder, "--base-path", part.name)
    assert checked.weights.names() == whole.weights.names() == sorted(expected_tensors(checked.config))
    assert checked.identity.current == whole.identity.current
    # One that transformers does not read is taken as it is.
    shutil.copy(part, folder / "own.safetensors")
    checked = check_target(folder, "--base-path", "own.safetensors")
    assert set(checked.weights.names()) < set(whole.weights.names())
    assert checked.identity.current == whole.identity.current


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["model-Q4_K_M.gguf"], "model-Q4_K_M.gguf is a GGUF file"),
        (["consolidated.00.pth"], "consolidated.00.pth is Meta's original form"),
        (["tf_model.h5.index.json"], "fetch the model in safetensors form"),
        (["weights.safetensors"], "give a single file the name model.safetensors"),
        (["training_args.bin"], "expected model.safetensors, pytorch_model.bin"),
    ],
)
def test_other_kinds_of_weights_are_named(tmp_path, files, says):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=f"no weights found.*{says}"):
        Weights(tmp_path)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_a_rope_that_is_no_object_is_refused(key):
    with pytest.raises(RequestError, match=f"{key} is 'linear'; expected an object"):
        parse_config({**base(), key: "linear"})


@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim", "max_position_embeddings"])
def test_an_optional_size_that_is_no_number_is_refused(key):
    with pytest.raises(RequestError, match=f"{key} is '8'; expected a whole number"):
        parse_config({**base(), key: "8"})


def test_a_tokenizer_model_alone_is_read(tmp_path):
    import sentencepiece

    folder = keep_only_tokenizer_model(make_target(tmp_path / "m"))
    tokenizer = load_tokenizer(folder)
    own = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    assert tokenizer.is_fast
    for text in ("hello world", "The capital of France is Paris.", "é 你好\n  x = 1"):
        assert tokenizer(text, add_special_tokens=False).input_ids == own.encode(text)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (own.bos_id(), own.eos_id())
    assert tokens_without_row(tokenizer, VOCAB) == {}
    assert set(tokens_without_row(tokenizer, VOCAB - 2).values()) == {VOCAB - 2, VOCAB - 1}


@pytest.mark.parametrize("name", ["tokenizer_class", "auto_map"])
def test_a_tokenizer_of_an_unknown_class_is_used_or_refused_in_words(tmp_path, name):
    folder = make_target(tmp_path / "m")
    path = folder / "tokenizer_config.json"
    extra = {"auto_map": {"AutoTokenizer": ["own.Own", None]}} if name == "auto_map" else {}
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "OwnTokenizer", **extra}))
    try:
        assert load_tokenizer(folder)("hello").input_ids
    except RequestError as error:
        assert "code of its own" in str(error) or "newer transformers" in str(error)
