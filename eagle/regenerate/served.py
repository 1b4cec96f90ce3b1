"""Replies from OpenAI-compatible servers, and what any engine is asked with.

A server that gives token ids (vLLM from 0.10.2 on, `return_token_ids`) is asked at /completions with the prompt's
tokens as they are made here, and says which tokens it sampled: what is trained is exactly that. Any other is asked at
/chat/completions with the messages, and its reply's text is taken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from eagle.data.cleaning import Message, first_of
from eagle.decode.sampling import Sampling
from eagle.errors import RequestError, WorkError
from eagle.regenerate.dialogue import SAMPLED
from eagle.regenerate.journal import FILTERED, LENGTH, STOP, TOO_LONG
from eagle.regenerate.transport import Failed, Refused, Servers

_TOO_LONG_WORDS = re.compile(
    r"context.?length|maximum (model|context)|max_model_len|too long|longer than|exceeds?.*(token|length)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Question:
    """What a reply is asked for with. prompt: the messages' tokens. room: tokens that the reply may have."""

    messages: Sequence[Message]
    prompt: list[int]
    room: int
    seed: int


@dataclass(frozen=True, slots=True)
class Said:
    """A reply. ids: as sampled, None where only `text` is known. tokens: how many it is. finish: of the journal's."""

    finish: str
    ids: list[int] | None = None
    text: str = ""
    tokens: int = 0


class Engine(Protocol):
    """What gives replies. tokens_from: `SAMPLED` or `FROM_TEXT`. context: tokens that prompt and reply may have."""

    tokens_from: str
    context: int

    def ask(self, question: Question) -> Said: ...
    def describe(self) -> str: ...
    def state(self) -> str:
        """What a progress view has to say beside the numbers."""
        ...

    def stop(self) -> None:
        """Let nobody wait any longer."""
        ...


class ServedTarget:
    """The target as servers have it, that were found to be of it (`eagle.regenerate.probing`)."""

    def __init__(
        self,
        servers: Servers,
        model: str,
        tokens_from: str,
        context: int,
        sampling: Sampling,
        stop: list[int],
        variables: Mapping[str, Any],
    ) -> None:
        self.servers, self.model, self.tokens_from, self.context = servers, model, tokens_from, context
        self._sampling, self._stop, self._variables = sampling, stop, variables

    def describe(self) -> str:
        listed = ", ".join(address.url for address in self.servers.addresses)
        exact = "its own token ids" if self.tokens_from == SAMPLED else "its text alone, which is tokenised again"
        return f"{self.model} at {listed}: {exact}; context {self.context:,}"

    def state(self) -> str:
        retried = sum(self.servers.retried.values())
        return f", {retried:,} tried again" if retried else ""

    def stop(self) -> None:
        self.servers.stop.set()

    def ask(self, question: Question) -> Said:
        """Raises: RequestError where the server refuses; Failed, WorkError and Stopped as `Servers.call`."""
        sampling = self._sampling
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": question.room,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": question.seed,
        }
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if self.tokens_from == SAMPLED:
            # Of what generation_config.json says nothing is left to the server: the flags say how it is sampled.
            body |= {"prompt": question.prompt, "return_token_ids": True, "stop_token_ids": self._stop}
            body |= {"top_k": sampling.top_k, "min_p": 0.0, "repetition_penalty": 1.0}
            path = "/completions"
        else:
            body |= chat(question.messages, self._variables)
            path = "/chat/completions"
        for _ in range(self.servers.retries + 1):
            try:
                answer = self.servers.call(path, body)
            except Refused as refused:
                if is_too_long(refused):
                    return Said(TOO_LONG)
                raise RequestError(f"{refused} {cure(refused)}") from None
            if not _is_broken_off(answer):
                return self._read(answer, question.prompt)
            self.servers.stop.wait(self.servers.first_wait)
        raise Failed(f"{self.servers.addresses[0].url}: the reply was broken off by the server every time")

    def _read(self, answer: dict[str, Any], prompt: list[int]) -> Said:
        try:
            choice = answer["choices"][0]
            finish = {"length": LENGTH, "content_filter": FILTERED}.get(choice.get("finish_reason"), STOP)
            counted = int((answer.get("usage") or {}).get("completion_tokens") or 0)
            if self.tokens_from == SAMPLED:
                ids = choice["token_ids"]
                if choice.get("prompt_token_ids") not in (None, prompt):
                    raise ValueError("it is behind another prompt than the one that was sent")
                return Said(finish, [int(token) for token in ids], "", len(ids))
            message = choice["message"]
            if message.get("refusal"):
                finish = FILTERED
            text = _whole_characters(message.get("content") or "")
            reasoning = first_of(message, "reasoning_content", "reasoning")
            if isinstance(reasoning, str) and reasoning.strip() and "</think>" not in text:
                text = f"<think>\n{_whole_characters(reasoning).strip()}\n</think>\n\n{text.lstrip()}"
            return Said(finish, None, text, counted)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise WorkError(
                f"{self.servers.addresses[0].url} gave an answer of another form than OpenAI's "
                f"({type(error).__name__}: {error}). The replies before it are kept; see that nothing between here and "
                "the server rewrites answers."
            ) from error


def chat(messages: Sequence[Message], variables: Mapping[str, Any]) -> dict[str, Any]:
    """What a chat request says of the prompt. variables: of the chat template."""
    said = [{"role": message["role"], "content": message["content"]} for message in messages]
    return {"messages": said, **({"chat_template_kwargs": dict(variables)} if variables else {})}


def is_too_long(refused: Refused) -> bool:
    """Whether a server refused a prompt for its length, in its own words: there is no common code for that."""
    about_length = refused.code == "context_length_exceeded" or bool(_TOO_LONG_WORDS.search(refused.said))
    return refused.status in (400, 413, 422) and about_length


def cure(refused: Refused) -> str:
    cures = {
        401: "It wants a key: set OPENAI_API_KEY.",
        403: "It wants a key that may do this: set OPENAI_API_KEY.",
        404: "See that --server ends where the API begins (mostly /v1) and that --served_model is a model it has.",
    }
    return cures.get(refused.status, "Nothing that was asked again would change that. What has come is kept.")


def _is_broken_off(answer: dict[str, Any]) -> bool:
    """Whether a server ended a reply in the middle, as one does that shuts down."""
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return isinstance(first, dict) and first.get("finish_reason") in ("abort", "error")


def _whole_characters(text: str) -> str:
    """A server's JSON may hold half a character, which no file of UTF-8 can."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
