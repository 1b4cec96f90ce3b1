"""What people bring as a draft: read, or recognised by what it is by everybody who reads one, in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle.decode import evaluate
from eagle.drafts.saved import save_draft
from eagle.train import main as train
from eagle.vllm import convert, verify
from tests.e2e.commands import Answer, ask, inside
from tests.e2e.conftest import draft_of
from tests.e2e.test_requests import check, snapshot
from tests.tiny import make_target

H, V = 32, 424
SIZES = {
    "hidden_size": H, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": V, "rms_norm_eps": 1e-6,
}  # fmt: skip


def folder_of(folder: Path, config: dict | None, tensors: dict[str, tuple[int, ...]] | None, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file(ones(tensors), folder / "model.safetensors")
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(json.dumps(content)) if isinstance(content, dict) else torch.save(content, path)


def ones(tensors: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """A d2t of ones names the tokens behind the first."""
    return {n: torch.ones(s, dtype=torch.int64 if n == "d2t" else torch.float32) for n, s in tensors.items()}


def layer(prefix: str, attention: int) -> dict[str, tuple[int, ...]]:
    """A Llama layer whose attention reads so many channels."""
    return {
        f"{prefix}self_attn.q_proj.weight": (H, attention),
        f"{prefix}self_attn.k_proj.weight": (16, attention),
        f"{prefix}self_attn.v_proj.weight": (16, attention),
        f"{prefix}self_attn.o_proj.weight": (H, H),
        f"{prefix}mlp.gate_proj.weight": (64, H),
        f"{prefix}mlp.up_proj.weight": (64, H),
        f"{prefix}mlp.down_proj.weight": (H, 64),
        f"{prefix}input_layernorm.weight": (H,),
        f"{prefix}hidden_norm.weight": (H,),
        f"{prefix}post_attention_layernorm.weight": (H,),
    }


def eagle3(prefix: str, drafted: int = 64) -> dict[str, tuple[int, ...]]:
    return {
        "fc.weight": (H, 3 * H),
        **layer(prefix, 2 * H),
        "norm.weight": (H,),
        "lm_head.weight": (drafted, H),
        "d2t": (drafted,),
    }


LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES}
EAGLE3 = {**LLAMA, "draft_vocab_size": 64, "eagle_aux_hidden_state_layer_ids": [1, 2, 3]}
SPECULATORS = {
    "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "draft_vocab_size": 64,
    "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "org/base-7b"}},
    "eagle_aux_hidden_state_layer_ids": [1, 2, 3], "transformer_layer_config": LLAMA,
}  # fmt: skip
MEDUSA = {"medusa_num_heads": 2, "medusa_num_layers": 1, "base_model_name_or_path": "org/base-7b"}

#: EAGLE-3 drafts as other trainers save them.
PUBLIC_EAGLE3: dict[str, Callable[[Path], object]] = {
    "by midlayer": lambda f: folder_of(f, EAGLE3, eagle3("midlayer.")),
    "by layers.0": lambda f: folder_of(f, EAGLE3, eagle3("layers.0.")),
    "with model. in front": lambda f: folder_of(
        f,
        EAGLE3,
        {f"model.{name}": shape for name, shape in eagle3("layers.0.").items() if name != "d2t"} | {"d2t": (64,)},
    ),
    "with the whole vocabulary and no d2t": lambda f: folder_of(
        f, {**EAGLE3, "draft_vocab_size": V}, {n: s for n, s in eagle3("midlayer.", V).items() if n != "d2t"}
    ),
    "as a pickle": lambda f: (
        folder_of(f, EAGLE3, None),
        torch.save(ones(eagle3("midlayer.")), f / "pytorch_model.bin"),
    ),
    "of the speculators library": lambda f: folder_of(f, SPECULATORS, eagle3("layers.0.")),
}

#: What is brought: how it is made, and what it is said to be. Everybody says what was expected, and a way on.
FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "EAGLE-1 of the speculators library": (
        lambda f: folder_of(
            f,
            {"speculators_model_type": "eagle", "transformer_layer_config": LLAMA},
            {"fusion_fc.weight": (H, 2 * H), **layer("transformer.", H)},
        ),
        "a draft in the form of the speculators library (eagle)",
    ),
    "P-EAGLE": (
        lambda f: folder_of(f, EAGLE3, eagle3("midlayer.") | {"mask_hidden": (1, 3 * H)}),
        "a P-EAGLE draft",
    ),
    "DFlash": (
        lambda f: folder_of(
            f,
            {
                "architectures": ["DFlashDraftModel"],
                "model_type": "qwen3",
                **SIZES,
                "dflash_config": {"mask_token_id": 3},
            },
            {"fc.weight": (H, 3 * H), **layer("layers.0.", H), "norm.weight": (H,), "hidden_norm.weight": (H,)},
        ),
        "a DFlash draft",
    ),
    "Medusa in its own file": (
        lambda f: folder_of(f, MEDUSA, None, medusa_lm_head__pt=torch.ones(H, H)),
        "Medusa heads",
    ),
    "Medusa as safetensors": (
        lambda f: folder_of(
            f, {"model_type": "medusa", **SIZES}, {"medusa_heads.0.0.linear.weight": (H, H), "lm_head.weight": (V, H)}
        ),
        "Medusa heads",
    ),
    "Medusa without a config": (
        lambda f: folder_of(f, None, {"0.0.linear.weight": (H, H), "0.0.linear.bias": (H,), "0.1.weight": (V, H)}),
        "Medusa heads",
    ),
    "an MLP speculator": (
        lambda f: folder_of(f, {"architectures": ["MLPSpeculatorPreTrainedModel"], "model_type": "mlp_speculator"}, {}),
        "an MLP speculator",
    ),
    "a LoRA adapter": (
        lambda f: folder_of(f, None, None, adapter_config__json={"peft_type": "LORA"}),
        "a LoRA adapter (adapter_config.json)",
    ),
    "LoRA tensors": (
        lambda f: folder_of(f, LLAMA, {"base_model.model.layers.0.self_attn.q_proj.lora_A.weight": (2, H)}),
        "a LoRA adapter",
    ),
    "a whole Llama": (lambda f: make_target(f), "a whole model (LlamaForCausalLM)"),
    "a whole Qwen2 in shards": (
        lambda f: make_target(f, "qwen2", max_shard_size="50KB"),
        "a whole model (Qwen2ForCausalLM)",
    ),
    "a whole model of one layer": (lambda f: make_target(f, layers=1), "a whole model (LlamaForCausalLM)"),
    "a store of features": (
        lambda f: folder_of(f, None, None, manifest__json={"format_version": 1}),
        "a store of features",
    ),
    "a run without a checkpoint": (
        lambda f: folder_of(f, None, None, train_options__json={"options": {}}),
        "a training run that has not saved a checkpoint yet",
    ),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deep enough for EAGLE-3."""
    return make_target(tmp_path_factory.mktemp("llama") / "llama", tied=True, layers=4)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, llama: Path, data: Path) -> Path:
    """On which drafts of either family are trained."""
    outdir = tmp_path_factory.mktemp("store") / "store"
    inside(
        "allocation.py", "--outdir", outdir, "--model_name", llama, "--data_path", data, "--dtype", "float32",
        "--draft", "eagle3", "--aux_layers", "1,2,3",
    )  # fmt: skip
    return outdir


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    shutil.copytree(llama, folder / "base")
    save_draft(draft_of(llama), folder / "draft")
    (folder / "prompts.txt").write_text("What is the capital of France?\n")
    return folder


