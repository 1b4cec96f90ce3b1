"""``python -m eagle.evaluate``: every kind of draft, every kind of prompts, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle.decode import evaluate
from eagle.drafts.saved import BEST, save_draft
from eagle.train.checkpoint import point
from eagle.vllm.export import export
from tests.e2e.commands import Answer, ask, command
from tests.e2e.conftest import draft_of
from tests.tiny import make_target

QUICK = ("--max_new_tokens", 12, "--num_prompts", 4, "--dtype", "float32", "--device", "cpu")

KEYS = {
    "tau", "accepted_per_position", "n_alpha", "tokens_per_s", "baseline_tokens_per_s", "speedup",
    "identical_to_target", "categories", "draft_ms_per_step", "target_ms_per_step", "peak_memory_gb", "recommendation",
    "hardware", "made_by",
}  # fmt: skip


def evaluated(folder: Path, *words: object, **environment: str) -> tuple[dict, Answer]:
    """The report of a command line."""
    answer = command("-m", "eagle.evaluate", *QUICK, "--output", folder, *words, **environment)
    return json.loads((folder / "report.json").read_text(encoding="utf-8")), answer


def measured(folder: Path, capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    """The same, in this process."""
    answer = ask(evaluate.main, capsys, *QUICK, "--output", folder, *words)
    assert answer.code == 0, answer.err
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory, qwen: Path) -> dict[str, Path]:
    """One draft in all the shapes it may come in."""
    folder = tmp_path_factory.mktemp("drafts")
    run, public = folder / "run", folder / "public"
    save_draft(draft_of(qwen), run / "state_3")
    point(run, BEST, "state_3")
    exports = export(qwen, run, folder / "exported", "both")
    public.mkdir()
    shutil.copy(run / "state_3" / "config.json", public)
    state = {f"model.{name}": tensor for name, tensor in load_file(run / "state_3" / "model.safetensors").items()}
    state["model.fc.bias"] = torch.zeros(len(state["model.fc.weight"]))
    torch.save(state, public / "pytorch_model.bin")
    return {"run": run, "checkpoint": run / "state_3", "pointer": run / BEST, "public": public, **exports}


def test_every_kind_of_draft_gives_the_same_numbers(drafts, qwen, tmp_path, capsys):
    common = ("--base-path", qwen, "--num_draft_tokens", 3)
    report, answer = evaluated(tmp_path / "run", "--draft-path", drafts["run"], *common)
    assert report.keys() >= KEYS
    assert report["identical_to_target"] is True
    assert len(report["accepted_per_position"]) == len(report["n_alpha"]) == 3
    assert "the target's own greedy output, token for token" in answer.out and "fastest" in answer.out
    assert "τ" in answer.err  # the progress bar
    assert "speed, in multiples" in (tmp_path / "run" / "report.svg").read_text(encoding="utf-8")
    replies = [json.loads(line) for line in (tmp_path / "run" / "replies.jsonl").read_text().splitlines()]
    assert [reply["id"] for reply in replies[:2]] == ["1", "2"] and sum(r["tokens"] for r in replies) == report[
        "tokens"
    ]
    for kind in drafts.keys() - {"run"}:
        other = measured(tmp_path / kind, capsys, "--draft-path", drafts[kind], *common)
        for key in ("tau", "accepted_per_position", "n_alpha", "tokens", "identical_to_target"):
            assert other[key] == report[key], kind


def test_without_matplotlib_there_is_no_picture(drafts, qwen, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = ("--base-path", qwen, "--draft-path", drafts["run"], "--output", tmp_path)
    answer = ask(evaluate.main, capsys, *QUICK, *words)
    assert answer.code == 0 and answer.out.endswith("report.json, replies.jsonl\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["replies.jsonl", "report.json"]


@pytest.mark.parametrize("mode", ["tree", "dynamic_tree"])
def test_trees(drafts, qwen, tmp_path, capsys, mode):
    words = ("--base-path", qwen, "--draft-path", drafts["v1"], "--mode", mode, "--num_draft_tokens", 9)
    report = measured(tmp_path, capsys, *words)
    assert report["identical_to_target"] is True and report["num_draft_tokens"] == 9
    sampled = measured(tmp_path, capsys, *words, "--temperature", 1, "--top_p", 0.9, "--overwrite")
    assert sampled["identical_to_target"] is None and sampled["temperature"] == 1


def test_prompts_in_three_shapes(drafts, qwen, tmp_path, capsys):
    lines, sharegpt, bench = (tmp_path / name for name in ("lines.txt", "sharegpt.json", "bench.jsonl"))
    lines.write_text("What is it?\n\nAnd then?\n", encoding="utf-8")
    talk = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "x"}]
    sharegpt.write_text(json.dumps([{"id": "a", "conversations": talk}]), encoding="utf-8")
    question = {"question_id": 7, "category": "code", "turns": ["What is it?", "And then?"]}
    bench.write_text(json.dumps(question) + "\n", encoding="utf-8")
    common = ("--base-path", qwen, "--draft-path", drafts["v1"], "--no_baseline")
    replies = {}
    for file in (lines, sharegpt, bench):
        out = tmp_path / file.stem
        report = measured(out, capsys, *common, "--prompts", file)
        assert report["speedup"] is None and report["identical_to_target"] is None
        replies[file.stem] = [json.loads(line) for line in (out / "replies.jsonl").read_text().splitlines()]
    assert [len(some) for some in replies.values()] == [2, 1, 2]
    assert len({some[0]["text"] for some in replies.values()}) == 1
    assert [reply["turn"] for reply in replies["bench"]] == [1, 2]
    # The second turn has the first with the model's own answer in front of it.
    first, second = (reply["prompt_tokens"] for reply in replies["bench"])
    assert second > first + 5
    once = measured(tmp_path / "once", capsys, *common, "--prompts", bench, "--num_turns", 1)
    assert once["replies"] == 1 and list(once["categories"]) == ["code"]


def test_prompts_that_do_not_fit_are_left_out(drafts, tmp_path, capsys):
    short = make_target(tmp_path / "short", "qwen2", max_position_embeddings=60, seed=2)
    draft = tmp_path / "draft"
    save_draft(draft_of(short), draft)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\n" + "hello " * 60 + "\n", encoding="utf-8")
    words = ("--base-path", short, "--draft-path", draft, "--prompts", prompts, "--max_new_tokens", 500)
    report = measured(tmp_path / "out", capsys, *words)
    assert report["skipped_prompts"] == ["2"] and report["replies"] == 1
    assert report["tokens"] < 60
    prompts.write_text("hello " * 60, encoding="utf-8")
    refused = ask(evaluate.main, capsys, *words)
    assert refused.code == 2 and "longer than the base model's 60 positions" in refused.error


def test_warnings(drafts, qwen, tmp_path, capsys):
    """What is measured as it is, but is likely not what was meant."""
    draft = tmp_path / "draft"
    shutil.copytree(drafts["public"], draft)
    state = torch.load(draft / "pytorch_model.bin", weights_only=True)
    state["model.fc.bias"] += 1
    torch.save(state, draft / "pytorch_model.bin")
    config = json.loads((draft / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 123.0
    config["max_position_embeddings"] = 64
    (draft / "config.json").write_text(json.dumps(config))
    (draft / "state.json").write_text(json.dumps({"run": {"target": "another"}}))
    words = ("--base-path", qwen, "--draft-path", draft, "--num_prompts", 1, "--no_baseline")
    _, answer = evaluated(tmp_path / "out", *words, EAGLE_TARIN_MODE="1")
    for expected in (
        "EAGLE_TARIN_MODE",
        "max_position_embeddings 64, the base model",
        "rope_theta 123.0",
        "trained fc.bias",
        "trained for other weights",
    ):
        assert expected in answer.error, expected


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, llama: Path, llama_bin: Path, drafts: dict[str, Path]) -> Path:
    """A folder with one of everything that a request can name wrongly."""
    world = tmp_path_factory.mktemp("world")
    save_draft(draft_of(make_target(world / "wide", hidden=64)), world / "wide_draft")
    save_draft(draft_of(make_target(world / "words", tied=True, vocab_size=430)), world / "words_draft")
    save_draft(draft_of(llama_bin), world / "mha_draft")
    good = draft_of(llama)
    save_draft(good, world / "draft")
    for name in ("lost", "nan"):
        shutil.copytree(world / "draft", world / f"{name}_draft")
    tensors = load_file(world / "draft" / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "q_proj" not in k}, world / "lost_draft" / "model.safetensors")
    tensors["fc.weight"][0, 0] = float("nan")
    save_file(tensors, world / "nan_draft" / "model.safetensors")
    (world / "nothing").mkdir()
    (world / "full").mkdir()
    (world / "full" / "report.json").write_text("{}")
    (world / "empty.txt").write_text("\n \n")
    (world / "empty.jsonl").write_text("")
    (world / "strange.jsonl").write_text('{"text": "hello"}\n')
    for name, source in (("llama", llama), ("qwen_draft", drafts["v1"])):
        shutil.copytree(source, world / name)
    return world


def test_variables_of_the_template_are_in_the_report(drafts, qwen, tmp_path, capsys):
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}{{ '<think>' if thinking else '' }}")
    words = ("--base-path", qwen, "--draft-path", drafts["run"], "--chat_template", template, "--no_baseline")
    plain = measured(tmp_path / "plain", capsys, *words)
    told = measured(tmp_path / "told", capsys, *words, "--chat_template_kwargs", '{"thinking": true}')
    assert "chat_template_kwargs" not in plain and told["chat_template_kwargs"] == {"thinking": True}
    prompts = [
        [json.loads(line)["prompt_tokens"] for line in (tmp_path / name / "replies.jsonl").read_text().splitlines()]
        for name in ("plain", "told")
    ]
    assert len(prompts[0]) == len(prompts[1]) and prompts[0][0] < prompts[1][0]


REFUSED = {
    "no base model": ("--base-path nowhere", "--base-path nowhere"),
    "no draft": ("--draft-path nowhere", "--draft-path nowhere"),
    "a folder without a draft": ("--draft-path nothing", "config.json"),
    "a base model as a draft": ("--draft-path llama", "it is a whole model (LlamaForCausalLM)"),
    "another hidden size": ("--draft-path wide_draft", "hidden_size is 64, the base model's is 32"),
    "another vocabulary": ("--draft-path words_draft", "vocab_size is 430, the base model's is 424"),
    "another number of heads": ("--draft-path mha_draft", "num_key_value_heads is 4, the base model's is 2"),
    "another family": ("--draft-path qwen_draft", "qkv_bias is True, the base model's is False"),
    "lost weights": ("--draft-path lost_draft", "q_proj.weight is missing"),
    "diverged weights": ("--draft-path nan_draft", "NaN"),
    "no prompts file": ("--prompts nowhere.jsonl", "--prompts nowhere.jsonl"),
    "an empty file of lines": ("--prompts empty.txt", "holds no prompts"),
    "an empty file": ("--prompts empty.jsonl", "is empty"),
    "strange prompts": ("--prompts strange.jsonl", "neither 'turns'"),
    "no prompts wanted": ("--num_prompts 0", "--num_prompts 0"),
    "no turns wanted": ("--num_turns 0", "--num_turns 0"),
    "nothing to generate": ("--max_new_tokens 0", "--max_new_tokens 0"),
    "an unknown mode": ("--mode forest", "invalid choice: 'forest'"),
    "nothing to draft": ("--num_draft_tokens 0", "--num_draft_tokens 0"),
    "too large a tree": ("--mode tree --num_draft_tokens 60", "has 25 nodes"),
    "too large a dynamic tree": ("--mode dynamic_tree --tree_depth 1 --tree_top_k 4", "sees only 4"),
    "a negative temperature": ("--temperature -1", "--temperature -1"),
    "no probability": ("--top_p 0", "--top_p 0"),
    "an unknown dtype": ("--dtype int8", "--dtype int8"),
    "a device that is not there": ("--device cuda", "--device cuda"),
    "an unknown template": ("--chat_template nothing.jinja", "--chat_template nothing.jinja"),
    "variables that are no object": ("--chat_template_kwargs x", "expected a JSON object"),
    "a variable of another template": ('--chat_template_kwargs {"x":1}', "--chat_template_kwargs: x would do nothing"),
    "a folder in use": ("--output full", "--output full is not empty"),
    "a file as a folder": ("--output empty.txt", "--output empty.txt is a file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(world, monkeypatch, capsys, case):
    monkeypatch.chdir(world)
    words, said = REFUSED[case]
    answer = ask(evaluate.main, capsys, "--base-path", "llama", "--draft-path", "draft", *QUICK, *words.split())
    assert answer.code == 2, answer
    assert said in answer.error
    assert "Traceback" not in answer.err
