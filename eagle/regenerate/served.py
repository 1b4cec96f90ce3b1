"""Replies from OpenAI-compatible servers, and what any engine is asked with.

A server that gives token ids (vLLM from 0.10.2 on, `return_token_ids`) is asked at /completions with the prompt's
tokens as they are made here, and says which tokens it sampled: what is trained is exactly that. Any other is asked at
/chat/completions with the messages, and its reply's text is taken.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from eagle.data.cleaning import REASONING_NAMES, Message, first_said
from eagle.data.reasoning import behind_reasoning
from eagle.decode.sampling import Sampling
from eagle.errors import RequestError, WorkError
from eagle.regenerate.address import KEY_VARIABLE
from eagle.regenerate.dialogue import SAMPLED
from eagle.regenerate.journal import CUT, FILTERED, LENGTH, STOP, TOO_LONG
from eagle.regenerate.transport import Refused, Servers

#: How servers say that a prompt, or it and its reply, are longer than they take. There is no common code for that.
_OF_CONTEXT = re.compile(r"context.?(length|window|size|limit)|max_model_len|maximum model length", re.IGNORECASE)
_OF_PROMPT = re.compile(
    r"\b(prompt|inputs?|messages?|request|conversation)\b[^.]{0,60}\b(too (long|large)|longer than|exceed)|"
    r"\bexceeds?\b[^.]{0,40}\b(prompt|input)|`?inputs`? (must have less than|tokens \+)|reduce the length|"
    r"maximum (input|prompt|sequence) length",
    re.IGNORECASE,
)
#: How they say that a reply may not be so long, whatever the prompt.
_OF_REPLY = re.compile(r"(output|completion) (tokens|length)", re.IGNORECASE)
#: The context, where a server says it with that.
_CONTEXT = re.compile(
    r"context.?(?:length|window|size)(?: is| of|:| =)? ?\(?(\d[\d,]*)|tokens \+ .max_new_tokens. must be <= (\d+)",
    re.IGNORECASE,
)

#: How a reply ended, in the words of servers. A word that is not here is no end of turn.
_FINISHES = {
    **dict.fromkeys(("stop", "eos", "eos_token", "stop_sequence", "end_turn", None), STOP),
    "content_filter": FILTERED,
}
#: What a filter of prompts is called, of OpenAI's and Azure's form (its inner code, too), and of DashScope's.
_FILTERS = frozenset({
    "content_filter", "content_policy_violation", "responsibleaipolicyviolation", "data_inspection_failed",
    "datainspectionfailed",
})  # fmt: skip
#: Replies that a server broke off itself, as one does that shuts down or is short of memory.
_BROKEN_OFF = ("abort", "error", "insufficient_system_resource")


@dataclass(frozen=True, slots=True)
class Question:
    """What a reply is asked for with. prompt: the messages' tokens. room: tokens that the reply may have."""

    messages: Sequence[Message]
    prompt: list[int]
    room: int
    seed: int


@dataclass(frozen=True, slots=True)
class Said:
    """A reply. ids: as sampled, None where only `text` is known. tokens: how many it is. finish: of the journal's.

    context: as an `Answer` has it. is_answer: whether the server has said that there is no reasoning in the text.
    """

    finish: str
    ids: list[int] | None = None
    text: str = ""
    tokens: int = 0
    context: int | None = None
    is_answer: bool = False