def answer_of(
    name: str, pair: Path, store: Path, draft: Path, new: Path, capsys: pytest.CaptureFixture[str], *more: object
) -> Answer:
    """What a command that reads a draft says to this one."""
    base = pair / "base"
    requests = {
        "--init": (train.main, ["--tmpdir", store, "--basepath", base, "--cpdir", new, "--max_steps", 1, "--val_ratio",
                                0, "--init", draft]),
        "evaluate": (evaluate.main, ["--base-path", base, "--prompts", pair / "prompts.txt", "--max_new_tokens", 8,
                                     "--dtype", "float32", "--output", new, "--draft-path", draft]),
        "convert": (convert.main, ["--base-path", base, "--output-path", new, "--draft-path", draft]),
        "verify": (verify.main, ["--base-path", base, "--output", new, "--draft-path", draft]),
    }  # fmt: skip
    main, words = requests[name]
    return ask(main, capsys, *words, *more)


READERS = {"--init": "--init", "evaluate": "--draft-path", "convert": "--draft-path", "verify": "--draft-path"}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("brought", FOREIGN)
def test_recognised_by_everybody_who_reads_a_draft(
    pair: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], brought: str, name: str
) -> None:
    make, said = FOREIGN[brought]
    make(tmp_path / "draft")
    before = snapshot(tmp_path)
    answer = answer_of(name, pair, store, tmp_path / "draft", tmp_path / "new", capsys)
    check(answer, [f"{READERS[name]} {tmp_path / 'draft'} does not hold a draft", f"it is {said}, expected an EAGLE-1"])
    assert answer.err.strip().count(". ") == 0, "one sentence"
    assert snapshot(tmp_path) == before, "nothing is claimed"


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("brought", "says"),
    [
        ("nothing", ["no weights found, and no config.json", "expected the folder of an EAGLE-1 draft", "state_<n>"]),
        ("a config alone", ["no weights found; expected the folder of an EAGLE-1 draft"]),
        ("a git-lfs pointer", ["model.safetensors is a git-lfs pointer"]),
        ("an index that leads out of its folder", ["names '../base/model.safetensors'", "outside its folder"]),
        ("a weight file", ["is a file", "expected the folder"]),
        ("a path to nothing", ["nowhere", "no such"]),
    ],
)
def test_what_holds_no_draft(
    pair: Path,
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    brought: str,
    says: list[str],
) -> None:
    draft = Path(shutil.copytree(pair / "draft", tmp_path / "draft"))
    weights = draft / "model.safetensors"
    if brought == "a git-lfs pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n")
    elif brought == "an index that leads out of its folder":
        weight_map = dict.fromkeys(load_file(weights), "../base/model.safetensors")
        weights.unlink()
        (draft / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    elif brought == "a weight file":
        draft = weights
        says = ["is not a folder"] if name == "verify" else says
    elif brought == "a path to nothing":
        draft = tmp_path / "nowhere"
    else:
        weights.unlink()
        if brought == "nothing":
            (draft / "config.json").unlink()
    check(answer_of(name, pair, store, draft, tmp_path / "new", capsys), says)
    assert not (tmp_path / "new").exists()


def public(folder: Path) -> None:
    """As public EAGLE drafts are: a pickle, names with ``model.`` in front, rotary buffers."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(tensors, folder / "pytorch_model.bin")


def as_run(folder: Path) -> None:
    """A training run's folder, whose best is a checkpoint."""
    checkpoint = folder.with_name("checkpoint")
    folder.rename(checkpoint)
    folder.mkdir()
    checkpoint.rename(folder / "state_7")
    (folder / "best").symlink_to("state_7", target_is_directory=True)
    (folder / "train_options.json").write_text("{}")


#: What is brought and read: from a checkpoint of ours.
READ: dict[str, Callable[[Path], object]] = {
    "a checkpoint": lambda f: None,
    "a training run": as_run,
    "a public draft": public,
    "a draft without its own embedding": lambda f: save_file(
        {n: t for n, t in load_file(f / "model.safetensors").items() if n != "embed_tokens.weight"},
        f / "model.safetensors",
    ),
}


@pytest.mark.parametrize("name", ["--init", "evaluate", "convert"])
@pytest.mark.parametrize("brought", READ)
def test_read(
    pair: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], brought: str, name: str
) -> None:
    draft = Path(shutil.copytree(pair / "draft", tmp_path / "draft"))
    READ[brought](draft)
    answer = answer_of(name, pair, store, draft, tmp_path / "new", capsys)
    assert answer.code == 0, answer.err
    if name == "convert":
        expected = load_file(pair / "draft" / "model.safetensors")
        for layout in ("v1", "v0"):
            found = load_file(tmp_path / "new" / layout / "model.safetensors")
            assert all(torch.equal(found[n], expected[n].to(found[n].dtype)) for n in found if n in expected)
            assert "fc.weight" in found


