"""What a record may be, and how it becomes tokens: a conversation for the encoder, or tokens already.

    {"conversations": [...]}                        `eagle.data.cleaning` -> messages -> `eagle.data.rows` -> tokens
    {"input_ids": [...], "loss_mask": [0, 1, ...]}  taken as they are: no template, no tokenizer; lists of lists are
                                                    several rows of one conversation
    alpaca, ultrachat, a question and a reply       left out by name: step 2 converts them

`TOKEN_SOURCES` is the only place that knows the kinds; everybody else hands a record to `encode_record` or
`align_record`. Whatever goes wrong with a record is a reason to leave it out, never the end of a job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eagle.data.cleaning import CONVERSATION_NAMES, Dropped, Tally, clean_record, described, first_of
from eagle.data.json_file import TooDeep
from eagle.data.loss_mask import Aligned, Encoded, Encoder, cut, is_supervised
from eagle.data.reader import convert_command
from eagle.data.record_file import Records
from eagle.data.rows import aligned_rows, rows_of
from eagle.data.sharegpt.formats import TURN_NAMES, Columns, is_turn, shapes_of
from eagle.errors import RequestError, WorkError


@dataclass(frozen=True, slots=True)
class TokenSource:
    """One kind of record.

    handles: whether a record is of this kind. encode: the rows of tokens that it gives, each cut to a length, what was
    mended being counted. align: the same whole, and their text, for people. Both raise Dropped for a record that cannot
    be used.
    """

    handles: Callable[[Any], bool]
    encode: Callable[[Any, Encoder, int, Tally], list[Encoded]]
    align: Callable[[Any, Encoder, int | None], list[Aligned]]


def encode_record(records: Records, index: int, encoder: Encoder, max_length: int, tally: Tally) -> list[Encoded]:
    """Record `index` as rows of at most `max_length` tokens, one at least; nearly always one. Raises: Dropped."""
    with _any_failure_drops():
        record = _read(records, index)
        rows = _source(record).encode(record, encoder, max_length, tally)
    if any(row.input_ids.max() >= encoder.vocab_size for row in rows):  # a text may spell out a token without a row
        raise Dropped("token_without_row")
    return rows


def align_record(records: Records, index: int, encoder: Encoder, max_length: int | None = None) -> list[Aligned]:
    """The tokens of the rows of record `index`, and their text: all, or at least `max_length`. Raises: Dropped."""
    with _any_failure_drops():
        record = _read(records, index)
        return _source(record).align(record, encoder, max_length)


def refuse_other_formats(records: Records, indices: Iterable[int], path: Path, flag: str = "--data_path") -> None:
    """Raises: RequestError where every one of these records is of a format that step 2 converts."""
    shapes: set[str] = set()
    for index in indices:
        try:
            record = records[index]
        except ValueError:
            return
        if _source(record) is not TOKEN_SOURCES["other formats"]:
            return
        if is_turn(record) and not records.is_array:  # lines that are turns are no conversation
            return
        shapes.update(_other_shapes(record))
    if shapes:
        raise RequestError(
            f"{flag} {path} is of another format ({', '.join(sorted(shapes))}), which step 2 converts: "
            f"{convert_command(path)}"
        )


@contextmanager
def _any_failure_drops() -> Iterator[None]:
    """What a record makes anything raise is the record's, but for what is no matter of records. Raises: Dropped."""
    try:
        yield
    except (Dropped, RequestError, WorkError, OSError, MemoryError, ImportError):
        raise
    except Exception as error:
        raise Dropped("record_failed", described(error)) from error


def _read(records: Records, index: int) -> Any:
    try:
        return records[index]
    except TooDeep:
        raise Dropped("nested_too_deeply") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise Dropped("invalid_json", described(error)) from None


def _source(record: Any) -> TokenSource:
    return next(source for source in TOKEN_SOURCES.values() if source.handles(record))


def is_tokens(record: Any) -> bool:
    """Both lists; or one of them where there is no conversation either, so that the report says what is amiss."""
    if not isinstance(record, dict):
        return False
    there = [record.get(name) is not None for name in ("input_ids", "loss_mask")]
    return all(there) or (any(there) and first_of(record, *CONVERSATION_NAMES) is None)


