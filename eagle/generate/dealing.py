"""Who computes what of a job: shares, as long as the number of workers stays; else what is left, dealt anew.

A job begins with shares: its usable rows dealt in turn to its workers, each of which writes its own in one order
(`Tokens.share`). With the same number of workers a share is continued where its shards end, so that an interrupted job
writes, to the bit, what an undisturbed one does (`eagle.generate.progress`).

With another number of workers, what no finished shard holds is dealt to those that are there now; which rows these are
is read off the shards of all folders, by their rows' ids. From then on the manifest says ``redealt``, every start deals
again, and the parent leaves the places that are left to the workers in the job's folder (``.left.safetensors``), since
each would find others while the rest of them are writing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from eagle.data.mixture import choose
from eagle.data.tokens import Tokens
from eagle.errors import WorkError
from eagle.files import read_json, write_json
from eagle.generate.progress import finished, missing
from eagle.store.manifest import DONE, MANIFEST, read_manifest
from eagle.store.shard import Shard, shard_paths
from eagle.tensor_file import write_tensors

LEFT = ".left.safetensors"
_COUNTS = ("records", "tokens", "supervised_tokens")

#: Of a manifest: what went on with the job that `made_by` and `engine` began, where that was another.
CONTINUED = "continued_by"

#: The options that may change while a job goes on; what a template's file is called, for its text is in the digest.
FREE_OPTIONS = ("batch_tokens", "workers", "chat_template")


def job_share(manifest: dict) -> np.ndarray:
    """The conversations that all nodes compute together, as indices into the data, in the job's order."""
    options, data = manifest["options"], manifest["data"]
    sizes = [source["records"] for source in data.get("sources", [data])]
    return choose(options["seed"], sizes, options["conversations"], options.get("shares"))


def node_share(manifest: dict) -> Sequence[int]:
    """Those of them that one node computes: they are dealt out to the nodes in turn."""
    options = manifest["options"]
    return job_share(manifest)[options["node_rank"] :: options["num_nodes"]].tolist()


def worker_folders(store: Path) -> list[Path]:
    """The folders of all workers that a job ever had."""
    if not store.is_dir():
        return []
    return sorted(
        (path for path in store.iterdir() if path.name.isdecimal() and path.is_dir()), key=lambda p: int(p.name)
    )


def has_shards(store: Path) -> bool:
    """Whether any worker has finished one."""
    return any(shard_paths(folder) for folder in worker_folders(store))


def is_redealt(store: Path, workers: int) -> bool:
    """Whether so many workers go on with what is left of the job in that folder, and not each with its share."""
    path = store / MANIFEST
    if not path.is_file() or not has_shards(store):
        return False
    manifest = read_manifest(path)
    return manifest.get("redealt", False) or manifest["options"]["workers"] != workers


def held_places(tokens: Tokens, manifest: dict, store: Path) -> Iterator[tuple[Path, np.ndarray]]:
    """Every finished shard of the job, and the places of the rows that it holds.

    Raises: WorkError for a damaged shard, for one of another job, and for a row that is there twice.
    """
    usable, lengths = np.flatnonzero(tokens.lengths), tokens.lengths
    ids = np.array(tokens.ids(usable.tolist(), node_share(manifest), manifest["data"]["records"]), dtype=np.int64)
    order = np.argsort(ids)
    ids, usable = ids[order], usable[order]
    is_held = np.zeros(len(ids), dtype=bool)
    for path in (path for folder in worker_folders(store) for path in shard_paths(folder)):
        shard = Shard(path)
        at = np.searchsorted(ids, shard.conversations)
        foreign = at == len(ids)
        at[foreign] = 0
        foreign[~foreign] = ids[at[~foreign]] != shard.conversations[~foreign]
        foreign[~foreign] = lengths[usable[at[~foreign]]] != shard.lengths[~foreign]
        if foreign.any():
            raise WorkError(
                f"{path} holds conversation {shard.conversations[foreign][0]}, which this job has not, or with other "
                "tokens. Was it copied here from another store? Delete it and run the same command again."
            )
        if is_held[at].any() or len(np.unique(at)) < len(at):
            raise WorkError(
                f"{path} holds conversations that another shard of this store holds too. Was it copied, or were two "
                "jobs at work? Delete it and run the same command again, which computes what is then missing."
            )
        is_held[at] = True
        yield path, usable[at]


def left_places(tokens: Tokens, manifest: dict, store: Path) -> np.ndarray:
    """The places of the usable rows that no finished shard holds, in the job's order. Raises: as `held_places`."""
    is_left = tokens.lengths > 0
    for _, places in held_places(tokens, manifest, store):
        is_left[places] = False
    return np.flatnonzero(is_left)


def dealt(tokens: Tokens, left: np.ndarray, worker: int, workers: int) -> list[int]:
    """Those of the places that are left which a worker computes, in its order."""
    return tokens.in_order(left[worker::workers])


