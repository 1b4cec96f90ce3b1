"""Checkpoints: ``cpdir/state_<step>/``, complete or absent, and the pointers ``best`` and ``last``.

    state_0/                                    what training starts from, where there is validation to judge it by
    state_<n>/config.json, model.safetensors    the draft; the folder loads by itself
    state_<n>/optimizer.pt                      what resuming needs: optimizer and schedule
    state_<n>/state.json                        step, epoch, metrics, what the run was

A pointer is a relative symbolic link, or a text file with the folder's name where the file system has no links.
"""

from __future__ import annotations

import errno
import math
import os
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eagle.drafts.families import DEFAULT_DRAFT, DRAFT_FAMILIES
from eagle.drafts.interface import DraftFamily
from eagle.drafts.network import DraftNetwork
from eagle.drafts.saved import (
    BEST,
    LAST,
    STATE,
    load_draft_config,
    load_trained_state,
    network_differences,
    read_draft_state,
    resolve_pointer,
    save_draft,
)
from eagle.errors import RequestError, WorkError
from eagle.files import fsync_folder, read_json, write_json
from eagle.store.damage import exhausted
from eagle.target.config import ModelConfig
from eagle.target.weights import Weights

OPTIMIZER = "optimizer.pt"
#: The checkpoint of a draft that was not trained yet.
START = "state_0"
_NAME = re.compile(r"state_(\d+)")
#: How torch says which function it will not call for a file that may hold tensors alone.
_UNKNOWN = re.compile(r"(?:GLOBAL|Unsupported class) ([\w.]+)")
#: How the hidden names of checkpoints end that are being deleted.
REMOVED = ".old.tmp"


#: A checkpoint's folder and its ``state.json``.
Saved = tuple[Path, dict[str, Any]]

#: What a global batch is dealt out by; their product is the run's, how it comes about is free.
DEALT = ("processes", "bs", "gradient_accumulation_steps")


@dataclass(frozen=True, slots=True)
class Position:
    """How far a run is: optimizer steps done, the epoch it is in, global batches done within that epoch."""

    step: int = 0
    epoch: int = 0
    batch: int = 0


