"""Checkpoints are whole or absent, and pointers always point at one."""

import errno
import shutil
from pathlib import Path

import pytest
import torch

from eagle.drafts.eagle1.network import Eagle1Network
from eagle.drafts.saved import load_draft
from eagle.errors import RequestError, WorkError
from eagle.target.config import load_config
from eagle.target.weights import Weights, read_embedding
from eagle.train import checkpoint
from eagle.train.checkpoint import Position
from tests.tiny import make_target


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    target = make_target(tmp_path_factory.mktemp("target"))
    config = load_config(target)
    return Eagle1Network(config.draft(), read_embedding(Weights(target), config))


def save(cpdir: Path, model, step: int) -> Path:
    cpdir.mkdir(exist_ok=True)
    return checkpoint.save(cpdir, model, {"optimizer": {"step": step}}, Position(step, 1, 2), {"seed": 1}, {"a": 0.5})


def test_save_and_restore(model, tmp_path):
    save(tmp_path, model, 7)
    folder, state = checkpoint.load_last(tmp_path)
    assert (folder.name, state["step"], state["epoch"], state["batch"], state["metrics"]) == (
        "state_7",
        7,
        1,
        2,
        {"a": 0.5},
    )
    other = Eagle1Network(model.config, model.embed_tokens.weight.detach())
    assert checkpoint.restore(folder, other) == {"optimizer": {"step": 7}}
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
    assert load_draft(tmp_path / "last").config == model.config


@pytest.mark.parametrize("links", [True, False])
def test_pointers(model, tmp_path, monkeypatch, links):
    if not links:  # a file system without symbolic links

        def refuse(*_, **__):
            raise OSError(1, "Operation not permitted")

        monkeypatch.setattr(Path, "symlink_to", refuse)
    for step in (1, 2, 10):
        save(tmp_path, model, step)
    checkpoint.point(tmp_path, checkpoint.BEST, "state_2")
    assert checkpoint.resolve_pointer(tmp_path / "last").name == "state_10"
    assert checkpoint.resolve_pointer(tmp_path / "best").name == "state_2"
    assert checkpoint.resolve_pointer(tmp_path).name == "state_2"  # a run means its best
    assert checkpoint.resolve_pointer(tmp_path / "state_1").name == "state_1"
    assert (tmp_path / "best").is_symlink() == links


def test_the_oldest_go_but_never_best_or_last(model, tmp_path):
    for step in (1, 2, 9, 10, 11):
        save(tmp_path, model, step)
    checkpoint.point(tmp_path, checkpoint.BEST, "state_1")
    checkpoint.prune(tmp_path, keep=2)
    assert [path.name for path in checkpoint.states(tmp_path)] == ["state_1", "state_10", "state_11"]


def test_half_a_checkpoint_of_a_killed_run_goes(model, tmp_path):
    """Which a resumed run that saves by time does not write again."""
    (tmp_path / ".state_7.tmp").mkdir()
    (tmp_path / ".state_7.tmp" / "model.safetensors").write_bytes(b"half")
    save(tmp_path, model, 9)
    checkpoint.prune(tmp_path, keep=2)
    assert not list(tmp_path.glob(".state_*"))


def test_what_cannot_be_deleted_now_ends_no_run(model, tmp_path, monkeypatch):
    """As on NFS, where a file that somebody has open stays under another name; later it is tried again."""
    for step in (1, 2, 3):
        save(tmp_path, model, step)
    real = shutil.rmtree

    def held(path, ignore_errors=False, **_):
        real(path, ignore_errors=ignore_errors)
        Path(path).mkdir(exist_ok=True)
        (Path(path) / ".nfs01").touch()
        if not ignore_errors:
            raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", held)
        checkpoint.prune(tmp_path, keep=2)
    save(tmp_path, model, 1)
    checkpoint.point(tmp_path, checkpoint.LAST, "state_3")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", held)
        checkpoint.prune(tmp_path, keep=2)  # one more of the same name
    assert [path.name for path in checkpoint.states(tmp_path)] == ["state_2", "state_3"]
    assert len(list(tmp_path.glob(".state_1.*"))) == 2
    checkpoint.prune(tmp_path, keep=2)
    assert not list(tmp_path.glob(".state_*"))


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-400]), Path.unlink])
def test_a_damaged_optimizer_names_where_to_go_on_from(model, tmp_path, damage):
    for step in (1, 2):
        damage(save(tmp_path, model, step) / checkpoint.OPTIMIZER)
    says = "optimizer.pt of state_{}, .* Move .*state_{} away and run the same command again: it {}"
    with pytest.raises(WorkError, match=says.format(2, 2, "goes on from state_1")):
        checkpoint.restore(tmp_path / "state_2", model)
    (tmp_path / "state_2").rename(tmp_path / "elsewhere")
    with pytest.raises(WorkError, match=says.format(1, 1, "begins anew")):
        checkpoint.restore(tmp_path / "state_1", model)


