"""Step 5: both layouts, every rule of the self-check, drafts made elsewhere, and that inputs stay as they are."""

from __future__ import annotations

import json
import shlex
import shutil
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle.drafts.families import DRAFT_FAMILIES
from eagle.drafts.saved import load_draft
from eagle.entry import run
from eagle.errors import RequestError, WorkError
from eagle.target.config import load_config
from eagle.target.weights import Weights, fingerprint, read_embedding, read_head
from eagle.vllm import convert
from eagle.vllm.export import choose_layouts, export
from eagle.vllm.note import note_with_acceptance
from tests.oracle import Shape
from tests.oracle3 import write_oracle
from tests.tiny import make_target
from tests.unit.exports import hashes, make_draft, read

LAYER = {
    "layers.0.self_attn.q_proj.weight",
    "layers.0.self_attn.k_proj.weight",
    "layers.0.self_attn.v_proj.weight",
    "layers.0.self_attn.o_proj.weight",
    "layers.0.mlp.gate_proj.weight",
    "layers.0.mlp.up_proj.weight",
    "layers.0.mlp.down_proj.weight",
    "layers.0.post_attention_layernorm.weight",
    "fc.weight",
}
BIASES = {f"layers.0.self_attn.{name}_proj.bias" for name in "qkv"}


