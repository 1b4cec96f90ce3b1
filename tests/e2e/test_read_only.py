"""Output where nothing may be written: said at once, with flag and fix, and nothing of the user's is touched."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from eagle.decode import evaluate
from eagle.drafts.saved import save_draft
from eagle.generate import main as allocation
from eagle.store import reshard as reassign_data_num
from eagle.train import main
from eagle.vllm import convert as convert_eagle_ckpt_to_vllm_compatible
from tests.e2e.commands import Answer, ask
from tests.e2e.conftest import contents, draft_of
from tools import get_quickstart_data


@pytest.fixture
def folder(tmp_path: Path, store: Path) -> Iterator[Path]:
    """A read-only folder with a finished store in it. Modes do not hold root back, but a read-only mount does."""
    path = tmp_path / "read-only"
    path.mkdir()
    mounted = os.geteuid() == 0
    if mounted and subprocess.run(["mount", "-t", "tmpfs", "tmpfs", path], capture_output=True, check=False).returncode:
        pytest.skip("root may write everywhere, and may not mount anything here")
    shutil.copytree(store, path / "store")
    if mounted:
        subprocess.run(["mount", "-o", "remount,ro", path], check=True)
    else:
        for place in (path / "store" / "0", path / "store", path):
            place.chmod(0o555)
    try:
        yield path
    finally:
        if mounted:
            subprocess.run(["umount", "-l", path], check=True)
        else:
            for place in (path, path / "store", path / "store" / "0"):
                place.chmod(0o755)


def check_refused(answer: Answer, flag: str, path: Path) -> None:
    said = answer.error
    assert answer.code == 2, answer
    assert f"error: {flag} {path} cannot be written to: " in said
    assert "Nothing was written or changed. Name a folder in which you may make files." in said
    assert "Traceback" not in said


@pytest.fixture
def words(llama: Path, data: Path) -> list[object]:
    return ["--model_name", llama, "--data_path", data, "--dtype", "float32"]


@pytest.mark.parametrize("name", ["new", "new/deeper", "store"])
def test_generation(
    folder: Path, words: list[object], store: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new store, and one that is there: to continue it, its folder must be written to."""
    answer = ask(allocation.main, capsys, *words, "--outdir", folder / name)
    check_refused(answer, "--outdir", folder / name)
    assert contents(folder / "store") == contents(store)
    assert [path.name for path in folder.iterdir()] == ["store"]


@pytest.mark.parametrize("name", ["new", "store"])
def test_resharding(folder: Path, store: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    to = folder / name
    answer = ask(reassign_data_num.main, capsys, "--old_folder", folder / "store", "--new_folder", to, "--tp", 2)
    check_refused(answer, "--new_folder", to)
    assert contents(folder / "store") == contents(store)


def test_training_export_and_evaluation(
    folder: Path, store: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_draft(draft_of(llama), tmp_path / "draft")
    before = contents(folder / "store")
    new = folder / "new"
    train = ["--tmpdir", store, "--basepath", llama]
    base = ["--base-path", llama, "--draft-path", tmp_path / "draft"]
    check_refused(ask(main.main, capsys, *train, "--cpdir", new), "--cpdir", new)
    check_refused(ask(evaluate.main, capsys, *base, "--output", new), "--output", new)
    check_refused(ask(get_quickstart_data.main, capsys, "--output-path", new), "--output-path", new)
    step_5 = convert_eagle_ckpt_to_vllm_compatible.main
    check_refused(ask(step_5, capsys, *base, "--output-path", new, "--layout", "both"), "--output-path", new)
    check_refused(ask(step_5, capsys, *base, "--output-path", new, "--layout", "v1"), "--output-path", folder)
    assert contents(folder / "store") == before and not new.exists()


@pytest.mark.parametrize("path", ["/proc/features", "/sys/features"])
def test_system_folders(path: str, words: list[object], store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not Path(path).parent.is_dir():
        pytest.skip(f"there is no {Path(path).parent} here")
    check_refused(ask(allocation.main, capsys, *words, "--outdir", path), "--outdir", Path(path))
    answer = ask(reassign_data_num.main, capsys, "--old_folder", store, "--new_folder", path, "--tp", 2)
    check_refused(answer, "--new_folder", Path(path))


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_folder_that_takes_no_files(
    tmp_path: Path, words: list[object], code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is there and only its first file fails, as on a share that is exported read-only."""

    def refused(**_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("eagle.files.tempfile.TemporaryFile", refused)
    check_refused(ask(allocation.main, capsys, *words, "--outdir", tmp_path), "--outdir", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_not_a_wrong_request(
    tmp_path: Path, words: list[object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("eagle.files.tempfile.TemporaryFile", full)
    answer = ask(allocation.main, capsys, *words, "--outdir", tmp_path)
    assert answer.code == 1 and "free some space and run again" in answer.error
