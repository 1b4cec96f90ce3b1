"""What people bring as a base model: used rightly, or refused by name by every command before anything is claimed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from eagle.decode import evaluate as evaluation
from eagle.drafts.saved import save_draft
from eagle.generate import main as allocation
from eagle.store.reader import FeatureStore
from eagle.target.identity import Identity
from eagle.target.trunk import from_pretrained_dtype
from eagle.target.weights import Weights
from eagle.train import main as train
from eagle.vllm import convert, verify
from tests.e2e.commands import ask, command, inside
from tests.e2e.conftest import draft_of
from tests.e2e.test_requests import check, snapshot
from tests.tiny import (
    VOCAB,
    byte_level_tokenizer,
    keep_only_tokenizer_model,
    make_target,
    sentencepiece_model,
    write_sharegpt,
)

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 13476839424\n"
#: Of a model whose every tensor lies where the name says.
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def edit(folder: Path, file: str = "config.json", **changes: object) -> None:
    path = folder / file
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | changes))


def retensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a folder that has one safetensors file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path) -> Path:
    """Make two shards with an index of a folder that has one safetensors file."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(2):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        own = sorted(tensors)[number::2]
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def remap(folder: Path, name: str, file: str | None) -> None:
    """Let the index say that a tensor is in another file."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][name] = file or next(f for f in index["weight_map"].values() if f != index["weight_map"][name])
    path.write_text(json.dumps(index))


def adapter(folder: Path) -> None:
    edit(folder, "adapter_config.json", peft_type="LORA", base_model_name_or_path="org/base-7b")


def only_adapter(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    adapter(folder)


def cut(folder: Path, file: str) -> None:
    path = folder / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without(*parts: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if any(part in name for part in parts)]


def as_dtype(dtype: torch.dtype, part: str = "_proj.weight") -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items() if part in n})


def pack(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        stem = name.removesuffix("weight")
        tensors.pop(name)
        tensors |= {f"{stem}qweight": torch.ones(4, 4, dtype=torch.int32), f"{stem}scales": torch.ones(4)}


def linear(folder: Path) -> None:
    retensor(folder, lambda t: t.update({f"{Q_PROJ}_scale": torch.ones(1)}))


#: What is brought: how it comes about from a good Llama (one safetensors file, untied), and what every command says.
REFUSED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a quantized model by quantization_config": (
        lambda f: edit(f, quantization_config={"quant_method": "awq", "bits": 4}),
        ["quantized model (awq)", "unquantized model it was made from"],
    ),
    "a quantized model by compression_config": (
        lambda f: edit(f, compression_config={"format": "pack-quantized"}),
        ["quantized model (pack-quantized)", "unquantized"],
    ),
    "a quantized model by hf_quant_config.json": (
        lambda f: edit(f, "hf_quant_config.json", quantization={"quant_algo": "FP8"}),
        ["hf_quant_config.json", "quantized model", "unquantized"],
    ),
    "a quantized model by qweight tensors": (
        lambda f: retensor(f, pack),
        ["quantized model", "_proj.scales", "unquantized"],
    ),
    "a quantized model by a weight_scale tensor": (linear, ["quantized model", f"{Q_PROJ}_scale", "unquantized"]),
    "a quantized model by int8 weights": (
        lambda f: retensor(f, as_dtype(torch.int8)),
        ["quantized model", "k_proj.weight (I8)", "unquantized"],
    ),
    "a quantized model by float8 weights": (
        lambda f: retensor(f, as_dtype(torch.float8_e4m3fn)),
        ["quantized model", "(F8_E4M3)", "unquantized"],
    ),
    "weights that are whole numbers": (
        lambda f: retensor(f, as_dtype(torch.int64, "norm")),
        ["model.layers.0.input_layernorm.weight (I64)", "expected floating-point weights"],
    ),
    "a LoRA adapter without weights": (
        only_adapter,
        ["is a LoRA adapter, not a model", "made for org/base-7b", "merge_and_unload()"],
    ),
    "a LoRA adapter beside weights": (adapter, ["holds a LoRA adapter beside its weights", "move adapter_config.json"]),
    "LoRA tensors among the weights": (
        lambda f: retensor(f, lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 2)})),
        ["LoRA adapter that is not merged", "q_proj.lora_A.weight"],
    ),
    "an unknown rope type": (
        lambda f: edit(f, rope_scaling={"rope_type": "mrope", "mrope_section": [2, 3]}, rope_parameters=None),
        ["rope type 'mrope' is not known", "default, linear, dynamic, yarn, longrope, llama3"],
    ),
    "a rope without its factor": (
        lambda f: edit(f, rope_scaling={"type": "yarn"}, rope_parameters=None),
        ["rope of type 'yarn' has no factor"],
    ),
    "code of its own by auto_map": (
        lambda f: edit(f, auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}),
        ["code of its own (auto_map: modeling_own.OwnForCausalLM)", "not run here"],
    ),
    "weights elsewhere by transformers_weights": (
        lambda f: edit(f, transformers_weights="other.safetensors"),
        ["transformers_weights names other.safetensors"],
    ),
    "weights without a layer's tensor": (
        lambda f: retensor(f, without("layers.1.mlp.up_proj")),
        ["no model.layers.1.mlp.up_proj.weight among its weights", "The download is incomplete"],
    ),
    "weights without many tensors": (
        lambda f: retensor(f, without("layers.1.")),
        ["no model.layers.1.", "and 5 more among its weights"],
    ),
    "weights without a head": (
        lambda f: retensor(f, without("lm_head")),
        ["no lm_head.weight among its weights", "tie_word_embeddings is false"],
    ),
    "weights saved without their head and prefix": (
        lambda f: retensor(f, lambda t: [t.update({n.removeprefix("model."): t.pop(n)}) for n in list(t)]),
        ["saved without its head", "AutoModelForCausalLM"],
    ),
    "weights of another shape": (
        lambda f: edit(f, intermediate_size=96),
        ["model.layers.0.mlp.gate_proj.weight is [64, 32], config.json says [96, 32]", "not of the same model"],
    ),
    "a vocabulary of another size": (
        lambda f: edit(f, vocab_size=777),
        ["model.embed_tokens.weight is [424, 32], config.json says [777, 32]"],
    ),
    "a config of fewer layers": (
        lambda f: edit(f, num_hidden_layers=1),
        ["hold model.layers.1.", "(1 layers of", "the features would be another model's"],
    ),
    "biases that config.json does not name": (
        lambda f: retensor(f, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})),
        ["hold model.layers.0.self_attn.q_proj.bias", "Take the config.json that was published"],
    ),
    "an index whose shard lacks a tensor": (
        lambda f: remap(shard(f), Q_PROJ, None),
        [f"the weight index says that {Q_PROJ} is in model-0000", "does not hold it", "fetch the model again"],
    ),
    "an index that leads out of its folder": (
        lambda f: remap(shard(f), Q_PROJ, "../elsewhere/model.safetensors"),
        ["model.safetensors.index.json names '../elsewhere/model.safetensors'", "outside its folder"],
    ),
    "an index with an absolute path": (
        lambda f: remap(shard(f), Q_PROJ, "/etc/passwd"),
        ["names '/etc/passwd'", "outside its folder"],
    ),
    "an index that is no index": (
        lambda f: (shard(f), (f / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')),
        ["is not a weight index"],
    ),
    "a git-lfs pointer as weights": (
        lambda f: (f / "model.safetensors").write_text(LFS),
        ["model.safetensors is a git-lfs pointer", "git lfs pull"],
    ),
    "a git-lfs pointer as a shard": (
        lambda f: (shard(f) / "model-00002-of-00002.safetensors").write_text(LFS),
        ["model-00002-of-00002.safetensors is a git-lfs pointer", "git lfs pull"],
    ),
    "a shard cut short": (
        lambda f: cut(shard(f), "model-00001-of-00002.safetensors"),
        ["model-00001-of-00002.safetensors is not a whole safetensors file", "Fetch it again"],
    ),
    "a pickle cut short": (
        lambda f: (
            torch.save(load_file(f / "model.safetensors"), f / "pytorch_model.bin"),
            (f / "model.safetensors").unlink(),
            cut(f, "pytorch_model.bin"),
        ),
        ["pytorch_model.bin cannot be read as weights", "fetch it again"],
    ),
    "a trainer's checkpoint as a pickle": (
        lambda f: (
            torch.save({"model": load_file(f / "model.safetensors"), "step": 3}, f / "pytorch_model.bin"),
            (f / "model.safetensors").unlink(),
        ),
        ["holds other things than tensors by name (model, step)", "plain state dict"],
    ),
    "a draft": (
        lambda f: retensor(f, lambda t: t.update({"fc.weight": torch.ones(32, 64)})),
        ["its weights are a draft's", "Name the folder of the base model"],
    ),
}

#: What is wrong with a tokenizer is said by those who read one.
REFUSED_TOKENIZERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a git-lfs pointer as tokenizer.json": (
        lambda f: (f / "tokenizer.json").write_text(LFS),
        ["tokenizer.json is a git-lfs pointer", "git lfs pull"],
    ),
    "a git-lfs pointer as tokenizer.model": (
        lambda f: (keep_only_tokenizer_model(f) / "tokenizer.model").write_text(LFS),
        ["tokenizer.model is a git-lfs pointer"],
    ),
    "a tokenizer.json cut short": (
        lambda f: cut(f, "tokenizer.json"),
        ["tokenizer.json is no whole JSON file", "Fetch it again"],
    ),
    "a tokenizer.json of another library version": (
        lambda f: edit(f, "tokenizer.json", decoder={"type": "NotYetInvented"}),
        ["another version of the tokenizers library", "Update tokenizers"],
    ),
    "a tokenizer.model cut short": (
        lambda f: cut(keep_only_tokenizer_model(f), "tokenizer.model"),
        ["tokenizer.model is no whole sentencepiece model"],
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["its tokenizer cannot be loaded: there is none"]),
    "a tokenizer that is code": (
        lambda f: edit(
            f, "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]}
        ),
        ["it is code of its own", "Save a fast tokenizer"],
    ),
    "a tokenizer with more tokens than rows": (
        lambda f: (
            retensor(f, lambda t: t.update({n: t[n][:300].clone() for n in t if t[n].shape[0] == VOCAB + 24})),
            edit(f, vocab_size=300),
        ),
        ["its tokenizer numbers tokens up to", "the embedding has 300 rows", "not of the same model"],
    ),
    "a template whose tokens have no rows": (
        lambda f: add_token(f, "<|im_start|>", "{{'<|im_start|>' + messages[0]['content']}}"),
        ["the chat template writes <|im_start|> (424)", "only 424 rows", "another --chat_template"],
    ),
}


def add_token(folder: Path, token: str, template: str | None = None) -> None:
    """Add a token behind the last row of the embedding, as tokenizers that were extended without their model have."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append(
        {"id": VOCAB + 24, "content": token, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
    )  # fmt: skip
    # Numbers of added tokens follow on the vocabulary's, so that is filled up first.
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"unused{number}": number for number in range(len(vocabulary), VOCAB + 24)}
    path.write_text(json.dumps(content))
    if template:
        edit(folder, "tokenizer_config.json", chat_template=template)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in one safetensors file, untied, with its draft beside it."""
    folder = tmp_path_factory.mktemp("good")
    make_target(folder / "llama", seed=5)
    save_draft(draft_of(folder / "llama"), folder / "draft")
    write_sharegpt(folder / "data.json", RECORDS)
    inside(
        "allocation.py", "--outdir", folder / "store", "--model_name", folder / "llama", "--data_path",
        folder / "data.json", "--dtype", "float32",
    )  # fmt: skip
    (folder / "prompts.txt").write_text("What is the capital of France?\n")
    return folder


RECORDS = [
    {"id": f"r{number}", "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]}
    for number, (asked, said) in enumerate(
        [
            ("What is the capital of France?", "The capital of France is Paris, as everybody knows."),
            ("def add(a, b):", "return a + b, and print the sum of both."),
            ("hello", "hi there, how are you today?"),
        ]
    )
]


def requests(good: Path, base: Path, new: Path) -> dict[str, tuple[Callable, list[object]]]:
    """A good request of every command that takes a base model."""
    training = ["--basepath", base, "--tmpdir", good / "store", "--cpdir", new]
    return {
        "allocation": (
            allocation.main,
            ["--model_name", base, "--data_path", good / "data.json", "--outdir", new, "--dtype", "float32"],
        ),
        "train": (train.main, training),
        "dry run": (train.main, ["--dry_run", *training]),
        "convert": (convert.main, ["--base-path", base, "--draft-path", good / "draft", "--output-path", new]),
        "evaluate": (
            evaluation.main,
            ["--base-path", base, "--draft-path", good / "draft", "--prompts", good / "prompts.txt", "--output", new,
             "--max_new_tokens", 8, "--dtype", "float32"],
        ),
        "verify": (verify.main, ["--base-path", base, "--draft-path", good / "draft", "--output", new]),
    }  # fmt: skip


COMMANDS = ("allocation", "train", "dry run", "convert", "evaluate", "verify")


def is_refused(
    make: Callable[[Path], object], says: list[str], name: str, good: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """By that command: a good base model of which something was made that is not one."""
    base = Path(shutil.copytree(good / "llama", tmp_path / "base"))
    make(base)
    before = snapshot(tmp_path)
    main, words = requests(good, base, tmp_path / "new")[name]
    check(ask(main, capsys, *words), says)
    assert snapshot(tmp_path) == before, "nothing is claimed"


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("brought", REFUSED)
def test_refused_by_every_command(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], brought: str, name: str
) -> None:
    is_refused(*REFUSED[brought], name, good, tmp_path, capsys)


@pytest.mark.parametrize("name", ["allocation", "evaluate"])
@pytest.mark.parametrize("brought", REFUSED_TOKENIZERS)
def test_tokenizers_that_are_refused(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], brought: str, name: str
) -> None:
    is_refused(*REFUSED_TOKENIZERS[brought], name, good, tmp_path, capsys)


def test_a_dry_run_of_a_folder_with_nothing_but_its_config(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(good / "llama" / "config.json", base)
    main, words = requests(good, base, tmp_path / "new")["dry run"]
    answer = ask(main, capsys, *words)
    assert answer.code == 0
    assert "memory plan" in answer.out


def stale_bin(folder: Path) -> None:
    shard(folder)
    other = make_target(folder.parent / "other", seed=6)
    torch.save(load_file(other / "model.safetensors"), folder / "pytorch_model.bin")


def in_a_cache(folder: Path) -> None:
    """The form of the hub's cache: every file is a link out of the folder."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for file in list(shard(folder).iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(blobs / file.name)


