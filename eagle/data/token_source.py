"""What a record may be, and how it becomes tokens: a conversation for the encoder, or tokens already.

    {"conversations": [...]}                        `eagle.data.cleaning` -> messages -> `Encoder` -> tokens
    {"input_ids": [...], "loss_mask": [0, 1, ...]}  taken as they are: no template, no tokenizer

`TOKEN_SOURCES` is the only place that knows the kinds; everybody else hands a record to `encode_record` or
`align_record`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from eagle.data.cleaning import CONVERSATION_NAMES, Dropped, Tally, clean_record, first_of
from eagle.data.loss_mask import Aligned, Encoded, Encoder, cut
from eagle.data.reader import Records


@dataclass(frozen=True, slots=True)
class TokenSource:
    """One kind of record.

    handles: whether a record is of this kind. encode: its tokens, cut to a length, what was mended being counted.
    align: all its tokens and their text, for people. Both raise Dropped for a record that cannot be used.
    """

    handles: Callable[[Any], bool]
    encode: Callable[[Any, Encoder, int, Tally], Encoded]
    align: Callable[[Any, Encoder], Aligned]


def encode_record(records: Records, index: int, encoder: Encoder, max_length: int, tally: Tally) -> Encoded:
    """Record `index` as at most `max_length` tokens. Raises: Dropped."""
    record = _read(records, index)
    encoded = _source(record).encode(record, encoder, max_length, tally)
    if encoded.input_ids.max() >= encoder.vocab_size:  # a text may spell out a token that was added without a row
        raise Dropped("token_without_row")
    return encoded


def align_record(records: Records, index: int, encoder: Encoder) -> Aligned:
    """All tokens of record `index`, and their text. Raises: Dropped."""
    record = _read(records, index)
    return _source(record).align(record, encoder)


def _read(records: Records, index: int) -> Any:
    try:
        return records[index]
    except ValueError:  # not JSON, or not UTF-8
        raise Dropped("invalid_json") from None


def _source(record: Any) -> TokenSource:
    return next(source for source in TOKEN_SOURCES.values() if source.handles(record))


def _is_tokens(record: Any) -> bool:
    """Both lists; or one of them where there is no conversation either, so that the report says what is amiss."""
    if not isinstance(record, dict):
        return False
    there = [record.get(name) is not None for name in ("input_ids", "loss_mask")]
    return all(there) or (any(there) and first_of(record, *CONVERSATION_NAMES) is None)


def _checked_tokens(record: dict[str, Any], encoder: Encoder) -> tuple[np.ndarray, np.ndarray]:
    """input_ids ``[T]`` int32 and loss_mask ``[T]`` uint8 of a record. Raises: Dropped."""
    ids, mask = record.get("input_ids"), record.get("loss_mask")
    if not (isinstance(ids, list) and isinstance(mask, list) and len(ids) == len(mask)):
        raise Dropped("bad_tokens")
    # By type, since True is an int and 1.0 equals one; a token out of range would end the job in the embedding.
    if not all(type(token) is int and 0 <= token < encoder.vocab_size for token in ids):
        raise Dropped("bad_tokens")
    if not all(type(flag) in (int, bool) and 0 <= flag <= 1 for flag in mask):
        raise Dropped("bad_tokens")
    return np.array(ids, dtype=np.int32), np.array(mask, dtype=np.uint8)


def _encode_tokens(record: Any, encoder: Encoder, max_length: int, tally: Tally) -> Encoded:
    return cut(*_checked_tokens(record, encoder), max_length, tally)


def _align_tokens(record: Any, encoder: Encoder) -> Aligned:
    ids, mask = _checked_tokens(record, encoder)
    text, offsets = _decode(ids.tolist(), encoder.tokenizer)
    return Aligned(text, ids, mask, offsets)


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


def _encode_messages(record: Any, encoder: Encoder, max_length: int, tally: Tally) -> Encoded:
    return encoder.encode(clean_record(record, tally), max_length, tally)


def _align_messages(record: Any, encoder: Encoder) -> Aligned:
    return encoder.align(clean_record(record, Tally()))


#: The kinds of records by name. The first that handles a record has it; the last handles any, and says what is amiss.
TOKEN_SOURCES = {
    "tokens": TokenSource(_is_tokens, _encode_tokens, _align_tokens),
    "messages": TokenSource(lambda record: True, _encode_messages, _align_messages),
}