def test_an_optimizer_of_another_kind_of_device_is_no_damaged_one(model, tmp_path, monkeypatch):
    """torch_npu 2.7.1 and 2.8.0 have their cards' tensors rebuilt by a function of their own."""
    folder = save(tmp_path, model, 1)

    class OfACard:
        def __reduce__(self):
            return shutil.which, ("sh",)

    torch.save({"optimizer": OfACard()}, folder / checkpoint.OPTIMIZER)
    with pytest.raises(RequestError, match=r"another kind of device, by shutil.which, .* The file is whole"):
        checkpoint.restore(folder, model)


def test_a_full_disk_keeps_what_was_there(model, tmp_path, monkeypatch):
    save(tmp_path, model, 1)

    def full(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(WorkError, match=r"Could not save .*state_2.*checkpoints before it are whole"):
        save(tmp_path, model, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "state_1"]
    assert checkpoint.resolve_pointer(tmp_path / "last").name == "state_1"


def test_half_a_checkpoint_is_never_seen(model, tmp_path):
    save(tmp_path, model, 1)
    (tmp_path / ".state_2.tmp").mkdir()
    (tmp_path / "state_notes").mkdir()
    assert checkpoint.load_last(tmp_path)[0].name == "state_1"


def test_another_run_is_refused():
    checkpoint.check_same_run(Path("c"), {"seed": 1, "lr": 4}, {"seed": 1, "lr": 4})
    with pytest.raises(RequestError, match=r"lr was 4, now 8; seed was 1, now 2"):
        checkpoint.check_same_run(Path("c"), {"seed": 1, "lr": 4}, {"seed": 2, "lr": 8})


def test_another_run_in_place_of_one_that_never_trained(model, tmp_path):
    """As when the card had too little memory for its first step: what the folder holds is said."""
    save(tmp_path, model, 0)
    with pytest.raises(RequestError, match=r"max_len was 9, now 8.*state_0 is the untrained start, .* may be removed"):
        checkpoint.check_same_run(tmp_path, {"max_len": 9}, {"max_len": 8})
    save(tmp_path, model, 3)
    with pytest.raises(RequestError, match="max_len was 9, now 8") as refusal:
        checkpoint.check_same_run(tmp_path, {"max_len": 9}, {"max_len": 8})
    assert "removed" not in str(refusal.value)


def dealt(processes: int, bs: int, accumulation: int) -> dict[str, int]:
    return {"processes": processes, "bs": bs, "gradient_accumulation_steps": accumulation, "seed": 1}


@pytest.mark.parametrize("now", [(8, 4, 1), (4, 4, 2), (4, 8, 1), (1, 1, 32), (32, 1, 1)])
def test_the_same_global_batch_in_other_pieces_is_the_same_run(now):
    checkpoint.check_same_run(Path("c"), dealt(8, 4, 1), dealt(*now))


@pytest.mark.parametrize(
    ("now", "says"),
    [
        ((4, 4, 1), r"now 16 sequences \(4 processes x --bs 4 x .*\); with 4 processes --bs 4 "
         r"--gradient_accumulation_steps 2 makes that"),
        ((16, 4, 1), r"with 16 processes --bs 2 --gradient_accumulation_steps 1 makes that"),
        ((3, 4, 1), r"3 processes cannot share that, a divisor of 32 can"),
    ],
)  # fmt: skip
def test_another_global_batch_is_another_run(now, says):
    with pytest.raises(RequestError, match=says) as refusal:
        checkpoint.check_same_run(Path("c"), dealt(8, 4, 1), dealt(*now))
    was = "the global batch was 32 sequences (8 processes x --bs 4 x --gradient_accumulation_steps 1), now "
    assert was in str(refusal.value) and "seed" not in str(refusal.value)
