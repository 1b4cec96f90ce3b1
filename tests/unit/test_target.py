"""Targets in every file layout people have."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from eagle import dtypes
from eagle.dtypes import parse_dtype
from eagle.errors import RequestError
from eagle.releases import release
from eagle.target import trunk as trunks
from eagle.target.config import load_config
from eagle.target.trunk import load_trunk
from eagle.target.weights import Weights, fingerprint, read_embedding, read_head
from tests.tiny import make_target

LAYOUTS = {
    "one safetensors": {"layout": "safetensors"},
    "sharded safetensors": {"layout": "safetensors", "max_shard_size": "40KB"},
    "one bin": {"layout": "bin"},
    "sharded bin": {"layout": "bin", "max_shard_size": "40KB"},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_embedding_and_head_whatever_the_layout(tmp_path, layout, family, tied):
    folder = make_target(tmp_path / "m", family, tied=tied, **LAYOUTS[layout])
    weights, config = Weights(folder), load_config(folder)
    assert len(weights.files()) == (1 if "one" in layout else len(list(folder.glob("*-of-*"))))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(read_embedding(weights, config), model.get_input_embeddings().weight)
    assert torch.equal(read_head(weights, config), model.get_output_embeddings().weight)
    assert torch.equal(read_head(weights, config), read_embedding(weights, config)) == tied


def test_fingerprint_is_of_the_model_not_of_its_files(tmp_path):
    prints = {fingerprint(make_target(tmp_path / str(i), **layout)) for i, layout in enumerate(LAYOUTS.values())}
    assert len(prints) == 1
    others = [
        fingerprint(make_target(tmp_path / "other weights", seed=1)),
        fingerprint(make_target(tmp_path / "other theta", rope_theta=5e5)),
    ]
    assert len(prints | set(others)) == 3


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_trunk_gives_the_feature_that_lm_head_reads(tmp_path, family):
    folder = make_target(tmp_path / "m", family)
    trunk = load_trunk(folder, torch.float32, torch.device("cpu"))
    assert not any(parameter.requires_grad for parameter in trunk.parameters())
    model, ids = AutoModelForCausalLM.from_pretrained(folder).eval(), torch.arange(3, 20)[None]
    with torch.no_grad():
        features = trunk(input_ids=ids).last_hidden_state
        head = read_head(Weights(folder), load_config(folder))
        torch.testing.assert_close(features @ head.T, model(ids).logits)


def test_missing_weights(tmp_path):
    folder = make_target(tmp_path / "m", layout="bin", max_shard_size="40KB")
    shard = next(folder.glob("*-of-*"))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        Weights(folder)
    for file in [*folder.glob("*.bin"), *folder.glob("*.index.json")]:
        file.unlink()
    with pytest.raises(FileNotFoundError, match="no weights found"):
        Weights(folder)
    with pytest.raises(FileNotFoundError, match=r"nope.bin does not exist"):
        Weights(folder, "nope.bin")


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_damaged_weights(tmp_path, layout):
    folder = make_target(tmp_path / "m", layout=layout)
    file = next(path for path in folder.iterdir() if path.name in ("model.safetensors", "pytorch_model.bin"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(RequestError, match=file.name):
        Weights(folder)["model.norm.weight"]


def test_untied_model_without_head(tmp_path):
    folder = make_target(tmp_path / "m", tied=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(RequestError, match=r"no lm_head.weight .* tie_word_embeddings is false"):
        read_head(Weights(folder), load_config(folder))


def test_config_of_another_model(tmp_path):
    folder = make_target(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 777}))
    with pytest.raises(RequestError, match=r"\[424, 32\].*\[777, 32\]"):
        read_embedding(Weights(folder), load_config(folder))


def test_dtype_names():
    assert parse_dtype("bf16") == parse_dtype("bfloat16") == torch.bfloat16
    with pytest.raises(RequestError, match="--dtype float8"):
        parse_dtype("float8")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_layers_spread_by_accelerate_give_the_same_features(tmp_path, family):
    """The dispatch of 70B-class targets over several cards, here over the memory of the CPU and the disk."""
    folder = make_target(tmp_path / "model", family, layers=4)
    ids, cpu = torch.arange(1, 25).reshape(2, 12), torch.device("cpu")
    whole = load_trunk(folder, torch.float32, cpu)
    size = sum(parameter.nbytes for parameter in whole.parameters())
    spread = load_trunk(
        folder, torch.float32, cpu, spread=True, memory={"cpu": size * 2 // 3}, offload_folder=tmp_path / "offload"
    )
    assert set(map(str, spread.hf_device_map.values())) == {"cpu", "disk"}
    with torch.inference_mode():
        expected, found = (trunk(input_ids=ids, use_cache=False).last_hidden_state for trunk in (whole, spread))
    assert torch.equal(found, expected)


def test_float16_on_a_cpu_is_refused_where_torch_has_no_products_of_it(tmp_path, monkeypatch):
    folder = make_target(tmp_path, "llama")
    monkeypatch.setattr(dtypes, "TORCH", (2, 1, 2))
    with pytest.raises(RequestError, match=r"float16 on a CPU needs torch 2\.2 or newer; .* bfloat16 or float32"):
        load_trunk(folder, torch.float16, torch.device("cpu"))


def test_torch_2_1_0_takes_the_eager_attention_and_gives_the_same_features(tmp_path, monkeypatch):
    """transformers refuses its own sdpa with that release."""
    folder, ids, cpu = make_target(tmp_path, "llama"), torch.arange(3, 40)[None], torch.device("cpu")
    usual = load_trunk(folder, torch.float32, cpu)
    monkeypatch.setattr(trunks, "TORCH", (2, 1, 0))
    eager = load_trunk(folder, torch.float32, cpu)
    assert eager.config._attn_implementation == "eager"
    with torch.inference_mode():
        wanted, found = (one(input_ids=ids).last_hidden_state for one in (usual, eager))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_transformers_that_refuses_torch_is_named_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_torch_available", lambda: False)
    with pytest.raises(RequestError, match=r"does not work with torch .* requirements-container-older\.txt"):
        load_trunk(make_target(tmp_path, "llama"), torch.float32, torch.device("cpu"))


def test_releases():
    assert release("2.1.0.post13") == (2, 1, 0) < (2, 1, 1)
    assert release("2.13.0+cpu") == (2, 13, 0) > (2, 2)
    assert release("2.6.0a0+git1234") == (2, 6, 0)


def test_a_target_too_large_for_its_cards_is_refused(tmp_path):
    folder = make_target(tmp_path / "model", layers=4)
    with pytest.raises(RequestError, match=r"does not fit on the cards that it was to use.*--used_npus 4 or 8"):
        load_trunk(folder, torch.float32, torch.device("cpu"), spread=True, memory={"cpu": 90_000})


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_target_is_read_into_the_card_and_never_moved_there_whole(tmp_path, monkeypatch, layout, tied):
    """The meta device plays the card: what is read into it is never all in host memory."""
    asked, moved = [], []
    from_pretrained = AutoModel.from_pretrained

    def watched(folder, **options):
        asked.append(options.get("device_map"))
        return from_pretrained(folder, **options)

    monkeypatch.setattr(AutoModel, "from_pretrained", watched)
    monkeypatch.setattr(PreTrainedModel, "to", lambda model, *args, **_: moved.append(next(model.parameters()).device))
    folder, card = make_target(tmp_path / "m", tied=tied, layout=layout, max_shard_size="40KB"), torch.device("meta")
    trunk = load_trunk(folder, torch.float32, card)
    assert asked == [{"": card}]
    assert torch.device("cpu") not in moved, "built on the CPU, and then moved"
    assert {parameter.device for parameter in trunk.parameters()} == {card}
    load_trunk(folder, torch.float32, torch.device("cpu"))
    assert asked[1] is None
