"""Is this server's model the target's folder? Asked before any reply is: its name, its tokens of the first prompts.

A server that gives token ids has to make the same tokens of a conversation as the folder's tokenizer and chat template
do; of another one it is compared how many there are. Whose weights it has, nobody can see from here.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle.data.cleaning import Dropped, Message
from eagle.data.loss_mask import Encoder
from eagle.decode.sampling import Sampling
from eagle.errors import RequestError
from eagle.regenerate.address import Address
from eagle.regenerate.dialogue import FROM_TEXT, SAMPLED, Dialogue
from eagle.regenerate.served import Counted, ServedTarget, chat, cure, is_filtered, is_too_long
from eagle.regenerate.transport import Refused, Servers

#: Prompts that are compared; and of how many these are taken, where a server finds some too long.
PROBED, _CANDIDATES = 8, 64
#: How often a first request is tried again: who names a wrong port does not want to wait for minutes.
_FIRST_CONTACT = 3


@dataclass(slots=True)
class Compared:
    """What a server makes of prompts. counted: how many tokens it finds in each, and how many there are here."""

    tokens_from: str
    counted: list[tuple[int, int]]
    notes: list[str]


def connect(
    servers: Servers,
    encoder: Encoder,
    dialogues: Iterable[Dialogue],
    model_name: Path,
    served_model: str | None,
    context: int,
    sampling: Sampling,
    stop: list[int],
) -> tuple[ServedTarget, list[str]]:
    """The servers, found to be of this target, and what is worth a note. context: what the target was made for.

    Raises: RequestError for another model, tokenizer or chat template; WorkError where one does not answer.
    """
    try:
        models = [_model(servers, address, model_name, served_model) for address in servers.addresses]
        context = min([context, *(longest for _, longest in models if longest)])
        prompts = list(itertools.islice(_probes(dialogues, encoder, context), _CANDIDATES))
        if not prompts:
            raise RequestError(
                f"No first question fits into the context of {context:,} tokens, or the chat template "
                f"{encoder.template_name} refuses them all. See the data with eagle.data.viewer."
            )
        found, notes, counted = [], list[str](), list[tuple[int, int]]()
        for address, (model, _) in zip(servers.addresses, models, strict=True):
            compared = _compare(servers, address, model, encoder, prompts)
            found.append((model, compared.tokens_from))
            counted += compared.counted
            notes += compared.notes + _named_otherwise(address.url, model, model_name)
    except Refused as refused:
        raise RequestError(f"{refused} {cure(refused)}") from None
    if len(set(found)) > 1:
        listed = "; ".join(
            f"{address.url}: {model}, {'token ids' if tokens_from == SAMPLED else 'text alone'}"
            for address, (model, tokens_from) in zip(servers.addresses, found, strict=True)
        )
        raise RequestError(f"--server: the servers differ ({listed}). Name those that serve the same.")
    says_context = all(longest is not None for _, longest in models)
    engine = ServedTarget(
        servers,
        *found[0],
        context,
        sampling,
        stop,
        encoder.variables,
        Counted(tuple(counted)),
        says_context=says_context,
    )
    return engine, notes


def _model(servers: Servers, address: Address, name: Path, served: str | None) -> tuple[str, int | None]:
    """What the server calls the model, and its context where it says that."""
    try:
        listed = servers.call("/models", address=address, retries=_FIRST_CONTACT).get("data") or []
    except Refused as refused:
        if served is None or refused.status < 400:
            raise
        listed = []  # not every server has a list, or shows it to every key
    cards = {str(card["id"]): card for card in listed if isinstance(card, dict) and "id" in card}
    if served is None:
        same = [
            key for key in cards if key in (str(name), str(name.resolve())) or Path(key).name == name.resolve().name
        ]
        if len(cards) != 1 and len(same) != 1:
            raise RequestError(
                f"{address.url} serves {len(cards)} models ({', '.join(sorted(cards)[:8])}). Say with --served_model "
                f"which of them is --model_name {name}."
            )
        served = next(iter(cards)) if len(cards) == 1 else same[0]
    elif cards and served not in cards:
        raise RequestError(
            f"--served_model {served}: {address.url} serves {', '.join(sorted(cards)[:8])}. Name one of these."
        )
    longest = cards.get(served, {}).get("max_model_len")
    return served, longest if isinstance(longest, int) else None


def _named_otherwise(url: str, served: str, name: Path) -> list[str]:
    """Whose weights a server has, it does not say; its tokenizer may be many models'."""
    if Path(served).name == name.resolve().name:
        return []
    return [f"{url} calls its model {served}; see that it is {name}, as weights cannot be compared from here"]