@dataclass(frozen=True, slots=True)
class Counted:
    """How many tokens servers count in prompts, and how many there are here."""

    prompts: tuple[tuple[int, int], ...] = ()

    def least(self, tokens: int) -> int:
        """What a server counts at least in a prompt that it takes whole, of `tokens` here; 0 where that is unknown."""
        if not self.prompts:
            return 0
        # Mostly always the same number more, or as many. Some of these may have been cut down themselves.
        (offset, times), *_ = Counter(theirs - ours for theirs, ours in self.prompts).most_common(1)
        if 2 * times > len(self.prompts):
            # But for odd characters, of which another library makes a token more or less; cutting takes far more.
            return tokens + offset - max(8, tokens // 50)
        return int(0.8 * tokens * statistics.median(theirs / ours for theirs, ours in self.prompts))


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
        counted: Counted = Counted(),
        *,
        says_context: bool = True,
    ) -> None:
        self.servers, self.model, self.tokens_from, self.context = servers, model, tokens_from, context
        self._sampling, self._stop, self._variables, self._counted = sampling, stop, variables, counted
        self._says_context = says_context

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
            body |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
            path = "/completions"
        else:
            body |= chat(question.messages, self._variables)
            path = "/chat/completions"
        room = question.room
        while True:
            try:
                answer = self.servers.call(path, {**body, "max_tokens": room}, flaw=_broken_off)
            except Refused as refused:
                if is_filtered(refused):
                    return Said(FILTERED)
                if not is_too_long(refused):
                    raise RequestError(f"{refused} {cure(refused)}") from None
                fits = self._learn_context(refused) - max(
                    len(question.prompt), self._counted.least(len(question.prompt))
                )
                if not 0 < fits < room:
                    return Said(TOO_LONG, context=self.context if self._says_context else 0)
                room = fits  # a shorter reply fits
            else:
                return self._read(answer, question.prompt, room)

    def _learn_context(self, refused: Refused) -> int:
        """The context, which some servers say only where they refuse a prompt for its length."""
        found = _CONTEXT.search(refused.said)
        said = int((found[1] or found[2]).replace(",", "")) if found else 0
        if 0 < said < self.context:
            self.context, self._says_context = said, True
        return self.context

    def _read(self, answer: dict[str, Any], prompt: list[int], room: int) -> Said:
        try:
            choice = answer["choices"][0]
            reason = choice.get("finish_reason")
            finish = _FINISHES.get(reason, LENGTH)
            usage = answer.get("usage") or {}
            counted = int(usage.get("completion_tokens") or 0)
            # Shorter than it might have been: the server's context is, of which it has not told.
            context = 0 if reason == "length" and 0 < counted < room else None
            if self.tokens_from == SAMPLED:
                ids = choice["token_ids"]
                if choice.get("prompt_token_ids") not in (None, prompt):
                    raise ValueError("it is behind another prompt than the one that was sent")
                return Said(finish, [int(token) for token in ids], "", len(ids), context)
            if 0 < int(usage.get("prompt_tokens") or 0) < self._counted.least(len(prompt)):
                return Said(CUT, tokens=counted, context=0)
            if finish == STOP and counted >= room:
                finish = LENGTH
            message = choice["message"]
            if message.get("refusal"):
                finish = FILTERED
            text = _whole_characters(message.get("content") or "")
            reasoning = first_said(message, *REASONING_NAMES)
            if isinstance(reasoning, str):
                text = _with_reasoning(_whole_characters(reasoning), text, is_cut=finish == LENGTH)
            is_answer = any(isinstance(message.get(name), str) for name in REASONING_NAMES)
            return Said(finish, None, text, counted, context, is_answer)
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
    """Whether a server refused a request for the length of its prompt, or of that and the reply."""
    if refused.status not in (400, 413, 422):
        return False
    is_of_context = _OF_CONTEXT.search(refused.said) or any("context" in code for code in refused.codes)
    if refused.status == 413 or is_of_context:
        return True
    return not _OF_REPLY.search(refused.said) and bool(_OF_PROMPT.search(refused.said))


def is_filtered(refused: Refused) -> bool:
    """Whether a server's filter kept a prompt from the model, as it would again."""
    return refused.status == 400 and bool(refused.codes & _FILTERS)


def cure(refused: Refused) -> str:
    cures = {
        401: f"It wants a key: set {KEY_VARIABLE}.",
        403: f"It wants a key that may do this: set {KEY_VARIABLE}.",
        404: "See that --server ends where the API begins (mostly /v1) and that --served_model is a model it has.",
        429: "Its account is used up, which no waiting changes; when that is settled, run the same command again. What "
        "has come is kept.",
    }
    if refused.status < 400:
        return "Redirections are not followed: name the address behind it as --server."
    if _OF_REPLY.search(refused.said):
        return "Lower --max_new_tokens."
    return cures.get(refused.status, "Nothing that was asked again would change that. What has come is kept.")


def _broken_off(answer: dict[str, Any]) -> str | None:
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    reason = first.get("finish_reason") if isinstance(first, dict) else None
    return f"the server broke the reply off ({reason})" if reason in _BROKEN_OFF else None


def _with_reasoning(reasoning: str, text: str, *, is_cut: bool) -> str:
    """A reply as the model wrote it, of which a server gives the reasoning and the answer apart.

    Without an answer nothing says that the reasoning was ended: that of a reply that was cut off stays open, and one
    that ended by itself is empty.
    """
    if text.strip():
        return behind_reasoning(reasoning, text)
    return f"<think>\n{reasoning.strip()}" if is_cut else ""


def _whole_characters(text: str) -> str:
    """A server's JSON may hold half a character, which no file of UTF-8 can."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
