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
from tests.e2e.commands import Answer, ask
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
        save_file({name: torch.ones(shape) for name, shape in tensors.items()}, folder / "model.safetensors")
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(json.dumps(content)) if isinstance(content, dict) else torch.save(content, path)


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


def eagle3(prefix: str) -> dict[str, tuple[int, ...]]:
    return {
        "fc.weight": (H, 3 * H),
        **layer(prefix, 2 * H),
        "norm.weight": (H,),
        "lm_head.weight": (64, H),
        "d2t": (64,),
    }


LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES}
EAGLE3 = {**LLAMA, "draft_vocab_size": 64, "eagle_aux_hidden_state_layer_ids": [1, 2, 3]}
SPECULATORS = {
    "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "draft_vocab_size": 64,
    "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "org/base-7b"}},
    "transformer_layer_config": LLAMA,
}  # fmt: skip
MEDUSA = {"medusa_num_heads": 2, "medusa_num_layers": 1, "base_model_name_or_path": "org/base-7b"}

#: What is brought: how it is made, and what it is said to be. Everybody says what was expected, and a way on.
FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "EAGLE-3 by midlayer": (lambda f: folder_of(f, EAGLE3, eagle3("midlayer.")), "an EAGLE-3 draft"),
    "EAGLE-3 by layers.0": (lambda f: folder_of(f, EAGLE3, eagle3("layers.0.")), "an EAGLE-3 draft"),
    "EAGLE-3 with the whole vocabulary": (
        lambda f: folder_of(f, LLAMA, {n: s for n, s in eagle3("layers.0.").items() if n not in ("d2t", "lm_head")}),
        "an EAGLE-3 draft",
    ),
    "EAGLE-3 as a pickle": (
        lambda f: (
            folder_of(f, EAGLE3, None),
            torch.save({n: torch.ones(s) for n, s in eagle3("midlayer.").items()}, f / "pytorch_model.bin"),
        ),
        "an EAGLE-3 draft",
    ),
    "EAGLE-3 of the speculators library": (
        lambda f: folder_of(f, SPECULATORS, eagle3("layers.0.")),
        "a draft in the form of the speculators library (eagle3)",
    ),
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
