"""What the processes of a run must see alike, compared before it starts: command, base model, records, checkpoint.

Where one of them reads other data or another checkpoint, it trains on other batches or goes on from another step, and
sooner or later all wait for a collective that never comes.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import accelerate
import torch
import transformers

from eagle import __version__
from eagle.train.checkpoint import Position
from eagle.train.live_features import LiveFeatures
from eagle.train.loop import Trainer
from eagle.train.sharding import is_sharded

#: Options that may differ from machine to machine: where things are, and what a process does by itself.
OWN = (
    "tmpdir", "data_path", "cpdir", "basepath", "configpath", "chat_template", "num_workers", "dry_run",
    "engine_python", "engine_cards",
)  # fmt: skip

_COMMAND, _SEES, _VERSIONS = "command", "sees", "versions"

#: What is compared beside the command, in this order: what it is, and what helps where it differs.
_CURES = {
    "device": "Start all processes on the same kind of device, with the same precision and accelerate configuration.",
    "base model": "--basepath has to be the same model on every machine: a shared folder, or whole copies of one.",
    "draft": "--configpath has to be the same file on every machine.",
    "records": "--tmpdir (or --data_path) has to hold the same on every machine: name a shared folder, or whole copies "
    "of one, and where it is still being written, wait until that is done.",
    "checkpoint": "--cpdir has to be one folder that all machines share: rank 0 writes the checkpoints, and all read "
    "them. Where the machines have folders of their own, copy rank 0's to the others.",
}


def describe(trainer: Trainer, saved: Mapping[str, Any] | None) -> dict[str, Any]:
    """What this process was asked for and has found, to compare. saved: the ``state.json`` that it would go on from."""
    options = trainer.options.to_json()
    train, held_out = trainer.train_set, trainer.validation_set
    store = train.store
    contents = (store.lengths, store.groups, train.indices, held_out.indices)
    position = Position(saved["step"], saved["epoch"], saved["batch"]) if saved else None
    return {
        _COMMAND: {f"--{name}": value for name, value in options.items() if name not in OWN},
        _SEES: {
            "device": {
                "device": trainer.accelerator.device.type,
                "mixed precision": trainer.accelerator.mixed_precision,
                "sharing": "FSDP" if is_sharded() else "none",
            },
            "base model": {"fingerprint": trainer.run["target"]},
            "draft": {"config": _digest(json.dumps(trainer.draft.config.to_json(), sort_keys=True).encode())},
            "records": {
                "records": len(store),
                "tokens": store.tokens,
                "features": ", ".join(store.identity()),
                "lengths and conversations": _digest(*(array.astype("<i8").tobytes() for array in contents)),
                **({"their tokens": store.token_digest()} if isinstance(store, LiveFeatures) else {}),
            },
            "checkpoint": {
                "newest": f"state_{position.step} (epoch {position.epoch}, batch {position.batch})"
                if position
                else "none",
                "its run": _digest(json.dumps(saved["run"], sort_keys=True).encode()) if saved else "none",
            },
        },
        _VERSIONS: {
            "eagle": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        },
    }


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return f"sha256 {digest.hexdigest()[:16]}"


def disagreement(said: Sequence[Mapping[str, Any]]) -> str | None:
    """How the first rank that differs from rank 0 does, and what helps; None where all agree.

    said: by rank, what `describe` tells and its ``host``.
    """
    first = said[0]
    for rank, one in enumerate(said):
        changed = _changes(first[_COMMAND], one[_COMMAND])
        # Other differences follow from other options.
        found = [f"the command: {changed}. Start every process with the same command."] if changed else []
        for name, cure in _CURES.items() if not found else ():
            if changed := _changes(first[_SEES][name], one[_SEES][name]):
                found.append(f"the {name}: {changed}. {cure}")
        if found:
            others = sum(_is_different(first, other) for other in said) - 1
            more = f" {others} more differ{'s' * (others == 1)} too." if others else ""
            return (
                f"rank {rank} (host {one['host']}) differs from rank 0 (host {first['host']}) in "
                f"{' And in '.join(found)}{more} Nothing was trained or written."
            )
    return None


def _changes(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{name} is {_said(theirs.get(name))} there and {_said(value)} on rank 0"
        for name, value in ours.items()
        if theirs.get(name) != value
    )


def _said(value: object) -> str:
    return "not given" if value is None else str(value)


def _is_different(first: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return first[_COMMAND] != other[_COMMAND] or first[_SEES] != other[_SEES]


def remarks(said: Sequence[Mapping[str, Any]]) -> list[str]:
    """Notes on ranks with other versions than rank 0's: they may train, and may not be the same to the last bit."""
    first = said[0]
    return [
        f"rank {rank} (host {one['host']}) has other versions: {changed}"
        for rank, one in enumerate(said)
        if (changed := _changes(first[_VERSIONS], one[_VERSIONS]))
    ][:3]