def save(
    cpdir: Path,
    model: DraftNetwork,
    optimizer: dict[str, Any],
    position: Position,
    run: dict[str, Any],
    metrics: dict[str, Any],
    whole: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write ``state_<step>`` and point `last` at it. whole: the weights, where the model holds shards of them.

    Raises: WorkError where it cannot be written (disk full); the checkpoints before it stay as they are.
    """
    folder = cpdir / f"state_{position.step}"
    temporary = cpdir / f".{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_draft(model, temporary, whole)
        with (temporary / OPTIMIZER).open("wb") as opened:  # given its path, torch 2.1 holds the interpreter
            torch.save(optimizer, opened)
        content = {"step": position.step, "epoch": position.epoch, "batch": position.batch}
        write_json(temporary / STATE, content | {"metrics": metrics, "run": run})
        for file in temporary.iterdir():
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
    except (OSError, RuntimeError) as error:
        # torch hides a full disk in an error of its own ("enforce fail at inline_container.cc").
        reason = os.strerror(errno.ENOSPC) if shutil.disk_usage(cpdir).free < 1 << 20 else str(error)
        shutil.rmtree(temporary, ignore_errors=True)
        raise WorkError(
            f"Could not save {folder}: {reason}. The checkpoints before it are whole; make room and run the same "
            "command again to continue from the last one."
        ) from error
    _remove(folder)
    temporary.rename(folder)
    fsync_folder(cpdir)
    point(cpdir, LAST, folder.name)
    return folder


def point(cpdir: Path, pointer: str, name: str) -> None:
    """Make ``cpdir/<pointer>`` mean ``cpdir/<name>``, at once."""
    path, temporary = cpdir / pointer, cpdir / f".{pointer}.tmp"
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(name, target_is_directory=True)
    except OSError:
        temporary.write_text(name, encoding="utf-8")
    temporary.replace(path)


def states(cpdir: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [(int(match[1]), path) for path in cpdir.glob("state_*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def prune(cpdir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what is left of deleted and of half-written ones; what `best`
    and `last` point at stays."""
    for left in cpdir.glob(".state_*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    pinned = {resolve_pointer(cpdir / pointer).name for pointer in (BEST, LAST) if os.path.lexists(cpdir / pointer)}
    for path in states(cpdir)[:-keep]:
        if path.name not in pinned:
            _remove(path)


def _remove(folder: Path) -> None:
    """Delete a checkpoint; killed meanwhile, none is left that looks whole.

    What of it cannot be deleted now, as files that somebody has open on NFS cannot, `prune` tries again.
    """
    if not folder.is_dir():
        return
    number = 0
    while (hidden := folder.with_name(f".{folder.name}.{number}{REMOVED}")).exists():
        number += 1
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def load_last(cpdir: Path) -> Saved | None:
    """The newest checkpoint of a run and its ``state.json``; None for a folder without one."""
    found = states(cpdir)
    return (found[-1], read_json(found[-1] / STATE, "a checkpoint's state")) if found else None


def restore(folder: Path, model: DraftNetwork) -> dict[str, Any]:
    """Load a checkpoint's weights into `model`; returns the optimizer part. Raises: RequestError, WorkError."""
    state = read_draft_state(Weights(folder, flag="--cpdir"))
    own = {name: state[name] for name in model.own_state() if name in state}
    load_trained_state(model, own, str(folder))
    return _load_optimizer(folder)


def _load_optimizer(folder: Path) -> dict[str, Any]:
    """Raises: WorkError where it is missing or damaged, with the checkpoint to go on from instead; RequestError where
    it holds what this torch does not know, as other devices' tensors."""
    try:
        return torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle raises anything on a damaged file
        if found := exhausted(error, folder / OPTIMIZER):
            raise found from error
        if isinstance(error, PermissionError):
            raise
        if isinstance(error, pickle.UnpicklingError) and (unknown := _UNKNOWN.search(str(error))):
            raise RequestError(
                f"--cpdir {folder.parent}: {OPTIMIZER} of {folder.name} was written on another kind of device, by "
                f"{unknown[1]}, which is not known here. The file is whole: go on where such cards are, with the "
                "release of their torch plugin that wrote it."
            ) from error
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        before = [path.name for path in states(folder.parent) if path != folder]
        then = f"goes on from {before[-1]}" if before else "begins anew"
        raise WorkError(
            f"--cpdir {folder.parent}: {OPTIMIZER} of {folder.name}, from which the run was to go on, {what}. Move "
            f"{folder} away and run the same command again: it {then}."
        ) from error


def check_same_network(folder: Path, config: ModelConfig, family: DraftFamily) -> None:
    """config: of the draft that is to go on from the checkpoint.

    Raises: RequestError where the checkpoint's computes otherwise, though its weights may fit.
    """
    if differing := network_differences(load_draft_config(folder, family), config):
        raise RequestError(
            f"--cpdir {folder.parent} holds checkpoints of another draft: {'; '.join(differing)}. Repeat that run's "
            "--configpath (or leave it out as it did) to continue it, or name another folder."
        )


def check_same_run(cpdir: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """The global batch may be dealt out in another way: to other processes, in other micro-batches.

    Raises: RequestError where the checkpoint in `cpdir` belongs to a run with other data, base or options.
    """
    was, now = (run.get("draft", DEFAULT_DRAFT) for run in (saved, current))
    if was != now:
        raise RequestError(
            f"--cpdir {cpdir} holds checkpoints of another run, which trains {_described(was)} (--draft {was}), and "
            f"this is --draft {now}. Add --draft {was} and repeat that run's options to continue it, or name another "
            "folder."
        )
    differences = [
        f"{key} was {saved.get(key)!r}, now {current.get(key)!r}"
        for key in sorted((saved.keys() | current.keys()) - set(DEALT))
        if saved.get(key) != current.get(key)
    ]
    if _global_batch(saved) != _global_batch(current):
        differences.append(_other_global_batch(saved, current))
    if differences:
        lost = ""
        if [path.name for path in states(cpdir)] == [START]:
            lost = f" Nothing was trained in it yet: {START} is the untrained start, and the folder may be removed."
        raise RequestError(
            f"--cpdir {cpdir} holds checkpoints of another run: {'; '.join(differences)}. Repeat that run's options to "
            f"continue it, or name another folder.{lost}"
        )


def _described(draft: str) -> str:
    return DRAFT_FAMILIES[draft].describes if draft in DRAFT_FAMILIES else "a draft of a kind that is not known here"


def _global_batch(run: dict[str, Any]) -> int:
    """Sequences an optimizer step."""
    return math.prod(run.get(name, 1) for name in DEALT)


def _other_global_batch(saved: dict[str, Any], current: dict[str, Any]) -> str:
    """How the global batches of two runs came about, and what makes the old one with the processes of now."""
    was, now = (
        f"{_global_batch(run)} sequences ({run.get('processes', 1)} processes x --bs {run.get('bs', 1)} x "
        f"--gradient_accumulation_steps {run.get('gradient_accumulation_steps', 1)})"
        for run in (saved, current)
    )
    wanted, processes = _global_batch(saved), current.get("processes", 1)
    if wanted % processes:
        cure = f"{processes} processes cannot share that, a divisor of {wanted} can"
    else:
        each = wanted // processes
        # The largest micro-batches that are no larger than before, which fitted.
        bs = max(size for size in range(1, each + 1) if each % size == 0 and size <= saved.get("bs", 1))
        cure = f"with {processes} processes --bs {bs} --gradient_accumulation_steps {each // bs} makes that"
    return f"the global batch was {was}, now {now}; {cure}"