@pytest.mark.parametrize("brought", PUBLIC_EAGLE3)
def test_public_eagle3_drafts_are_read(
    pair: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], brought: str
) -> None:
    """Measured, exported in both forms with the same tensors, and gone on from with the draft's own choices."""
    draft = tmp_path / "draft"
    PUBLIC_EAGLE3[brought](draft)
    drafted = V if brought.startswith("with the whole") else 64
    evaluated = answer_of("evaluate", pair, store, draft, tmp_path / "report", capsys)
    assert evaluated.code == 0, evaluated.err
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["identical_to_target"] is True
    assert (report["draft_vocabulary"] or {"size": V})["size"] == drafted

    converted = answer_of("convert", pair, store, draft, tmp_path / "out", capsys)
    assert converted.code == 0, converted.err
    plain, speculators = (load_file(tmp_path / "out" / form / "model.safetensors") for form in ("plain", "speculators"))
    assert plain.keys() == speculators.keys() >= {"midlayer.hidden_norm.weight", "lm_head.weight"}
    if drafted == V:  # vLLM has no place for a table then
        assert not {"d2t", "t2d"} & plain.keys()
        plain["d2t"] = torch.zeros(V, dtype=torch.int64)
    else:
        assert len(plain["d2t"]) == int(plain["t2d"].sum()) == drafted

    more = ["--draft", "eagle3", "--lr", 1e-9]
    trained = answer_of("--init", pair, store, draft, tmp_path / "run", capsys, *more)
    assert trained.code == 0, trained.err
    assert f"the draft chooses among {drafted} of {V} tokens" in trained.out
    saved = json.loads((tmp_path / "run" / "state_1" / "config.json").read_text())
    assert saved["draft_vocab_size"] == drafted and saved["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    assert saved["norm_before_residual"] == (brought == "of the speculators library"), "that form's default"
    found = load_file(tmp_path / "run" / "state_1" / "model.safetensors")
    assert torch.equal(found["d2t"], plain["d2t"]), "its own tokens, not the store's"
    torch.testing.assert_close(found["midlayer.mlp.up_proj.weight"], plain["midlayer.mlp.up_proj.weight"])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], ["is an EAGLE-3 draft, and this run trains an EAGLE-1 draft", "Add --draft eagle3 to go on from it"]),
        (["--draft", "eagle3", "--draft_vocab_size", 50], ["draft_vocab_size is 64 there and 50 here"]),
        (
            ["--draft", "eagle3", "--aux_layers", "0,1,2"],
            ["holds the last hidden states and the inputs of the layers 1"],
        ),
    ],
    ids=["the default family", "another vocabulary", "other layers"],
)
def test_an_eagle3_draft_that_cannot_be_gone_on_from(
    pair: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list, says: list[str]
) -> None:
    PUBLIC_EAGLE3["by midlayer"](tmp_path / "draft")
    before = snapshot(tmp_path)
    check(answer_of("--init", pair, store, tmp_path / "draft", tmp_path / "new", capsys, *more), says)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["evaluate", "convert"])