@pytest.fixture(scope="module", params=["llama", "llama-tied", "qwen2", "qwen2-tied"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base model and a draft of it."""
    family, _, tied = request.param.partition("-")
    root = tmp_path_factory.mktemp(request.param)
    base = make_target(root / "base", family, tied=bool(tied))
    return base, make_draft(root / "draft", base)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("qwen")
    base = make_target(root / "base", "qwen2")
    return base, make_draft(root / "draft", base)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("llama")
    base = make_target(root / "base")
    return base, make_draft(root / "draft", base)


def expected_layer(base: Path) -> set[str]:
    return LAYER | BIASES if load_config(base).family == "qwen2" else LAYER


# --- the layouts


def test_v1_is_a_plain_llama_with_the_layer_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, draft = pair
    folder = export(base, draft, tmp_path / "out", "v1")["v1"]
    config, tensors = read(folder)
    target = load_config(base)
    assert set(tensors) == expected_layer(base)
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert config["num_hidden_layers"] == 1
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == target.rope_theta
    assert config.get("qkv_bias", False) is (target.family == "qwen2")
    assert config["tie_word_embeddings"] is False
    assert "layer_types" not in config
    for key in ("max_position_embeddings", "rms_norm_eps", "head_dim", "bos_token_id", "eos_token_id", "vocab_size"):
        assert config[key] == getattr(target, key), key


def test_v0_is_nested_with_the_targets_embedding_and_head(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, draft = pair
    folder = export(base, draft, tmp_path / "out", "v0")["v0"]
    config, tensors = read(folder)
    target, weights = load_config(base), Weights(base)
    assert set(tensors) == expected_layer(base) | {"embed_tokens.weight", "lm_head.weight"}
    assert (config["model_type"], config["architectures"]) == ("eagle", ["EAGLEModel"])
    assert set(config) == {"model_type", "architectures", "model", "torch_dtype"}
    assert config["model"]["model_type"] == target.family
    assert config["model"]["num_hidden_layers"] == 1
    assert torch.equal(tensors["lm_head.weight"], read_head(weights, target))
    assert torch.equal(tensors["embed_tokens.weight"], read_embedding(weights, target))


@pytest.mark.parametrize("layout", ["v1", "v0"])
def test_the_tensors_are_the_drafts_own_in_the_targets_dtype(
    pair: tuple[Path, Path], tmp_path: Path, layout: str
) -> None:
    base, draft = pair
    folder = export(base, draft, tmp_path / "out", layout)[layout]
    trained = load_file(draft / "model.safetensors")
    dtype = read_embedding(Weights(base), load_config(base)).dtype
    for name in expected_layer(base):
        tensor = read(folder)[1][name]
        assert tensor.dtype == dtype
        assert torch.equal(tensor, trained[name].to(dtype)), name


@pytest.mark.parametrize("layout", ["v1", "v0"])
def test_an_export_loads_as_the_same_draft(pair: tuple[Path, Path], tmp_path: Path, layout: str) -> None:
    base, draft = pair
    embedding = read_embedding(Weights(base), load_config(base))
    again = load_draft(export(base, draft, tmp_path / "out", layout)[layout], embedding)
    tokens, features = torch.randint(0, 400, (1, 9)), torch.randn(1, 9, 32)
    with torch.inference_mode():
        assert torch.equal(again(tokens, features), load_draft(draft)(tokens, features))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_follows_the_base_model(tmp_path: Path, dtype: str) -> None:
    base = make_target(tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"torch_dtype": dtype}
    config.pop("dtype", None)
    (base / "config.json").write_text(json.dumps(config))
    folder = export(base, make_draft(tmp_path / "draft", base), tmp_path / "out", "v1")["v1"]
    config, tensors = read(folder)
    assert config["torch_dtype"] == dtype
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.8.5", ("v0",)),
        ("0.8.5.post1+cpu", ("v0",)),
        ("0.9.0", ("v1",)),
        ("0.11.0rc2", ("v1",)),
        ("0.32.0", ("v1",)),
        ("1.0.0", ("v1",)),
        ("dev", ("v1", "v0")),
        ("0.1.dev1+g1a2b3c", ("v1", "v0")),
        (None, ("v1", "v0")),
    ],
)
def test_auto_follows_the_installed_vllm(
    monkeypatch: pytest.MonkeyPatch, version: str | None, expected: tuple[str, ...]
) -> None:
    def installed(name: str) -> str:
        if name != "vllm" or version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", installed)
    layouts = DRAFT_FAMILIES["eagle1"].layouts
    assert choose_layouts(layouts, "auto") == expected
    assert choose_layouts(layouts, "both") == ("v1", "v0")
    assert choose_layouts(layouts, "v0") == ("v0",)


def test_both_layouts_go_into_subfolders_beside_the_draft(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = llama
    draft = make_draft(tmp_path / "run", base)
    folders = export(base, draft, layout="both")
    assert folders == {name: tmp_path / "run-vllm" / name for name in ("v1", "v0")}


def test_a_drafts_own_rope_and_eps_are_kept_and_said(
    llama: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was trained with them; vLLM takes them from its folder."""
    base, draft = llama
    config, tensors = read(draft)
    other = tmp_path / "other"
    other.mkdir()
    scaling = {"rope_type": "linear", "factor": 2.0}
    own = {"rope_theta": 123.0, "rope_scaling": scaling, "rms_norm_eps": 1e-3}
    config["rope_parameters"] = {**scaling, "rope_theta": 123.0}
    (other / "config.json").write_text(json.dumps(config | own))
    save_file(tensors, other / "model.safetensors")
    written, _ = read(export(base, other, tmp_path / "out", "v1")["v1"])
    assert {key: written[key] for key in own} == own and written["rope_parameters"]["rope_theta"] == 123.0
    said = capsys.readouterr().out
    for name in own:
        assert f"note: the draft's {name} is" in said
    export(base, draft, tmp_path / "same", "v1")
    assert "note" not in capsys.readouterr().out


# --- a bias on fc


def with_fc_bias(draft: Path, folder: Path, value: float) -> Path:
    config, tensors = read(draft)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors | {"fc.bias": torch.full((32,), value)}, folder / "model.safetensors")
    return folder


def test_a_trained_fc_bias_is_refused_in_v1(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, draft = llama
    biased = with_fc_bias(draft, tmp_path / "biased", 0.5)
    with pytest.raises(RequestError, match=r"trained fc\.bias.*--layout v0"):
        export(base, biased, tmp_path / "out", "v1")
    assert not (tmp_path / "out").exists()


def test_a_trained_fc_bias_is_declared_in_v0(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, draft = llama
    biased = with_fc_bias(draft, tmp_path / "biased", 0.5)
    config, tensors = read(export(base, biased, tmp_path / "out", "v0")["v0"])
    assert config["eagle_fc_bias"] is True
    assert tensors["fc.bias"].tolist() == [0.5] * 32


def test_a_zero_fc_bias_is_dropped_in_v1(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, draft = llama
    biased = with_fc_bias(draft, tmp_path / "biased", 0.0)
    assert "fc.bias" not in read(export(base, biased, tmp_path / "out", "v1")["v1"])[1]


def test_both_with_a_trained_fc_bias_gives_v0_and_says_so(
    llama: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, draft = llama
    folders = export(base, with_fc_bias(draft, tmp_path / "biased", 0.5), tmp_path / "out", "both")
    assert set(folders) == {"v0"}
    assert "not written, v1" in capsys.readouterr().out


# --- drafts and base models made elsewhere


@pytest.mark.parametrize("given", [False, True], ids=["file-found", "file-given"])
@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_public_drafts_convert(qwen: tuple[Path, Path], tmp_path: Path, suffix: str, prefix: str, given: bool) -> None:
    """Some carry rotary buffers, some the lm_head, some a prefix."""
    base, draft = qwen
    config, tensors = read(draft)
    head = read_head(Weights(base), load_config(base))
    foreign = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    foreign |= {f"{prefix}layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": head.clone()}
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    name = ("draft." if given else "pytorch_model." if suffix == "bin" else "model.") + suffix
    torch.save(foreign, folder / name) if suffix == "bin" else save_file(foreign, folder / name)
    weight_name = name if given else None
    for layout in ("v1", "v0"):
        converted = export(base, folder, tmp_path / layout, layout, draft_weight_name=weight_name)[layout]
        ours = export(base, draft, tmp_path / f"{layout}-ours", layout)[layout]
        assert hashes(converted)["model.safetensors"] == hashes(ours)["model.safetensors"]
        assert read(converted)[0] == read(ours)[0]


@pytest.mark.parametrize("shards", ["1GB", "50KB"], ids=["one-file", "sharded"])
@pytest.mark.parametrize("layout", ["bin", "safetensors"])
@pytest.mark.parametrize("given", [False, True], ids=["file-found", "file-given"])
def test_base_models_in_every_file_layout(tmp_path: Path, layout: str, shards: str, given: bool) -> None:
    base = make_target(tmp_path / "base", layout=layout, max_shard_size=shards)
    names = sorted(path.name for path in base.iterdir())
    name = next(n for n in names if n.endswith((".index.json", ".bin", ".safetensors")) and "-of-" not in n)
    assert name.endswith(".index.json") is (shards == "50KB")
    draft = make_draft(tmp_path / "draft", base)
    folder = export(base, draft, tmp_path / "out", "v0", base_weight_name=name if given else None)["v0"]
    assert torch.equal(read(folder)[1]["lm_head.weight"], read_head(Weights(base), load_config(base)))


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_any_part_of_the_base_model_may_be_named(tmp_path: Path, suffix: str) -> None:
    """As the guide's example names the one that holds the lm_head."""
    base = make_target(tmp_path / "base", layout=suffix, max_shard_size="50KB")
    draft, parts = make_draft(tmp_path / "draft", base), sorted(base.glob(f"*-of-*.{suffix}"))
    whole = export(base, draft, tmp_path / "whole", "both")
    assert len(parts) > 1
    for part in parts:
        folders = export(base, draft, tmp_path / part.stem, "both", base_weight_name=part.name)
        assert {name: hashes(folder)["model.safetensors"] for name, folder in folders.items()} == {
            name: hashes(folder)["model.safetensors"] for name, folder in whole.items()
        }
    other = make_target(tmp_path / "other", layout=suffix, max_shard_size="50KB", seed=1)
    for part in parts:
        with pytest.raises(RequestError, match="embedding of its own, which is not the base model"):
            export(other, draft, tmp_path / "out", "v1", base_weight_name=part.name)


def test_a_file_name_that_is_not_there_is_answered_with_those_that_are(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    base, draft = llama
    with pytest.raises(FileNotFoundError, match=r"--draft-path.*pytorch_model.*model\.safetensors"):
        export(base, draft, tmp_path / "out", "v1", draft_weight_name="pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"--base-path.*nothing\.bin.*model\.safetensors"):
        export(base, draft, tmp_path / "out", "v1", base_weight_name="nothing.bin")


def test_a_draft_of_another_model_is_refused(llama: tuple[Path, Path], qwen: tuple[Path, Path], tmp_path: Path) -> None:
    other = make_target(tmp_path / "wider", hidden=64)
    with pytest.raises(RequestError, match="trained for another model"):
        export(other, llama[1], tmp_path / "out", "v1")
    config, tensors = read(llama[1])
    tensors.pop("embed_tokens.weight")
    tensors["layers.0.mlp.up_proj.weight"] = torch.zeros(3, 32)
    save_draft_as(tmp_path / "bent", config, tensors)
    with pytest.raises(RequestError, match=r"up_proj\.weight is \[3, 32\], expected \[64, 32\]"):
        export(llama[0], tmp_path / "bent", tmp_path / "out", "v1")
    assert not (tmp_path / "out").exists()


def test_a_draft_trained_for_other_weights_of_the_same_shape_is_refused(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    base, draft = llama
    own = tmp_path / "draft"
    shutil.copytree(draft, own)
    (own / "state.json").write_text(json.dumps({"run": {"target": fingerprint(base)}, "metrics": {}}))
    export(base, own, tmp_path / "out", "v1")
    (own / "state.json").write_text(json.dumps({"run": {"target": "0" * 64}, "metrics": {}}))
    with pytest.raises(RequestError, match=r"trained for another model.*--allow-other-base"):
        export(base, own, tmp_path / "other", "v1")
    assert not (tmp_path / "other").exists()
    export(base, own, tmp_path / "other", "v1", allow_other_base=True)


@pytest.mark.parametrize("name", ["fc.weight", "layers.0.post_attention_layernorm.weight"])
def test_an_incomplete_draft_is_refused(llama: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    config, tensors = read(llama[1])
    tensors.pop(name)
    save_draft_as(tmp_path / "partial", config, tensors)
    with pytest.raises(RequestError, match=f"{name} is missing"):
        export(llama[0], tmp_path / "partial", tmp_path / "out", "v1")


def save_draft_as(folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


# --- safety, the note, the command


def test_a_full_output_folder_is_refused(llama: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    with pytest.raises(RequestError, match="not an empty folder"):
        export(*llama, tmp_path / "out", "v1")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


@pytest.mark.parametrize("link", [False, True])
def test_an_empty_output_folder_is_used(link: bool, llama: tuple[Path, Path], tmp_path: Path) -> None:
    """It is not replaced: it may be a link, or where something is mounted."""
    (tmp_path / "there").mkdir()
    output = tmp_path / "out" if link else tmp_path / "there"
    if link:
        output.symlink_to(tmp_path / "there")
    inode = output.stat().st_ino
    assert sorted(path.name for path in export(*llama, output, "v1")["v1"].iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert output.stat().st_ino == inode and output.is_symlink() == link
    assert {path.name for path in tmp_path.iterdir()} == {"there", output.name}


def test_an_empty_output_folder_is_empty_again_after_a_failure(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise WorkError("a rule does not hold")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr("eagle.vllm.export.check_export", fail)
    with pytest.raises(WorkError, match="a rule"):
        export(*llama, tmp_path / "out", "v1")
    assert list(tmp_path.rglob("*")) == [tmp_path / "out"]


def test_inputs_stay_as_they_are(pair: tuple[Path, Path], tmp_path: Path) -> None:
    before = [hashes(folder) for folder in pair]
    export(*pair, tmp_path / "out", "both")
    assert [hashes(folder) for folder in pair] == before


@pytest.mark.parametrize("layout", ["v1", "v0"])
def test_the_note_serves_the_real_paths(llama: tuple[Path, Path], tmp_path: Path, layout: str) -> None:
    base, draft = llama
    folder = export(base, draft, tmp_path / "out", layout)[layout]
    note = (folder / "README.md").read_text(encoding="utf-8")
    serve = next(line for line in note.splitlines() if "--speculative-config" in line).strip()
    config = json.loads(serve.partition("'")[2].rstrip("'"))
    assert config["model"] == str(folder.resolve())
    assert config.get("method") == ("eagle" if layout == "v1" else None)
    assert config["num_speculative_tokens"] == 3
    assert f"vllm serve {base.resolve()} \\" in note
    assert f'model="{base.resolve()}"' in note
    assert "Acceptance in vLLM: not measured yet." in note


@pytest.mark.parametrize("form", ["plain", "speculators"])
def test_the_note_of_an_eagle3_draft_serves_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Exported by relative paths; every path that is served by is a whole one."""
    pair = write_oracle(tmp_path, Shape())
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / export(Path("target"), Path("draft"), Path("out put"), form)[form]
    note = (folder / "README.md").read_text(encoding="utf-8")
    said = note[note.index("vllm serve") : note.index("\n\n", note.index("--speculative-config"))]
    commands = shlex.split(said[: said.rindex("'") + 1].replace("\\\n", " "))
    assert commands[:4] == ["vllm", "serve", str(pair.target.resolve()), "--speculative-config"]
    asked = {"method": "eagle3", "model": str(folder.resolve()), "num_speculative_tokens": 3}
    assert json.loads(commands[4]) == asked
    python = note[note.index("LLM(\n") : note.index("    print(llm")]
    options = {"model": str(pair.target.resolve()), "speculative_config": asked}
    assert eval(python, {"LLM": dict}) == options
    assert ("alone" in note) == (form == "speculators")
    if form == "speculators":
        line = next(line for line in note.splitlines() if "alone" in line)
        assert shlex.split(line[line.index("vllm serve") : -1]) == ["vllm", "serve", str(folder.resolve())]
        served = read(folder)[0]["speculators_config"]
        assert served["verifier"]["name_or_path"] == str(pair.target.resolve())
        assert served["proposal_methods"][0]["speculative_tokens"] == asked["num_speculative_tokens"]


def test_a_measured_acceptance_takes_its_place_in_the_note_again_and_again(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    note = (export(*llama, tmp_path / "out", "v1")["v1"] / "README.md").read_text(encoding="utf-8")
    first = note_with_acceptance(note, r"τ 2.00 \1 (now).")
    assert first == note.replace("not measured yet.", r"τ 2.00 \1 (now).")
    assert note_with_acceptance(first, "not measured yet.") == note
    assert note_with_acceptance("# Mine\n", "τ 2.") == "# Mine\n\nAcceptance in vLLM: τ 2.\n"


def test_the_documented_command(qwen: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, draft = qwen
    arguments = ["--base-path", base, "--draft-path", draft, "--base-weight-name", "model.safetensors"]
    arguments += ["--draft-weight-name", "model.safetensors", "--output-path", tmp_path / "out", "--layout", "both"]
    assert run(lambda: convert.main([str(argument) for argument in arguments])) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2
    assert all("checked" in line for line in shown)
    assert run(lambda: convert.main([str(argument) for argument in arguments])) == 2
    assert f"--output-path {tmp_path / 'out'} exists" in capsys.readouterr().err.replace("\n", " ")
