"""FSDP on two CPU processes: what one process trains, saved whole, taken up again; and what is really shared out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eagle.drafts.saved import resolve_pointer
from eagle.train.checkpoint import states
from tests.e2e.commands import ROOT, command, inside

pytest.importorskip("torch.distributed.fsdp", reason="no distributed torch here")
if not hasattr(torch.distributed.fsdp, "fully_shard"):
    pytest.skip("FSDP version 2 needs torch 2.6 or newer", allow_module_level=True)

#: Two processes sum a global batch in another order: float32 rounding, and what ten steps of AdamW make of it.
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}

FSDP = ["accelerate launch", "--config_file", "configs/fsdp.yaml", "--mixed_precision", "no"]

#: One step of a sharded draft, then what this process holds of it.
SHARES = """
import sys
import torch
from accelerate import Accelerator
from eagle.drafts.eagle1.network import Eagle1Network
from eagle.target.config import load_config
from eagle.train.main import leave
from eagle.train.sharding import shard, whole_draft, whole_optimizer
from eagle.drafts.unroll import UnrolledDraft

accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
config = load_config(sys.argv[1]).draft()
draft = Eagle1Network(config, torch.randn(config.vocab_size, config.hidden_size))
before = {name: value.detach().clone() for name, value in draft.named_parameters()}
optimizer = torch.optim.AdamW([p for p in draft.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
model = shard(accelerator, UnrolledDraft(draft), optimizer)
model(torch.zeros(1, 4, dtype=torch.long), torch.randn(1, 4, config.hidden_size), 2).sum().backward()
optimizer.step()
trained = sum(value.numel() for name, value in before.items() if name != "embed_tokens.weight")
local = sum(value.to_local().numel() for value in draft.trained_state().values())
state = sum(s["exp_avg"].to_local().numel() for s in optimizer.state.values())
assert local == state == trained // 2, (local, state, trained)
assert torch.equal(draft.embed_tokens.weight, before["embed_tokens.weight"])
found, moments = whole_draft(draft, True), whole_optimizer(optimizer, True)["state"]
assert all(torch.equal(found[name], value) for name, value in before.items())
assert sum(s["exp_avg"].numel() for s in moments.values()) == trained
print(f"process {accelerator.process_index} of {accelerator.num_processes} holds half")
leave(0)
"""


def options(store: Path, target: Path, cpdir: Path) -> list[object]:
    return [
        "--tmpdir", store, "--basepath", target, "--cpdir", cpdir, "--num_epochs", 2, "--ttt_steps", 2,
        "--grad_clip", 0.01, "--keep", 10, "--ema", 0.9,
    ]  # fmt: skip


def weights(state: Path) -> dict[str, torch.Tensor]:
    return load_file(state / "model.safetensors")


def test_as_one_process_and_resumed(store: Path, llama: Path, tmp_path: Path) -> None:
    alone, shared, resumed = (tmp_path / name for name in ("alone", "shared", "resumed"))
    inside("-m", "eagle.train.main", *options(store, llama, alone), "--bs", 4)
    launch = [*FSDP, "-m", "eagle.train.main", "--bs", 1, "--gradient_accumulation_steps", 2]
    assert "on 2 x cpu" in command(*launch, *options(store, llama, shared)).out
    assert [state.name for state in states(shared)] == [state.name for state in states(alone)]
    for state in states(alone):
        found, expected = weights(shared / state.name), weights(state)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, **TOLERANCE, msg=f"{state.name} {name}")
    ours, theirs = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (shared, alone)
    )
    for line, expected in zip(ours, theirs, strict=True):
        for key in ("loss", "supervised_tokens", "val_token_loss", "val_positions"):
            assert (key in line) == (key in expected), line["step"]
            if key in expected:
                assert line[key] == pytest.approx(expected[key], rel=1e-4), (key, line["step"])

    # As if killed after the first epoch's checkpoint.
    shutil.copytree(shared, resumed, symlinks=True)
    shutil.rmtree(states(resumed)[-1])
    assert "resuming from" in command(*launch, *options(store, llama, resumed)).out
    last, expected = weights(resolve_pointer(resumed / "last")), weights(resolve_pointer(shared / "last"))
    assert all(torch.equal(last[name], tensor) for name, tensor in expected.items())

    # Without FSDP and on its own, one process goes on with what two shared.
    shutil.rmtree(states(resumed)[-1])
    assert "resuming from" in inside("-m", "eagle.train.main", *options(store, llama, resumed), "--bs", 4).out
    last, expected = weights(resolve_pointer(resumed / "last")), weights(resolve_pointer(alone / "last"))
    for name, tensor in expected.items():
        torch.testing.assert_close(last[name], tensor, **TOLERANCE, msg=name)


def test_every_process_holds_its_share(llama: Path, tmp_path: Path) -> None:
    script = tmp_path / "shares.py"
    script.write_text(SHARES)
    answer = command("torchrun", "--standalone", "--nproc_per_node", 2, script, llama, PYTHONPATH=str(ROOT))
    assert answer.out.count("holds half") == 2


def test_mixed_precision_trains(store: Path, llama: Path, tmp_path: Path) -> None:
    launch = [*FSDP[:-1], "bf16", "-m", "eagle.train.main", "--bs", 2]
    command(*launch, *options(store, llama, tmp_path / "run"), "--max_steps", 2)
    start, state = states(tmp_path / "run")
    assert start.name == "state_0"
    assert {tensor.dtype for name, tensor in weights(state).items() if name != "embed_tokens.weight"} == {torch.float32}
    inside("-m", "eagle.train.main", *options(store, llama, tmp_path / "alone"), "--max_steps", 2)
    ours, alone = losses(tmp_path / "run"), losses(tmp_path / "alone")
    assert len(ours) == 2
    assert ours == pytest.approx(alone, rel=0.02)


def losses(cpdir: Path) -> list[float]:
    lines = [json.loads(line) for line in (cpdir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_the_plan_of_a_shared_draft() -> None:
    plan = ["-m", "eagle.train.main", "--dry_run", "--configpath", "configs/llama_2_chat_70B_config.json", "--bs", 1]
    alone, shared = command(*plan).out, command(*FSDP, *plan).out

    def size(text: str, name: str) -> float:
        (line,) = {line for line in text.splitlines() if line.startswith(f"  {name:<46}")}
        return float(line.split()[-1].replace(",", ""))

    for name in ("draft weights", "gradients", "AdamW state"):
        assert size(shared, name) == pytest.approx(size(alone, name) / 2, rel=1e-3)
    assert size(shared, "frozen embedding") == size(alone, "frozen embedding")
    assert shared.count("peak ") == 1