def _checked_rows(record: dict[str, Any], encoder: Encoder) -> list[tuple[np.ndarray, np.ndarray]]:
    """input_ids ``[T]`` int32 and loss_mask ``[T]`` uint8 of each of a record's rows. Raises: Dropped."""
    ids, mask = record.get("input_ids"), record.get("loss_mask")
    if not (isinstance(ids, list) and isinstance(mask, list) and len(ids) == len(mask)):
        raise Dropped("bad_tokens")
    if ids and all(isinstance(row, list) for row in ids):
        return [_checked_tokens(*row, encoder) for row in zip(ids, mask, strict=True)]
    return [_checked_tokens(ids, mask, encoder)]


def _checked_tokens(ids: list[Any], mask: Any, encoder: Encoder) -> tuple[np.ndarray, np.ndarray]:
    if not (isinstance(mask, list) and len(ids) == len(mask)):
        raise Dropped("bad_tokens")
    # By type, since True is an int and 1.0 equals one; a token out of range would end the job in the embedding.
    if not all(type(token) is int and 0 <= token < encoder.vocab_size for token in ids):
        raise Dropped("bad_tokens")
    if not all(type(flag) in (int, bool) and 0 <= flag <= 1 for flag in mask):
        raise Dropped("bad_tokens")
    return np.array(ids, dtype=np.int32), np.array(mask, dtype=np.uint8)


def _encode_tokens(record: Any, encoder: Encoder, max_length: int, tally: Tally) -> list[Encoded]:
    rows, dropped = [], None
    cuts = Tally()
    for ids, mask in _checked_rows(record, encoder):
        try:
            rows.append(cut(ids, mask, max_length, cuts))
        except Dropped as why:  # the other rows are still good
            dropped = why if dropped is None or why.reason == "reply_beyond_max_length" else dropped
    if not rows:
        assert dropped
        raise dropped
    if cuts.repaired or (dropped and dropped.reason == "reply_beyond_max_length"):
        tally.repaired["cut_to_max_length"] += 1
    return rows


def _align_tokens(record: Any, encoder: Encoder, at_least: int | None) -> list[Aligned]:
    aligned = []
    for ids, mask in _checked_rows(record, encoder):
        if is_supervised(mask[:at_least]):  # the others are not trained
            text, offsets = _decode(ids.tolist(), encoder.tokenizer)
            aligned.append(Aligned(text, ids, mask, offsets))
    return aligned


def _decode(ids: list[int], tokenizer: Any) -> tuple[str, np.ndarray]:
    """The text of tokens, and the characters ``[T, 2]`` of each; tokens that share a character share its place.

    Each is decoded behind the one before it, as what a token's text is can depend on that (word pieces lose a space at
    the front of a text).
    """
    text, offsets, begin, done = "", [], 0, 0
    for end in range(1, len(ids) + 1):
        before, now = (
            tokenizer.decode(ids[begin:until], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for until in (done, end)
        )
        # U+FFFD at the end: the character goes on in the next token.
        if end < len(ids) and (now.endswith("\ufffd") or len(now) <= len(before)):
            continue
        start, text = len(text), text + now[len(before) :]
        offsets += [(start, len(text))] * (end - done)
        begin, done = done, end
    return text, np.array(offsets, dtype=np.int64).reshape(-1, 2)


def _encode_messages(record: Any, encoder: Encoder, max_length: int, tally: Tally) -> list[Encoded]:
    return rows_of(clean_record(record, tally), encoder, max_length, tally)


def _align_messages(record: Any, encoder: Encoder, at_least: int | None) -> list[Aligned]:
    return aligned_rows(clean_record(record, Tally()), encoder, at_least)


def _other_shapes(record: Any) -> list[str]:
    """The names of the formats that only step 2 knows, of which this record could be one."""
    if is_turn(record):
        return ["the turns of one conversation"]
    shapes = shapes_of(record, Columns())
    return [] if any(shape.format in TURN_NAMES for shape in shapes) else [str(shape) for shape in shapes]


def _is_other_format(record: Any) -> bool:
    has_turns = isinstance(record, dict) and first_of(record, *CONVERSATION_NAMES) is not None
    return not has_turns and bool(_other_shapes(record))


def _other_format(*_: Any) -> Any:
    raise Dropped("other_format")


#: The kinds of records by name. The first that handles a record has it; the last handles any, and says what is amiss.
TOKEN_SOURCES = {
    "tokens": TokenSource(is_tokens, _encode_tokens, _align_tokens),
    "other formats": TokenSource(_is_other_format, _other_format, _other_format),
    "messages": TokenSource(lambda record: True, _encode_messages, _align_messages),
}
