"""Conversations to tokens and loss mask: one template-driven way for every model family.

    ShareGPT record --cleaning--> messages --Encoder.encode--> input_ids [T], loss_mask [T]

Nothing about a template is guessed. The conversation is rendered twice, once as it is and once with a marker
in place of every reply; where the markers land tells exactly which characters are replies. The tokenizer's
offsets carry that over to tokens.

    python -m eagle.data.viewer --model_name M --data_path D    shows what is trained on
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from eagle.data.chat_template import choose_template
from eagle.data.cleaning import Dropped, Message, Tally
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


class Encoder:
    """Tokenises conversations with a chat template and knows which tokens are the assistant's.

    tokenizer: a fast Hugging Face tokenizer (offsets are needed). template: the Jinja text. vocab_size: of the model,
    whose embedding may have more rows than the tokenizer has tokens (default: the tokenizer's).
    """

    def __init__(self, tokenizer: Any, template: str, template_name: str, vocab_size: int | None = None) -> None:
        if not tokenizer.is_fast:
            raise RequestError(
                f"The tokenizer {type(tokenizer).__name__} is a slow one without character offsets, which the "
                "loss mask needs. Save a fast one beside the model (a tokenizer.json)."
            )
        self.tokenizer = tokenizer
        self.template = template
        self.template_name = template_name
        self.vocab_size = len(tokenizer) if vocab_size is None else vocab_size
        self._special = [str(token) for token in tokenizer.all_special_tokens]
        self._special += [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]

    def digest(self) -> str:
        """sha256 over the vocabulary, the merges and the template: what decides the tokens of a text."""
        digest = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode())
        digest.update(self.template.encode())
        return digest.hexdigest()

    def render(self, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        """The text the model sees.

        Raises: Dropped where the template refuses the conversation.
        """
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.TemplateSyntaxError as error:
            raise RequestError(
                f"The chat template {self.template_name} has an error in line {error.lineno}: {error.message}."
            ) from error
        except (jinja2.TemplateError, TypeError) as error:
            raise Dropped("template_rejected") from error

    def reply_spans(self, messages: list[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text and, for every reply, the characters ``[start, end)`` of it and its end of turn.

        Raises: Dropped where the template does not put the replies in verbatim (or trimmed).
        """
        text = self.render(messages)
        markers, marked = [], []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                markers.append(f"\ue000{index}\ue001")  # private-use characters: no real text holds them
                message = {**message, "content": markers[-1]}
            marked.append(message)
        pieces = _split_at(self.render(marked), markers)
        replies = [message["content"] for message in messages if message["role"] == "assistant"]
        for replies_as_rendered in (replies, [reply.strip() for reply in replies]):
            if pieces and text == _interleave(pieces, replies_as_rendered):
                return text, self._spans(pieces, replies_as_rendered)
        raise Dropped("template_rewrites_reply")

    def _spans(self, pieces: list[str], replies: list[str]) -> list[tuple[int, int]]:
        spans, at = [], 0
        for before, reply, after in zip(pieces, replies, pieces[1:], strict=False):
            start = at + len(before)
            at = start + len(reply)
            spans.append((start, at + self._end_of_turn(after)))
        return spans

    def _end_of_turn(self, after: str) -> int:
        """How many characters of the text after a reply still are the reply: up to its first special token.

        Special tokens in text that a user wrote into a later turn do not count: the end-of-turn token stands
        right behind the reply, at most white space between. Without one (a plain-text template) the reply
        ends where its text does.
        """
        bare = after.lstrip()
        found = max((token for token in self._special if bare.startswith(token)), key=len, default="")
        return len(after) - len(bare) + len(found) if found else 0

    def encode(self, messages: list[Message], max_length: int, tally: Tally) -> Encoded:
        """Tokens and loss mask of a conversation, cut to `max_length` tokens.

        Raises: Dropped where nothing supervised is left.
        """
        aligned = self.align(messages, at_least=max_length)
        is_usable = partial(self._is_usable, messages)
        return cut(aligned.input_ids, aligned.loss_mask, max_length, tally, is_usable)

    def _is_usable(self, messages: list[Message]) -> bool:
        """Whether the whole conversation has something supervised in it."""
        # No token is so long; tokenising all of a conversation that is dropped anyway would be the larger part.
        if any(message["role"] == "assistant" and len(message["content"].strip()) > 512 for message in messages):
            return True
        return _supervised_positions(self.align(messages).loss_mask)

    def align(self, messages: list[Message], at_least: int | None = None) -> Aligned:
        """Text, tokens and loss mask of a conversation. Raises: Dropped.

        at_least: so many tokens from the start are enough, and one more where there are more; of a long conversation
        only the beginning is tokenised then.
        """
        text, spans = self.reply_spans(messages)
        ids, offsets = self._tokenize_enough(text, spans, at_least) if at_least else self._tokenize(text, spans)
        mask = np.zeros(len(ids), dtype=np.uint8)
        starts, ends = offsets[:, 0], offsets[:, 1]
        for start, end in spans:
            mask[(starts < end) & (ends > start)] = 1
        return Aligned(text, ids, mask, offsets)

    def _tokenize_enough(self, text: str, spans: list[tuple[int, int]], count: int) -> tuple[np.ndarray, np.ndarray]:
        """`_tokenize` of as much of the text as gives `count` tokens and a margin.

        The tokens right before a cut differ from those of the whole text, as the word there is cut too; none of those
        is in what is used, which ends a hundred tokens earlier.
        """
        characters, margin = 8 * (count + 128), 100
        while characters < len(text):
            beginning = [(start, end) for start, end in spans if start < characters]
            ids, offsets = self._tokenize(text[:characters], beginning)
            if len(ids) > count + margin:
                return ids, offsets
            characters *= 2
        return self._tokenize(text, spans)

    def _tokenize(self, text: str, spans: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """ids ``[T]`` int32 and character offsets ``[T, 2]`` of `text`.

        A token that holds the end of the prompt and the beginning of the reply could never be generated: the
        server tokenises the prompt by itself. There the text is tokenised in two parts, as a server would.
        The one exception is the single space that word-piece tokenizers keep at the front of a word.
        """
        ids, offsets = self._tokenize_part(text)
        for start, _ in spans:
            straddling = (offsets[:, 0] < start) & (offsets[:, 1] > start)
            if straddling.any() and text[offsets[straddling][0, 0] : start] != " ":
                cut = int(np.flatnonzero(offsets[:, 1] > start)[0])
                begin = int(offsets[cut, 0])
                # Re-tokenise from the start of the straddling token, so that everything before stays as it is.
                middle, middle_offsets = self._tokenize_part(text[begin:start])
                rest, rest_offsets = self._tokenize_part(text[start:])
                ids = np.concatenate([ids[:cut], middle, rest])
                offsets = np.concatenate([offsets[:cut], middle_offsets + begin, rest_offsets + start])
        return ids, offsets

    def _tokenize_part(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.asarray(encoding["input_ids"], dtype=np.int32)
        return ids, np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)


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
    if not _supervised_positions(mask):
        whole = is_cut and (is_usable() if is_usable else _supervised_positions(loss_mask))
        raise Dropped("reply_beyond_max_length" if whole else "reply_too_short")
    if is_cut:
        tally.repaired["cut_to_max_length"] += 1
    return Encoded(ids, mask)


def _supervised_positions(mask: np.ndarray) -> bool:
    """Whether any draft position ``t`` has both ``x[t+1]`` and ``x[t+2]`` in a reply."""
    return bool((mask[1:-1] & mask[2:]).any()) if len(mask) > 2 else False


def _split_at(text: str, markers: Iterable[str]) -> list[str]:
    """`text` cut at the markers, which must appear once each and in order; else an empty list."""
    pieces = []
    for marker in markers:
        before, found, text = text.partition(marker)
        if not found:
            return []
        pieces.append(before)
    return [*pieces, text]


def _interleave(pieces: list[str], replies: list[str]) -> str:
    return "".join(piece + reply for piece, reply in zip(pieces, [*replies, ""], strict=True))


def load_encoder(model_path: str | Path, config: ModelConfig, chat_template: str | None = None) -> Encoder:
    """The tokenizer of a model folder with the template to use: see `choose_template` for `chat_template`.

    Raises: RequestError for a tokenizer that cannot be loaded or is not of this model, or a template that does not
    exist.
    """
    tokenizer = load_tokenizer(model_path)
    template, name = choose_template(tokenizer, model_path, config, chat_template)
    check_rows(tokenizer, template, config, model_path)
    return Encoder(tokenizer, template, name, config.vocab_size)
