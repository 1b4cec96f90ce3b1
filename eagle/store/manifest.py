"""A store's manifest: what made the store, and the names of the other files in its folders."""

from __future__ import annotations

from pathlib import Path

from eagle.errors import RequestError
from eagle.files import read_json
from eagle.store.shard import FORMAT_VERSION
from eagle.target.features import HIDDEN_STATE

MANIFEST = "manifest.json"
DONE = "done.json"
LOG = "worker.log"

#: The options of ``allocation.py`` that decide what the records are, and that the nodes of one job have in common. Not
#: what a chat template's file is called: its text is in the tokenizer's digest.
NODES_SHARE = (
    "conversations", "seed", "max_length", "chat_template_kwargs", "store_dtype", "shares", "feature_source",
    "engine_args",
)  # fmt: skip

#: Folders a reshard leaves when it is interrupted after it began to change the store (see `eagle.store.reshard`).
INTERRUPTED_RESHARD = (".reshard-deleting", ".reshard-moving")


def describe_features(data_digest: str, dtype: str, stored_as: str, told: str = "") -> str:
    """Features of one data file, for a person and to be compared; empty digest: unknown data.

    told: the variables of its chat template, where it was given any.
    """
    rendered = f", its chat template told {told}" if told else ""
    return f"{dtype} stored as {stored_as}, of data {data_digest[:12] or '?'}{rendered}"


def check_no_reshard(folder: Path, flag: str) -> None:
    """Raises: RequestError where a reshard was interrupted after it began to change the folder, or one above it."""
    for place in (folder, *folder.resolve().parents):
        if any((place / name).is_dir() for name in INTERRUPTED_RESHARD):
            raise interrupted(folder, flag, place)


def interrupted(folder: Path, flag: str, where: Path) -> RequestError:
    """That a reshard was interrupted. flag: what named the folder; where: the one that is resharded."""
    return RequestError(
        f"{flag} {folder}: resharding was interrupted {'here' if where == folder else f'in {where}'}. Nothing is lost; "
        "run the same reassign_data_num.py command again to finish it."
    )


def read_manifest(path: Path) -> dict:
    """Raises: RequestError for a file that is not a manifest or of a newer format."""
    try:
        manifest = read_json(path, "a store's manifest")
    except RequestError as error:
        raise RequestError(
            f"{error} It is damaged: restore it from a copy. Without it the records can be used, but not continued: "
            "move it out of the way."
        ) from error
    if manifest.get("format_version") != FORMAT_VERSION:
        raise RequestError(
            f"{path}: store format {manifest.get('format_version')!r}; this version reads format {FORMAT_VERSION}."
        )
    # Those of version 0.1 do not name their features, which are the last hidden states only.
    return {"features": {HIDDEN_STATE: manifest.get("target", {}).get("hidden_size")}, **manifest}