@pytest.mark.parametrize(
    ("changes", "without", "says"),
    [
        ({}, "lm_head.weight", "lm_head.weight is missing"),
        ({}, "d2t", "d2t is missing"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 4]}, "", "the base model has the layers 0 to 3; there is no 4"),
        ({"eagle_aux_hidden_state_layer_ids": [3, 2, 1]}, "", "each layer once, in ascending order"),
        ({"eagle_aux_hidden_state_layer_ids": "1,2,3"}, "", "expected a list of layers"),
        ({"eagle_aux_hidden_state_layer_ids": None}, "", "has 4 layers, too few for EAGLE-3's usual choice"),
        ({"fc_norm": True}, "", "fc_norm, which is not read here"),
        ({"vocab_size": V + 1}, "", "vocab_size is 425, the base model's is 424"),
    ],
)
def test_a_public_eagle3_draft_that_does_not_fit(
    pair: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, changes: dict,
    without: str, says: str,
) -> None:  # fmt: skip
    tensors = {n: s for n, s in eagle3("midlayer.").items() if n != without}
    folder_of(tmp_path / "draft", EAGLE3 | changes, tensors)
    check(answer_of(name, pair, store, tmp_path / "draft", tmp_path / "new", capsys), [says])
    assert not list((tmp_path / "new").glob("*"))
