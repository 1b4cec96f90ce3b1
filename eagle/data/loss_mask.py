"""Conversations to tokens and loss mask: one template-driven way for every model family.

    ShareGPT record --cleaning--> messages --Encoder.encode--> input_ids [T], loss_mask [T]

Which characters of a rendered conversation are replies, `eagle.data.rendering` knows; the tokenizer's offsets carry
that over to tokens. Whether a server sees the same before every reply is `eagle.data.rows`' to check.

    python -m eagle.data.viewer --model_name M --data_path D    shows what is trained on
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from eagle.data.chat_template import check_template_beside, choose_template
from eagle.data.cleaning import Dropped, Message, Tally, described
from eagle.data.reasoning import MARKS
from eagle.data.rendering import Renderer
from eagle.data.template_variables import shown
from eagle.errors import RequestError
from eagle.target.config import ModelConfig
from eagle.target.tokenizer import check_rows, load_tokenizer


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation as tokens.

    input_ids: ``[T]`` int32. loss_mask: ``[T]`` uint8, 1 where token ``x[t]`` belongs to a reply, its
    end-of-turn token included; unshifted (`eagle.drafts.alignment` shifts it, nobody else does).
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray


@dataclass(frozen=True, slots=True)
class Aligned:
    """A whole conversation as tokens and as text: `Encoded`, and which characters of `text` every token stands for.

    offsets: ``[T, 2]`` int64, characters ``[start, end)``.
    """

    text: str
    input_ids: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray


class Encoder(Renderer):
    """Tokenises conversations with a chat template and knows which tokens are the assistant's.

    tokenizer: a fast Hugging Face tokenizer (offsets are needed). template, template_name, date, why, variables: as
    `Renderer`. vocab_size: of the model, whose embedding may have more rows than the tokenizer has tokens (default: the
    tokenizer's).
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        template_name: str,
        vocab_size: int | None = None,
        *,
        date: datetime.date | None = None,
        why: str = "",
        variables: dict[str, Any] | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise RequestError(
                f"The tokenizer {type(tokenizer).__name__} is a slow one without character offsets, which the "
                "loss mask needs. Save a fast one beside the model (a tokenizer.json)."
            )
        super().__init__(tokenizer, template, template_name, date=date, why=why, variables=variables)
        self.vocab_size = len(tokenizer) if vocab_size is None else vocab_size
        #: Whether white space that the template writes before a reply, and no prompt has, is the model's to say; only
        #: jobs that version 0.1 began are continued without.
        self.trains_leading_space = True
        special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        #: A text is cut at these before it is tokenised: what comes behind one does not change what is before.
        self.special_ids = np.array(list(special), dtype=np.int32)
        #: Those that the text of a reply is without, as a server gives it. Marks of reasoning stay: by them a template
        #: knows what to leave out of a history.
        self.unsaid_ids = frozenset(number for number, content in special.items() if not MARKS.search(content))

    def digest(self) -> str:
        """sha256 over the vocabulary, the merges, the template and its variables: what decides the tokens of a text."""
        digest = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode())
        digest.update(self.template.encode())
        if self.variables:
            digest.update(b"\0" + shown(self.variables).encode())
        return digest.hexdigest()

    def encode(self, messages: list[Message], max_length: int, tally: Tally) -> Encoded:
        """Tokens and loss mask of a conversation as it is rendered in one piece, cut to `max_length` tokens.

        Raises: Dropped where nothing supervised is left.
        """
        return self.cut_whole(messages, self.align(messages, at_least=max_length), max_length, tally)

    def cut_whole(self, messages: list[Message], aligned: Aligned, max_length: int, tally: Tally) -> Encoded:
        """A conversation's tokens, of which there are enough, cut to `max_length`. Raises: Dropped."""
        is_usable = partial(self._is_usable, messages)
        return cut(aligned.input_ids, aligned.loss_mask, max_length, tally, is_usable)

    def _is_usable(self, messages: list[Message]) -> bool:
        """Whether the whole conversation has something supervised in it."""
        # No token is so long; tokenising all of a conversation that is dropped anyway would be the larger part.
        replies = [message for message in messages if message["role"] == "assistant" and "weight" not in message]
        if any(len(message["content"].strip()) > 512 for message in replies):
            return True
        return is_supervised(self.align(messages).loss_mask)

    def align(self, messages: list[Message], at_least: int | None = None) -> Aligned:
        """Text, tokens and loss mask of a conversation. Raises: Dropped.

        at_least: so many tokens from the start are enough, and one more where there are more; of a long conversation
        only the beginning is tokenised then.
        """
        return self.align_replies(messages, at_least)[0]

    def align_replies(
        self, messages: list[Message], at_least: int | None = None
    ) -> tuple[Aligned, list[tuple[int, int]], int | None]:
        """`align`; every reply's characters, as `reply_spans`; where the first begins for which a token was cut."""
        text, spans = self.reply_spans(messages)
        ids, offsets, split = self._tokenize_enough(text, spans, at_least) if at_least else self._tokenize(text, spans)
        mask = np.zeros(len(ids), dtype=np.uint8)
        starts, ends = offsets[:, 0], offsets[:, 1]
        replies = (message for message in messages if message["role"] == "assistant")
        lead = self.before_reply if self.trains_leading_space and self.before_reply.isspace() else ""
        for (start, end), reply in zip(spans, replies, strict=True):
            if "weight" not in reply:
                begin = start - len(lead) if text.endswith(lead, 0, start) else start
                mask[(starts < end) & (ends > begin)] = 1
        return Aligned(text, ids, mask, offsets), spans, split

    def _tokenize_enough(
        self, text: str, spans: list[tuple[int, int]], count: int
    ) -> tuple[np.ndarray, np.ndarray, int | None]:
        """`_tokenize` of as much of the text as gives `count` tokens and a margin.

        The tokens right before a cut differ from those of the whole text, as the word there is cut too; none of those
        is in what is used, which ends a hundred tokens earlier.
        """
        characters, margin = 8 * (count + 128), 100
        while characters < len(text):
            beginning = [(start, end) for start, end in spans if start < characters]
            ids, offsets, split = self._tokenize(text[:characters], beginning)
            if len(ids) > count + margin:
                return ids, offsets, split
            characters *= 2
        return self._tokenize(text, spans)

    def _tokenize(self, text: str, spans: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray, int | None]:
        """ids ``[T]`` int32 and character offsets ``[T, 2]`` of `text`, and where the first token was cut.

        A token that holds the end of the prompt and the beginning of the reply could never be generated: the
        server tokenises the prompt by itself. There the text is tokenised in two parts, as a server would.
        The one exception is the single space that word-piece tokenizers keep at the front of a word.
        """
        ids, offsets = self._tokenize_part(text)
        split = None
        for start, _ in spans:
            straddling = (offsets[:, 0] < start) & (offsets[:, 1] > start)
            if straddling.any() and text[offsets[straddling][0, 0] : start] != " ":
                cut = int(np.flatnonzero(offsets[:, 1] > start)[0])
                begin = int(offsets[cut, 0])
                split = start if split is None else split
                # Re-tokenise from the start of the straddling token, so that everything before stays as it is.
                middle, middle_offsets = self._tokenize_inside(text[begin:start])
                rest, rest_offsets = self._tokenize_inside(text[start:])
                ids = np.concatenate([ids[:cut], middle, rest])
                offsets = np.concatenate([offsets[:cut], middle_offsets + begin, rest_offsets + start])
        return ids, offsets, split

    def tokenize(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """ids ``[T]`` int32 and character offsets ``[T, 2]`` of a text, as a server tokenises it. Raises: Dropped."""
        return self._tokenize_part(text)

    def continue_text(self, before: str, ids: np.ndarray, text: str) -> tuple[np.ndarray, np.ndarray]:
        """ids and offsets (in both texts together) of `text`, as a model continues `before`, whose tokens are `ids`."""
        whole, offsets = self._tokenize_part(before + text)
        # A token that takes the white space behind it with it would take the model's.
        if np.array_equal(whole[: len(ids)], ids) and not (offsets[: len(ids), 1] > len(before)).any():
            return whole[len(ids) :], offsets[len(ids) :]
        # A token would have been half prompt, half reply: the server's prompt ends between them.
        found, offsets = self._tokenize_inside(text)
        return found, offsets + len(before)

    def _tokenize_inside(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """`_tokenize_part` of a text that something stands before.

        Word-piece tokenizers put a space before a text; behind a line break, which is a token of its own, none.
        """
        if self._begins_with_a_space:
            ids, offsets = self._tokenize_part("\n" + text)
            behind = offsets[:, 0] >= 1
            if not ((offsets[:, 0] < 1) & (offsets[:, 1] > 1)).any():
                return ids[behind], offsets[behind] - 1
        return self._tokenize_part(text)

    @cached_property
    def _begins_with_a_space(self) -> bool:
        first = self.tokenizer.convert_ids_to_tokens(self._tokenize_part("x")[0][:1].tolist())
        return bool(first) and first[0].startswith("\u2581")

    def tokenize_each(self, texts: list[str]) -> list[np.ndarray]:
        """ids ``[T]`` of every text, as a server tokenises it. Raises: Dropped."""
        if not texts:
            return []
        return [np.asarray(ids, dtype=np.int32) for ids in self._call_tokenizer(texts)["input_ids"]]

    def _tokenize_part(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        encoding = self._call_tokenizer(text, return_offsets_mapping=True)
        ids = np.asarray(encoding["input_ids"], dtype=np.int32)
        return ids, np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)

    def _call_tokenizer(self, text: str | list[str], **options: bool) -> Any:
        """Raises: Dropped where the tokenizer fails on the text."""
        try:
            return self.tokenizer(text, add_special_tokens=False, verbose=False, **options)
        except MemoryError:
            raise
        except BaseException as error:  # a panic inside of the tokenizers library is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise Dropped("tokenizer_failed", described(error)) from error


def cut(
    input_ids: np.ndarray,
    loss_mask: np.ndarray,
    max_length: int,
    tally: Tally,
    is_usable: Callable[[], bool] | None = None,
) -> Encoded:
    """The first `max_length` tokens; that something was cut is counted.

    is_usable: whether the whole conversation has something supervised in it (default: whether these tokens have).

    Raises: Dropped where nothing supervised is left.
    """
    ids, mask = input_ids[:max_length], loss_mask[:max_length]
    is_cut = len(input_ids) > max_length
    if not is_supervised(mask):
        whole = is_cut and (is_usable() if is_usable else is_supervised(loss_mask))
        raise Dropped("reply_beyond_max_length" if whole else "reply_too_short")
    if is_cut:
        tally.repaired["cut_to_max_length"] += 1
    return Encoded(ids, mask)


def is_supervised(mask: np.ndarray) -> bool:
    """Whether any draft position ``t`` has both ``x[t+1]`` and ``x[t+2]`` in a reply."""
    return bool((mask[1:-1] & mask[2:]).any()) if len(mask) > 2 else False


def load_encoder(
    model_path: str | Path,
    config: ModelConfig,
    chat_template: str | None = None,
    date: datetime.date | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Encoder:
    """The tokenizer of a model folder with the template to use: see `choose_template` for `chat_template`.

    date: the day that a template which asks for it is told (default: today). chat_template_kwargs: the template's
    variables.

    Raises: RequestError for a tokenizer that cannot be loaded or is not of this model, a template that does not exist
    or cannot be used, or a variable that it does not have.
    """
    check_template_beside(Path(model_path))
    tokenizer = load_tokenizer(model_path)
    choice = choose_template(tokenizer, model_path, config, chat_template)
    check_rows(tokenizer, choice.text, config, model_path)
    encoder = Encoder(
        tokenizer, choice.text, choice.name, config.vocab_size,
        date=date, why=choice.why, variables=chat_template_kwargs,
    )  # fmt: skip
    encoder.check_variables()
    encoder.check_repeatable()
    return encoder
