"""The manifest of a resharded store: what it was made of, and whether a folder has been made of the same before."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

from eagle.errors import RequestError, WorkError
from eagle.files import read_json
from eagle.store.completeness import LACKED, MIXED, wrong_counts
from eagle.store.manifest import DONE, MANIFEST
from eagle.store.reader import FeatureStore
from eagle.store.replacing import Part
from eagle.store.shard import FORMAT_VERSION, Shard, shard_paths

#: The files that records came from, where nothing names the target that their features are of.
_FILES = "files_digest"

#: Of a manifest: what the records are, by which a store that was made anew is told from the one that was resharded.
_MADE_OF = (
    "target", "tokenizer", "data", "dtype", "features", "options", "engine", "records", "tokens", "complete",
    LACKED, MIXED, _FILES, "resharded_from", "resharded_into",
)  # fmt: skip


def made_before(store: FeatureStore, new: Path, parts: int) -> list[Part] | None:
    """What `new` holds, where a run of the same command on the same records has come to its end before.

    Raises: WorkError where some of that is lost or damaged.
    """
    path = new / MANIFEST
    manifest = read_json(path, "a store's manifest") if path.is_file() else {}
    wanted = resharded_manifest(store, parts)
    if any(manifest.get(key) != wanted.get(key) for key in _MADE_OF):
        return None
    folders = [new / str(part) for part in range(parts)]
    lost = [f"{folder / DONE} is not there." for folder in folders if not (folder / DONE).is_file()]
    shards = [Shard(file) for folder in folders for file in shard_paths(folder)]
    if wrong := lost + wrong_counts(new, {path: manifest}, shards):
        raise WorkError(
            f"--new_folder {new} was made before, from the same store, and is not whole any more: {' '.join(wrong)} "
            "Delete it and run the same command again."
        )
    done = [read_json(folder / DONE, "a part's counts") for folder in folders]
    return [Part(part["records"], part["tokens"]) for part in done]


def resharded_manifest(store: FeatureStore, parts: int) -> dict:
    """Of the store that `store` becomes in so many folders. Raises: RequestError for stores that do not go together."""
    merged = _merged(list(store.manifests.values()), store) if store.manifests else _of_dumps(store)
    if merged["target"].get("fingerprint") is None:
        merged[_FILES] = _files_digest(store)
    return merged | {"resharded_from": str(store.folder.resolve()), "resharded_into": parts}


def _of_dumps(store: FeatureStore) -> dict:
    return {
        "format_version": FORMAT_VERSION,
        "target": {"name": None, "fingerprint": None, "hidden_size": store.hidden_size},
        "data": {"path": str(store.folder), "digest": None},
        "records": len(store),
        "tokens": store.tokens,
        "complete": True,
    }


def _merged(manifests: list[dict], store: FeatureStore) -> dict:
    """One manifest for everything in the store: that of its only job, or of jobs over the same data and target."""
    first = manifests[0]
    differ = any(_is_of(one) != _is_of(first) for one in manifests)
    # Dumps beside it would be taken for conversations of its data: they are numbered from 0, too.
    if differ or store.data_digests() != {first["data"]["digest"] or ""}:
        raise RequestError(
            f"--old_folder {store.folder} holds stores of different data or targets, or dumps beside a store; reshard "
            "them one by one."
        )
    merged = dict(first)
    for key in ("dropped", "repaired"):
        merged[key] = dict(sum((Counter(manifest.get(key, {})) for manifest in manifests), Counter()))
    if "mixture" in first:  # of each source what the nodes have of it together
        rows = zip(*(manifest.get("mixture", []) for manifest in manifests), strict=False)
        merged["mixture"] = [
            {key: value if key in ("path", "share") else sum(own[key] for own in row) for key, value in row[0].items()}
            for row in rows
        ]
    merged |= {"records": len(store), "tokens": store.tokens}
    if "supervised_tokens" in first:
        merged["supervised_tokens"] = sum(manifest.get("supervised_tokens", 0) for manifest in manifests)
    merged["complete"] = not store.unfinished()
    merged |= {
        name: found for name, found in ((LACKED, store.missing_nodes()), (MIXED, store.differing_nodes())) if found
    }
    return merged


def _is_of(manifest: dict) -> tuple[str | None, dict]:
    """The data and the target of a job, wherever the target's folder was."""
    return manifest["data"]["digest"], {**manifest["target"], "name": None}


def _files_digest(store: FeatureStore) -> str:
    """sha256 over names, sizes and times of the store's files, which is all that is known without reading them."""
    digest = hashlib.sha256()
    for file in sorted(file for source in store.sources for file in source.files):
        status = file.stat()
        digest.update(f"{file.relative_to(store.folder)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