def buffers(tensors: dict[str, torch.Tensor]) -> None:
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)


def byte_level(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()
    byte_level_tokenizer().save_pretrained(folder)
    edit(folder, "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")


#: What is brought, and used: how it comes about from the same Llama.
ACCEPTED: dict[str, Callable[[Path], object]] = {
    "one safetensors file": lambda f: None,
    "two shards": shard,
    "a stale pytorch_model.bin beside shards": stale_bin,
    "links of the hub's cache": in_a_cache,
    "a pickle": lambda f: (
        torch.save(load_file(f / "model.safetensors"), f / "pytorch_model.bin"),
        (f / "model.safetensors").unlink(),
    ),
    "rotary buffers of old conversions": lambda f: retensor(f, buffers),
    "a value head beside the trunk": lambda f: retensor(
        f, lambda t: t.update({"v_head.summary.weight": torch.ones(1)})
    ),
    "quantization_config null": lambda f: edit(f, quantization_config=None, rope_scaling=None),
}


@pytest.mark.parametrize("brought", ACCEPTED)
def test_features_and_fingerprint_are_those_of_the_model(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], brought: str
) -> None:
    base = Path(shutil.copytree(good / "llama", tmp_path / "base"))
    ACCEPTED[brought](base)
    main, words = requests(good, base, tmp_path / "new")["allocation"]
    answer = ask(main, capsys, *words)
    assert answer.code == 0, answer.err
    expected, found = FeatureStore(good / "store"), FeatureStore(tmp_path / "new")
    assert len(found) == len(RECORDS)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.input_ids, theirs.input_ids)
        torch.testing.assert_close(ours.hidden_state, theirs.hidden_state)
    fingerprints = [json.loads((s / "manifest.json").read_text())["target"]["fingerprint"]
                    for s in (tmp_path / "new", good / "store")]  # fmt: skip
    assert fingerprints[0] == fingerprints[1]
    # Trunk, head and fingerprint are of one model: a draft may train on the other folder's store.
    main, words = requests(good, base, tmp_path / "run")["train"]
    answer = ask(main, capsys, *words, "--max_steps", 1, "--val_ratio", 0)
    assert answer.code == 0, answer.err


