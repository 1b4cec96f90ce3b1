"""Conversations to text: what the template writes, which of its characters are replies, what a server's prompt is.

Nothing about a template is guessed. A conversation is rendered twice, once as it is and once with a marker in place of
every reply; where the markers land tells exactly which characters are replies. Whether it has a generation prompt and
whether it writes the date is found by rendering, too.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from eagle.data.cleaning import Dropped, Message, described
from eagle.data.reasoning import CLOSED, OPENS
from eagle.data.template_variables import FLAG, SWITCHES, check_kwargs, shown, variables_of
from eagle.errors import RequestError

#: Two moments that differ in everything a template may write of one.
_MOMENTS = (datetime.datetime(2001, 2, 3, 4, 5, 6), datetime.datetime(2019, 11, 28, 17, 38, 49))
_PROBES: tuple[list[Message], ...] = (
    [{"role": "user", "content": "a"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
    [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))],
)


class Renderer:
    """A chat template with its tokenizer's special tokens.

    template: the Jinja text. template_name, why: what to call it, and how it was chosen where that is worth a note.
    date: the day that a template which asks for it is told (default: today). variables: what the template is told
    beside the conversation.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        template_name: str,
        *,
        date: datetime.date | None = None,
        why: str = "",
        variables: dict[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.template_name = template_name
        self.why = why
        self.date = datetime.date.today() if date is None else date
        self.variables = dict(variables or {})
        self._special = [str(token) for token in tokenizer.all_special_tokens]
        self._special += [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]

    @cached_property
    def has_generation_prompt(self) -> bool:
        """Whether the template heeds ``add_generation_prompt``; one that refuses all short conversations is trusted."""
        found = [(self._tried(probe, prompt=False), self._tried(probe, prompt=True)) for probe in _PROBES]
        tried = [(without, prompt) for without, prompt in found if prompt is not None]
        return not tried or any(without != prompt for without, prompt in tried)

    @cached_property
    def is_dated(self) -> bool:
        """Whether the template writes the date, or something else that is another one on another day."""
        asks = "strftime_now" in self.template and "date_string" not in self.variables
        return asks or any(self._tried(probe, _MOMENTS[0]) != self._tried(probe, _MOMENTS[1]) for probe in _PROBES)

    @cached_property
    def known_variables(self) -> frozenset[str]:
        """What the template looks up beside the conversation."""
        return variables_of(self.template, self.tokenizer)

    def check_variables(self) -> None:
        """Raises: RequestError for a variable that the template does not know."""
        if self.variables:
            check_kwargs(self.variables, self.known_variables, self.template_name)

    @cached_property
    def begins_with_reasoning(self) -> bool:
        """Whether the model is to begin its replies with its reasoning, which no prompt begins for it.

        Known of templates with a switch: with it off, their prompts end the reasoning at once.
        """
        if not (switch := self._switch) or self.variables.get(switch) is False:
            return False
        for probe in _PROBES:
            prompt, off = self._tried(probe), self._tried(probe, variables={switch: False})
            if prompt is not None and off is not None:
                return bool(CLOSED.search(off)) and not CLOSED.search(prompt) and not OPENS.search(prompt)
        return False

    @property
    def _switch(self) -> str | None:
        """The template's variable that turns reasoning on and off."""
        return next((name for name in SWITCHES if name in self.known_variables), None)

    def check_repeatable(self) -> None:
        """Raises: RequestError for a template that renders a conversation differently every time."""
        for probe in _PROBES:
            if len({self._tried(probe, _MOMENTS[0]) for _ in range(8)}) > 1:
                raise RequestError(
                    f"The chat template {self.template_name} renders the same conversation differently every time, so "
                    "that what is trained is never what a server sees. Name another with --chat_template."
                )

    def notes(self) -> list[str]:
        """What somebody should know about the template: how it was chosen, what it does that a server's may not."""
        notes = []
        if self.why:
            notes.append(f"chat template {self.template_name}: {self.why}")
        if self.variables:
            notes.append(f"the chat template is told {shown(self.variables)}; serve with the same")
        notes += self._notes_on_reasoning()
        if self.is_dated:
            notes.append(f"the chat template writes the date; every conversation is rendered as of {self.date}")
        if not self.has_generation_prompt and (before := self.before_reply.strip()):
            notes.append(
                f"the chat template has no generation prompt, but writes {before!r} before a reply: a server's prompt "
                "ends without it, and the model has to say it first"
            )
        return notes

    def _notes_on_reasoning(self) -> list[str]:
        """What is trained of a model that reasons or does not, as whoever serves it says."""
        notes, switch = [], self._switch
        if switch and switch not in self.variables:
            mode = self._mode(switch)
            notes.append(
                f"the chat template turns reasoning on and off by {switch}, which is not given: prompts are rendered "
                f"{f'with it {mode}, ' if mode else ''}as by a server that is not told either. For a server that is, "
                f"give {FLAG} '{{\"{switch}\": {'false' if mode != 'off' else 'true'}}}', here and there"
            )
        if self.begins_with_reasoning:
            notes.append(
                "prompted so, the model begins its replies with its reasoning; replies that hold none are not what it "
                "says there. They are trained as they stand, and counted"
            )
        return notes

    def _mode(self, switch: str) -> str:
        """What a template takes its switch for where it is not told: "on", "off", or "" where that cannot be seen."""
        for probe in _PROBES:
            untold = self._tried(probe)
            modes = {name: self._tried(probe, variables={switch: name == "on"}) for name in ("on", "off")}
            if untold is not None and modes["on"] != modes["off"]:
                return next((name for name, prompt in modes.items() if prompt == untold), "")
        return ""

    @cached_property
    def before_reply(self) -> str:
        """What the template writes before a reply though no server's prompt ends with it: white space, or a heading."""
        try:
            before, prompt = self.frame(_PROBES[0])[0], self.prompt(_PROBES[0])
        except Dropped:
            return ""
        return before[len(prompt) :] if before.startswith(prompt) else ""

    def takes(self, messages: list[Message]) -> bool:
        """Whether the template renders these messages."""
        return self._tried(messages, prompt=False) is not None

    def _tried(
        self,
        messages: list[Message],
        moment: datetime.datetime | None = None,
        *,
        prompt: bool = True,
        variables: dict[str, Any] | None = None,
    ) -> str | None:
        try:
            return self.render(messages, add_generation_prompt=prompt, moment=moment, variables=variables)
        except Dropped:
            return None

    def render(
        self,
        messages: list[Message],
        *,
        add_generation_prompt: bool = False,
        moment: datetime.datetime | None = None,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """The text the model sees.

        moment: what the template is told that it is now (default: the beginning of the encoder's date). variables:
        beside the encoder's own, and in place of them.

        Raises: Dropped where the template refuses the conversation or fails on it.
        """
        import jinja2

        now = moment or datetime.datetime.combine(self.date, datetime.time())
        try:
            return self.tokenizer.apply_chat_template(
                [{"role": message["role"], "content": message["content"]} for message in messages],
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                # In place of the one that transformers gives to every template, and that asks the clock.
                strftime_now=now.strftime,
                **self.variables | (variables or {}),
            )
        except jinja2.TemplateSyntaxError as error:
            raise RequestError(
                f"The chat template {self.template_name} has an error in line {error.lineno}: {error.message}."
            ) from error
        except (MemoryError, ImportError):
            raise
        except Exception as error:  # whatever the template's own code raises
            raise Dropped("template_rejected", described(error)) from error

    def prompt(self, messages: list[Message]) -> str:
        """The text that a server sends, before it is tokenised, for the model to answer these messages.

        Raises: Dropped as `render`.
        """
        return self.render(messages, add_generation_prompt=True)

    def frame(self, messages: list[Message]) -> tuple[str, str]:
        """What stands before and behind a reply to these messages, in a text that ends with it. Raises: Dropped."""
        marker = "\ue000\ue001"
        pieces = _split_at(self.render([*messages, {"role": "assistant", "content": marker}]), [marker])
        if not pieces:
            raise Dropped("template_rewrites_reply")
        return pieces[0], pieces[1]

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
            spans.append((start, at + self.end_of_turn(after)))
        return spans

    def end_of_turn(self, after: str) -> int:
        """How many characters of the text after a reply still are the reply: up to its first special token.

        Special tokens in text that a user wrote into a later turn do not count: the end-of-turn token stands
        right behind the reply, at most white space between. Without one (a plain-text template) the reply
        ends where its text does.
        """
        bare = after.lstrip()
        found = max((token for token in self._special if bare.startswith(token)), key=len, default="")
        return len(after) - len(bare) + len(found) if found else 0


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
