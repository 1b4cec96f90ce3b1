"""Held-out conversations of a store, each with the prompt that it was trained behind and the one that is served."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from eagle.data.cleaning import Dropped, Message, Tally, clean_record
from eagle.data.loss_mask import Encoder
from eagle.data.mixture import open_data
from eagle.data.prompts import encode_messages
from eagle.data.reader import are_records
from eagle.data.template_variables import parse_kwargs
from eagle.errors import RequestError, WorkError
from eagle.store.reader import FeatureStore
from eagle.store.record import Record
from eagle.train.dataset import split_store, usable_records


@dataclass(frozen=True, slots=True)
class Conversation:
    """record: cut to what training and the engine take. stored: the tokens before its first reply that is trained, as
    training has them. served: what a server makes of the same messages, None where that is not known. as_told: what it
    would make of them with the template's variables of the store."""

    record: Record
    stored: list[int]
    served: list[int] | None
    as_told: list[int] | None


@dataclass(frozen=True, slots=True)
class HeldOut:
    """manifest: of the store (of several the first one's), empty for classic dumps. unknown: why the served prompts are
    not known, "" where they are. in_split: whether the conversations are those that training held out; else training
    has seen them. too_long: how many more there were, whose prompts the engine has no room for."""

    conversations: list[Conversation]
    manifest: dict[str, Any]
    unknown: str = ""
    in_split: bool = True
    too_long: int = 0


def held_out(
    store: FeatureStore,
    encoder: Callable[[dict[str, Any]], Encoder],
    *,
    count: int,
    val_ratio: float,
    seed: int,
    max_len: int,
    longest: int,
    data_path: Sequence[Path] = (),
) -> HeldOut:
    """`count` conversations at most, evenly over those that training held out with this split.

    encoder: the served one, from the store's manifest, which knows the day that a dated template was told. longest:
    tokens that the engine takes. data_path: where the conversations are, empty for where the manifest says.

    Raises: RequestError where no record is of use, or --data_path is not what the store was made from.
    """
    where = f"--tmpdir {store.folder}"
    usable, _ = usable_records(store, max_len, where)
    train, validation = split_store(store, val_ratio, seed, usable)
    chosen = validation if len(validation) else train
    chosen = chosen[np.unique(np.linspace(0, len(chosen) - 1, min(count, len(chosen))).round().astype(int))]
    # Stores of several data files may lie side by side.
    manifests = {(one.get("data") or {}).get("digest", ""): one for one in reversed(store.manifests.values())}
    served = {digest: _served_prompts(one, data_path, encoder) for digest, one in manifests.items()}
    prompts = {digest: prompt for digest, (prompt, _) in served.items() if prompt is not None}
    unknown = next((why for prompt, why in served.values() if prompt is None), "")
    if data_path and not prompts:
        named = " ".join(map(str, data_path))
        raise RequestError(f"--data_path {named}: {unknown or 'the store does not say what it was made from'}.")
    found, too_long = [], 0
    for index in chosen.tolist():
        record = store[index].cut(max_len)
        replies = record.loss_mask.nonzero().flatten().tolist()
        if replies and replies[0] >= longest:
            too_long += 1
        elif replies and replies[0] > 0:
            record = record.cut(longest)
            stored = record.input_ids[: replies[0]].tolist()
            prompt = prompts.get(store.data_of(index))
            serving, as_told = prompt(record) if prompt else (None, None)
            serving = serving if serving and len(serving) <= longest else None
            found.append(Conversation(record, stored, serving, as_told))
    if too_long and not found:
        raise RequestError(
            f"{where}: the prompts of its {too_long} held-out conversations are longer than the {longest} tokens that "
            "--max_new_tokens leaves room for. Lower it."
        )
    if not found:
        raise RequestError(f"{where}: none of its {len(chosen)} held-out conversations has a prompt before its reply.")
    if all(one.served is None for one in found):
        unknown = unknown or "none of these conversations is one of messages"
    manifest = next(iter(store.manifests.values()), {})
    return HeldOut(found, manifest, unknown, bool(len(validation)), too_long)


def told_to(manifest: dict[str, Any]) -> str | None:
    """The variables that the chat template was told for a store, as they are typed; None for none."""
    return (manifest.get("options") or {}).get("chat_template_kwargs")


#: The served prompt before the first trained reply of a record; and with the variables of the store.
_Prompts = Callable[[Record], tuple[list[int] | None, list[int] | None]]


def _served_prompts(
    manifest: dict[str, Any], data_path: Sequence[Path], encoder: Callable[[dict[str, Any]], Encoder]
) -> tuple[_Prompts | None, str]:
    """What gives them; or why there is no such."""
    data = manifest.get("data") or {}
    if not data.get("digest"):
        return None, "the store does not say of which conversations it is"
    known = data["path"] if isinstance(data["path"], list) else [data["path"]]
    paths = list(map(str, data_path)) or known
    cure = f"name all {len(known)} with --data_path, in this order" if len(known) > 1 else "name it with --data_path"
    if missing := [path for path in paths if not are_records(Path(path))]:
        return None, f"{missing[0]} is not there; {cure}"
    opened = open_data(tuple(paths) if len(paths) > 1 else Path(paths[0]), None, allow_truncated=True)
    if opened.digest != data["digest"]:
        return None, f"{' '.join(paths)} is not what the store was made from, {' '.join(known)}; {cure}"
    serving, records = encoder(manifest), opened.records
    told = copy.copy(serving)
    told.variables = parse_kwargs(told_to(manifest)) or {}

    def prompts(row: Record) -> tuple[list[int] | None, list[int] | None]:
        conversation = row.conversation
        if conversation >= len(records):
            return None, None  # a further row, of a later reply
        try:
            messages = clean_record(records[conversation], Tally())
        except Dropped:
            return None, None  # tokens already
        except ValueError as error:
            raise WorkError(f"{paths[0]}: record {conversation} cannot be read ({error}).") from error
        before = messages[: reply_of(row, messages, told)]
        return _encoded(before, serving), _encoded(before, told)

    return prompts, ""


def reply_of(row: Record, messages: list[Message], encoder: Encoder) -> int:
    """Which of a conversation's messages the first trained reply of its first row is.

    A reply that cannot be trained (it lacks the reasoning that the prompt begins, or is too short) gives no row, and
    the first row is of a later reply. Which, its prompt says, or where the encoder makes another one, what is said.
    Where that is no reply's, the tokenizer is another, and the first reply is taken.
    """
    trained = [at for at, one in enumerate(messages) if one["role"] == "assistant" and "weight" not in one]
    own = row.loss_mask.nonzero().flatten().tolist()
    begin = own[0]
    end = next((before + 1 for before, after in pairwise(own) if after > before + 1), own[-1] + 1)
    stored = row.input_ids[:begin].tolist()
    said = encoder.tokenizer.decode(row.input_ids[begin:end], skip_special_tokens=True).strip()
    replies = {at: messages[at]["content"].strip() for at in trained}
    known = (
        *(at for at in trained if len(trained) > 1 and _encoded(messages[:at], encoder) == stored),
        *(at for at, reply in replies.items() if said and reply.endswith(said)),
        *(at for at, reply in replies.items() if said and said in reply),  # the row is cut
        trained[0],
    )
    return known[0]


def _encoded(messages: list[Message], encoder: Encoder) -> list[int] | None:
    try:
        return encode_messages(messages, encoder)
    except Dropped:
        return None  # the served template refuses it