def test_features_are_those_of_transformers(good: Path) -> None:
    model = AutoModel.from_pretrained(good / "llama", **from_pretrained_dtype(torch.float32)).eval()
    for record in FeatureStore(good / "store"):
        with torch.no_grad():
            expected = model(record.input_ids[None].long()).last_hidden_state[0]
        torch.testing.assert_close(record.hidden_state, expected, rtol=1e-4, atol=1e-5)


def test_a_layer_changed_is_another_model(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tensor that the fingerprint of version 0.1 did not look at."""
    base = Path(shutil.copytree(good / "llama", tmp_path / "base"))
    retensor(base, lambda t: t[Q_PROJ].mul_(1.5))
    main, words = requests(good, base, tmp_path / "new")["train"]
    check(ask(main, capsys, *words), ["holds features of", "is another model"])


def test_tokenizer_model_alone(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tokens are sentencepiece's own: of the replies to the token, of what the template makes by its text."""
    import sentencepiece

    base = keep_only_tokenizer_model(Path(shutil.copytree(good / "llama", tmp_path / "base")))
    main, words = requests(good, base, tmp_path / "new")["allocation"]
    answer = ask(main, capsys, *words, "--chat_template", "vicuna")
    assert answer.code == 0, answer.err
    own = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    store = FeatureStore(tmp_path / "new")
    assert len(store) == len(RECORDS)
    for record, brought in zip(store, RECORDS, strict=True):
        asked, said = (turn["value"] for turn in brought["conversations"])
        assert record.input_ids[0] == own.bos_id()
        end = record.input_ids.tolist().index(own.eos_id())
        text = own.decode(record.input_ids[1:end].tolist())
        assert text.endswith(f"USER: {asked} ASSISTANT: {said}")
        trained = record.input_ids[record.loss_mask.bool()].tolist()
        # The space before the reply too, where it is a token of its own: no prompt has it.
        assert trained == [*own.encode(said), own.eos_id()]


def test_a_byte_level_tokenizer_that_calls_itself_llamas(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As some Llama-3 models have it: the tokens are those of tokenizer.json, whatever transformers makes of it."""
    from tokenizers import Tokenizer

    base = Path(shutil.copytree(good / "llama", tmp_path / "base"))
    byte_level(base)
    main, words = requests(good, base, tmp_path / "new")["allocation"]
    answer = ask(main, capsys, *words, "--chat_template", "chatml")
    assert answer.code == 0, answer.err
    own = Tokenizer.from_file(str(base / "tokenizer.json"))
    for record, brought in zip(FeatureStore(tmp_path / "new"), RECORDS, strict=True):
        asked, said = (turn["value"] for turn in brought["conversations"])
        text = own.decode(record.input_ids.tolist(), skip_special_tokens=False)
        assert f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{said}<|im_end|>" in text
        trained = record.input_ids[record.loss_mask.bool()].tolist()
        assert own.decode(trained, skip_special_tokens=False) == f"{said}<|im_end|>"


def test_a_padding_token_without_a_row_costs_only_who_spells_it_out(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(shutil.copytree(good / "llama", tmp_path / "base"))
    add_token(base, "<pad>")
    spelled = {"conversations": [{"from": "human", "value": "what is <pad>?"}, {"from": "gpt", "value": "A token."}]}
    data = write_sharegpt(tmp_path / "data.json", [*RECORDS, spelled])
    main, words = requests(good, base, tmp_path / "new")["allocation"]
    at = words.index("--data_path") + 1
    answer = ask(main, capsys, *words[:at], data, *words[at + 1 :])
    assert answer.code == 0, answer.err
    assert "the embedding has no row for <pad>" in answer.out
    assert "dropped       1  a token in it has no row in the base model's embedding" in answer.out
    store = FeatureStore(tmp_path / "new")
    assert [record.conversation for record in store] == [0, 1, 2]
    assert max(int(record.input_ids.max()) for record in store) < VOCAB + 24


def test_the_command_itself_exits_with_2(good: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(good / "llama", tmp_path / "base"))
    retensor(base, as_dtype(torch.float8_e4m3fn))
    answer = command(
        "allocation.py", "--model_name", base, "--data_path", good / "data.json", "--outdir", tmp_path / "new", code=2
    )
    assert "quantized model" in answer.error
    assert not (tmp_path / "new").exists()


def test_the_fingerprint_named_is_the_current_one(good: Path) -> None:
    manifest = json.loads((good / "store" / "manifest.json").read_text())
    assert manifest["target"]["fingerprint"] == Identity(good / "llama", Weights(good / "llama")).current