def left_by_worker(tokens: Tokens, manifest: dict, store: Path, workers: int) -> list[list[int]]:
    """What each of so many workers has to compute, by place. Raises: WorkError (a damaged or foreign shard)."""
    if is_redealt(store, workers):
        left = left_places(tokens, manifest, store)
        return [dealt(tokens, left, worker, workers) for worker in range(workers)]
    found = []
    for worker in range(workers):
        share = tokens.share(worker, workers)
        found.append([place for stretch in missing(store / str(worker)) for place in stretch.of(share)])
    return found


def begin(tokens: Tokens, manifest: dict, store: Path) -> None:
    """Have the job's folder say who computes what, and of which folder's model, before the workers start.

    manifest: this command's. Each step leaves a folder that another start, with any number of workers, begins from.

    Raises: WorkError (a damaged or foreign shard), OSError.
    """
    options = {name: manifest["options"][name] for name in FREE_OPTIONS}
    before = read_manifest(store / MANIFEST)
    # The same model by its fingerprint, which was checked in the folder that this command names and in no other.
    target = before["target"] | {"name": manifest["target"]["name"]}
    after = {**before, "target": target, "options": before["options"] | options, "complete": False, "redealt": True}
    own = made_by(manifest)
    if own != (before.get(CONTINUED) or [made_by(before)])[-1]:
        after[CONTINUED] = [*before.get(CONTINUED, []), own]
    redealt = is_redealt(store, options["workers"])
    if redealt:
        temporary = store / f"{LEFT}.tmp"
        write_tensors(temporary, {"left": torch.from_numpy(left_places(tokens, manifest, store))})
        temporary.replace(store / LEFT)
    else:
        del after["redealt"]
    if after != before:
        write_json(store / MANIFEST, after)
    if redealt or before.get("redealt") or before["options"]["workers"] != options["workers"]:
        forget_done(store)  # what was finished is no share any more


def made_by(manifest: dict) -> dict:
    """What computes by that manifest: versions and command, and the engine where it is one."""
    return {name: manifest[name] for name in ("made_by", "engine") if name in manifest}


def forget_done(store: Path) -> None:
    """Take away what workers said when they had finished, and what they were writing when they were killed."""
    for folder in worker_folders(store):
        for file in (folder / DONE, folder / f".{DONE}.tmp", *folder.glob(".shard-*.tmp")):
            file.unlink(missing_ok=True)


def read_left(store: Path) -> np.ndarray:
    """What `begin` found to be left."""
    return load_file(store / LEFT)["left"]


def is_done(store: Path) -> bool:
    """Whether the store holds all that its job is to compute, as its workers or the manifest counted it."""
    manifest = read_manifest(store / MANIFEST)
    if not manifest.get("redealt"):
        return all(finished(store / str(worker)) for worker in range(manifest["options"]["workers"]))
    if not manifest["complete"]:
        return False
    found = {"records": 0, "tokens": 0}
    for folder in worker_folders(store):
        own = {"records": 0, "tokens": 0}
        for shard in map(Shard, shard_paths(folder)):
            own = {"records": own["records"] + len(shard), "tokens": own["tokens"] + shard.tokens}
        if own["records"] and not _promises(folder / DONE, own):
            return False
        found = {name: count + own[name] for name, count in found.items()}
    return _promises(store / MANIFEST, found)


def _promises(path: Path, found: dict[str, int]) -> bool:
    return path.is_file() and found.items() <= read_json(path, "a worker's counts").items()


def count_redealt(tokens: Tokens, manifest: dict, store: Path) -> dict[str, int]:
    """See that the shards hold every row once, have each folder say how much it holds, and return the sums.

    Raises: WorkError where something is missing, or as `held_places`.
    """
    usable, offsets = np.flatnonzero(tokens.lengths), tokens.offsets
    supervised = np.zeros(len(tokens), dtype=np.int64)
    for rows in (usable[at : at + 4096] for at in range(0, len(usable), 4096)):  # numpy widens what it adds up
        first, end = offsets[rows[0]], offsets[rows[-1] + 1]
        supervised[rows] = np.add.reduceat(tokens.loss_mask[first:end], offsets[rows] - first, dtype=np.int64)
    nothing, lengths = np.zeros(3, dtype=np.int64), tokens.lengths
    counts: dict[Path, np.ndarray] = {}
    for path, places in held_places(tokens, manifest, store):
        own = np.array([len(places), lengths[places].sum(), supervised[places].sum()])
        counts[path.parent] = counts.get(path.parent, nothing) + own
    total = sum(counts.values(), nothing)
    if total[0] < len(usable):
        raise WorkError(
            f"{store} lacks {len(usable) - int(total[0]):,} records though every worker has finished. Was a shard "
            "deleted meanwhile? Run the same command again, which computes them."
        )
    for folder, own in counts.items():
        write_json(folder / DONE, dict(zip(_COUNTS, own.tolist(), strict=True)))
    return dict(zip(_COUNTS, total.tolist(), strict=True))