def _probes(dialogues: Iterable[Dialogue], encoder: Encoder, context: int) -> Iterator[tuple[list[Message], list[int]]]:
    """Prompts to compare that fit, with their tokens here: of first turns, and of a second one behind a reply.

    A template that writes the date writes today's, as the server does; a job that goes on keeps to the day it began.
    """
    today = datetime.datetime.combine(datetime.date.today(), datetime.time())
    for dialogue in dialogues:
        messages = dialogue.begin()
        for question in dialogue.questions[:2]:
            messages = [*messages, {"role": "user", "content": question}]
            try:
                text = encoder.render(messages, add_generation_prompt=True, moment=today)
                tokens = encoder.tokenize(text)[0].tolist()
            except Dropped:
                break
            if len(tokens) >= context:
                break
            yield messages, tokens
            messages = [*messages, {"role": "assistant", "content": "Yes."}]


def _compare(
    servers: Servers, address: Address, model: str, encoder: Encoder, prompts: list[tuple[list[Message], list[int]]]
) -> Compared:
    """Where the tokens of this server's replies will be from, its prompts being those made here.

    A prompt that is too long for it, or that its filter keeps back, is passed over.

    Raises: RequestError where they are not; Refused.
    """
    gives_ids, counted, taken, passed = True, list[tuple[int, int]](), list[list[int]](), None
    for messages, ours in prompts:
        if len(taken) == PROBED:
            break
        body = {"model": model, **chat(messages, encoder.variables), "max_tokens": 1, "temperature": 0.0}
        try:
            answer = _probe(servers, address, "/chat/completions", body, gives_ids)
        except Refused as refused:
            if not (is_too_long(refused) or is_filtered(refused)):
                raise
            passed = refused
            continue
        taken.append(ours)
        if servers.short is None or len(ours) == min(map(len, taken)):
            servers.short = "/chat/completions", body
        theirs = answer.get("prompt_token_ids")
        if isinstance(theirs, list):
            if theirs != ours:
                raise RequestError(_difference(address.url, model, encoder, ours, theirs))
            continue
        gives_ids = False
        count = (answer.get("usage") or {}).get("prompt_tokens")
        if isinstance(count, int) and count > 0:
            counted.append((count, len(ours)))
    if not taken:
        if passed is not None and is_filtered(passed):
            raise RequestError(
                f"{address.url} keeps each of the first {len(prompts)} prompts back: {passed}. Name other "
                "conversations, or a server without that filter."
            )
        raise RequestError(
            f"{address.url} finds each of the first {len(prompts)} prompts too long: {passed}. Start it with a longer "
            "context."
        )
    if gives_ids:
        ours = taken[0]
        body = {"model": model, "prompt": ours, "max_tokens": 1, "temperature": 0.0}
        choice = (_probe(servers, address, "/completions", body, True).get("choices") or [{}])[0]
        theirs = choice.get("prompt_token_ids")
        if isinstance(theirs, list) and theirs != ours:
            raise RequestError(_difference(address.url, model, encoder, ours, theirs))
        if isinstance(choice.get("token_ids"), list):
            return Compared(SAMPLED, [], [])
    notes = [f"{address.url} gives no token ids: replies are taken as text and tokenised again, which may differ from "
             "what was sampled"]  # fmt: skip
    if other := [(theirs, ours) for theirs, ours in counted if theirs != ours]:
        notes.append(
            f"{address.url} counts {other[0][0]} tokens in a prompt that has {other[0][1]} here: another tokenizer "
            "or chat template than --model_name's, or one that counts otherwise, or one that cuts prompts down. See "
            "that the two are the same; a draft trained behind other prompts than those that are served accepts less"
        )
    return Compared(FROM_TEXT, counted, notes)


def _probe(servers: Servers, address: Address, path: str, body: dict[str, Any], ask_ids: bool) -> dict[str, Any]:
    """Raises: Refused, where it is not for the field that only some servers know."""
    if ask_ids:
        try:
            return servers.call(path, {**body, "return_token_ids": True}, address, _FIRST_CONTACT)
        except Refused as refused:
            if refused.status not in (400, 422) or "return_token_ids" not in refused.said:
                raise
    return servers.call(path, body, address, _FIRST_CONTACT)


def _difference(url: str, model: str, encoder: Encoder, ours: list[int], theirs: list[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))

    def shown(ids: list[int]) -> str:
        if at >= len(ids):
            return "its end"
        return f"{ids[at]} ({encoder.tokenizer.decode(ids[max(0, at - 4) : at + 4])!r} around it)"

    return (
        f"{url} makes other tokens of a prompt than --model_name's folder does, so what is trained would not be what "
        f"is served. The first difference is token {at} (from 0): here {shown(ours)}, there {shown(theirs)}; "
        f"{len(ours)} tokens here, {len(theirs)} there. Its {model} is another model, or has another tokenizer or "
        f"chat template (here: {encoder.template_name}). Name the folder that it serves, or give its template with "
        "--chat_template."
    )
