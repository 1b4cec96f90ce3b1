"""Quantized targets: what is found, which tensors have to be plain, which commands take one, what names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle.data.loss_mask import load_encoder
from eagle.decode import evaluate
from eagle.drafts.families import DRAFT_FAMILIES
from eagle.drafts.saved import save_draft
from eagle.errors import RequestError
from eagle.generate import job as jobs
from eagle.generate import main as allocation
from eagle.generate.plan import dry_run_lines, make_plan
from eagle.generate.request import GenerationRequest
from eagle.regenerate import main as regenerate
from eagle.target.check import check_target
from eagle.target.config import load_config
from eagle.target.identity import Identity
from eagle.target.quantization import Use
from eagle.target.weights import Weights, read_embedding, read_head
from eagle.train import main as train
from eagle.train.dry_run import planned_target
from eagle.train.options import TrainOptions
from eagle.vllm.export import export
from tests.quantized import FORMATS, quantize
from tests.tiny import conversations, make_target, write_sharegpt

METHODS = {"compressed-tensors": "compressed-tensors", "int8": "compressed-tensors"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("plain") / "m", "qwen2")


@pytest.fixture
def awq(plain: Path, tmp_path: Path) -> Path:
    return quantize(plain, tmp_path / "awq", "awq")


def edit(folder: Path, **changes: object) -> Path:
    file = folder / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return folder


def retensor(folder: Path, **changes: torch.Tensor | None) -> Path:
    """Tensors by name, dots as two underscores; None takes one away."""
    file = folder / "model.safetensors"
    tensors = load_file(file) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({k: t for k, t in tensors.items() if t is not None}, file, metadata={"format": "pt"})
    return folder


def refusal(folder: Path, use: Use = Use.SERVED) -> str:
    with pytest.raises(RequestError) as caught:
        check_target(folder, "--model_name", use=use)
    return str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_for_engines_alone(plain, tmp_path, name):
    folder, method = quantize(plain, tmp_path / "q", name), METHODS.get(name, name)
    checked = check_target(folder, "--model_name", use=Use.SERVED)
    assert checked.config.quantization.to_json()["method"] == method
    for read in (read_head, read_embedding):  # all that is read of it here
        assert torch.equal(read(Weights(folder), checked.config), read(Weights(plain), load_config(plain)))
    for use in set(Use) - {Use.SERVED}:
        said = refusal(folder, use)
        assert f"quantized model ({method})" in said and use.value in said and "unquantized model" in said


def test_a_method_that_nobody_knows_is_named(awq):
    edit(awq, quantization_config={"quant_method": "squeezed", "bits": 3})
    assert check_target(awq, "--model_name", use=Use.SERVED).config.quantization.describe() == "squeezed, bits 3"
    assert "quantized model (squeezed)" in refusal(awq, Use.FEATURES)


def test_modelopt_says_it_in_a_file_of_its_own(awq, plain):
    edit(awq, quantization_config=None)
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "W4A16_AWQ"}}
    (awq / "hf_quant_config.json").write_text(json.dumps(said))
    found = check_target(awq, "--model_name", use=Use.SERVED).config.quantization
    assert (found.method, found.file) == ("W4A16_AWQ", "hf_quant_config.json")
    assert "by hf_quant_config.json: this is a quantized model (W4A16_AWQ)" in refusal(awq, Use.FEATURES)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_a_file_that_vllm_does_not_read(awq, name):
    (awq / name).write_text('{"bits": 4}')
    check_target(awq, "--model_name", use=Use.SERVED)
    edit(awq, quantization_config=None)
    assert f"{name} says that this is a quantized model" in refusal(awq) and "as quantization_config" in refusal(awq)


HEADS = {
    "a GPTQ head by config.json": lambda f: edit(f, quantization_config={"quant_method": "gptq", "lm_head": True}),
    "a packed head": lambda f: retensor(
        f, lm_head__weight=None, lm_head__qweight=torch.ones(32, 53, dtype=torch.int32), lm_head__scales=torch.ones(1)
    ),
    "a head of bytes": lambda f: retensor(f, lm_head__weight=torch.ones(424, 32, dtype=torch.int8)),
    "a head with a scale": lambda f: retensor(f, lm_head__weight_scale=torch.ones(424, 1)),
    "an embedding": lambda f: retensor(f, model__embed_tokens__weight=torch.ones(424, 32, dtype=torch.uint8)),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_quantized_head_is_refused(awq, name):
    said = refusal(HEADS[name](awq))
    assert "its head or its embedding is quantized (" in said and "Quantize the model again without them" in said


NORM = "model__layers__1__input_layernorm__weight"
DAMAGED = {
    "tensors alone": (lambda f: edit(f, quantization_config=None), "config.json does not say how they were quantized"),
    "a name alone": (lambda f: edit(f, quantization_config="awq"), "and nothing says how"),
    "no head": (lambda f: retensor(f, lm_head__weight=None), "no lm_head.weight among its weights"),
    "no norm": (lambda f: retensor(f, **{NORM: None}), "no model.layers.1.input_layernorm.weight among"),
    "a norm of another size": (lambda f: retensor(f, **{NORM: torch.ones(16)}), "is [16], config.json says [32]"),
    "a norm of whole numbers": (
        lambda f: retensor(f, **{NORM: torch.ones(32, dtype=torch.int64)}), "expected floating-point weights",
    ),
    "more layers": (
        lambda f: retensor(f, model__layers__2__mlp__up_proj__qweight=torch.ones(1, dtype=torch.int32)),
        "hold model.layers.2.mlp.up_proj.qweight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_what_an_engine_would_stumble_over(awq, name):
    make, says = DAMAGED[name]
    assert says in refusal(make(awq))


def test_the_config_of_a_quantized_model_beside_plain_weights(awq, plain):
    (awq / "model.safetensors").write_bytes((plain / "model.safetensors").read_bytes())
    assert "quantized model (awq), and not one of its tensors is quantized" in refusal(awq)


@pytest.mark.parametrize("name", ["compressed-tensors", "awq", "int8", "fp8"])
def test_the_fingerprint_is_of_every_tensor_and_of_the_numbers(plain, tmp_path, name):
    folder = quantize(plain, tmp_path / "q", name)
    file, tensors = folder / "model.safetensors", load_file(folder / "model.safetensors")
    before = Identity(folder, Weights(folder)).current
    assert before != Identity(plain, Weights(plain)).current
    assert len({key.rpartition(".")[2] for key in tensors}) > 2  # also what a plain model has not
    seen = set()
    for key, tensor in tensors.items():
        kind = key.rpartition(".")[2], tensor.dtype
        if kind in seen:
            continue
        seen.add(kind)
        changed = tensor.clone()
        changed.view(-1)[-1:].view(torch.uint8)[-1] ^= 1
        save_file(tensors | {key: changed}, file, metadata={"format": "pt"})
        assert Identity(folder, Weights(folder)).current != before, key
    save_file(tensors, file, metadata={"format": "pt"})
    assert Identity(folder, Weights(folder)).current == before
    edit(folder, quantization_config=FORMATS[name][1] | {"group_size": 64})
    assert Identity(folder, Weights(folder)).current != before


def request(folder: Path, **more: object) -> GenerationRequest:
    data = write_sharegpt(folder.parent / "data.json", conversations(4))
    options = {"data_path": data, "device": "cpu", "feature_source": "vllm", "chat_template": "chatml"}
    return GenerationRequest(folder.parent / "store", str(folder), **{**options, **more})


def test_a_job_says_what_it_is_of(awq, monkeypatch):
    monkeypatch.setattr(jobs, "vllm_of", lambda *_: "0.32.0")
    monkeypatch.setattr("eagle.generate.plan.probe", lambda *asked: 100.0)
    job = jobs.resolve(request(awq), only_planned=True)
    assert job.manifest["target"]["quantization"] == {"method": "awq", "bits": 4, "group_size": 32}
    assert any("quantized (awq, bits 4, group_size 32): features are its own" in note for note in job.notes)
    tokens = jobs.encode_job(job, save=False)
    lines = "\n".join(dry_run_lines(job, make_plan(job, tokens), tokens))
    size = sum(t.numel() * t.element_size() for t in load_file(awq / "model.safetensors").values())
    assert f"base model: quantized (awq, bits 4, group_size 32), {size / 1e6:,.1f} MB as in its weight files" in lines
    (awq / "model.safetensors").unlink()
    job = jobs.resolve(request(awq), only_planned=True)
    lines = "\n".join(dry_run_lines(job, make_plan(job, tokens), tokens))
    assert "as large as the weight files that" in lines and "no probe" in lines


def test_a_plain_target_is_not_quantized_on_the_way(plain, monkeypatch):
    monkeypatch.setattr(jobs, "vllm_of", lambda *_: "0.32.0")
    asked = request(plain, engine_args={"quantization": "fp8"})
    with pytest.raises(RequestError, match="quantization is 'fp8', and the weights of the base model are not"):
        jobs.resolve(asked)


def words(*found: object) -> list[str]:
    return [str(word) for word in found]


def test_commands_that_cannot_use_one_name_what_can(awq, tmp_path):
    """Nothing is written."""
    data = write_sharegpt(tmp_path / "data.json", conversations(4))
    out, before = tmp_path / "new", sorted(tmp_path.rglob("*"))
    commands = {
        "add --feature_source vllm": lambda: allocation.main(
            words("--model_name", awq, "--data_path", data, "--outdir", out)
        ),
        "as it will be served: add --feature_source vllm.": lambda: train.main(
            words("--basepath", awq, "--data_path", data, "--cpdir", out)
        ),
        "python -m eagle.vllm.verify": lambda: evaluate.main(words("--base-path", awq, "--draft-path", awq)),
        "--engine_python, or a server with --server": lambda: regenerate.main(
            words("--model_name", awq, "--data_path", data, "--output", tmp_path / "x.json", "--engine", "own")
        ),
    }
    for says, ask in commands.items():
        with pytest.raises(RequestError, match=r"quantized model \(awq\)") as caught:
            ask()
        assert says in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    load_encoder(awq, load_config(awq, use=Use.SERVED))  # prompts and masks need no weights


def test_training_from_a_store_and_export_take_one(awq, plain, tmp_path):
    """The draft is that of the plain model: nothing in its folder says that anything is quantized."""
    options = TrainOptions(tmp_path / "run", awq, tmpdir=tmp_path / "store")
    assert planned_target(options).draft() == load_config(plain).draft()
    config = load_config(awq, use=Use.SERVED)
    save_draft(DRAFT_FAMILIES["eagle1"].build(config.draft(), read_embedding(Weights(awq), config)), tmp_path / "draft")
    folder = export(awq, tmp_path / "draft", tmp_path / "export", "v1")["v1"]
    files = [*folder.glob("*.json"), *(tmp_path / "draft").glob("*.json")]
    assert files and not any("quanti" in file.read_text(encoding="utf-8") for file in files)
