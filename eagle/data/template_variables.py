"""What a chat template asks for beside the conversation, and what a user says to that: ``--chat_template_kwargs``.

vLLM takes the same object: ``chat_template_kwargs`` in a request, ``--default-chat-template-kwargs`` for all of them.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from typing import Any

from eagle.errors import RequestError

FLAG = "--chat_template_kwargs"
HELP = (
    "a JSON object of variables for the chat template, the ones that you serve with, e.g. "
    "'{\"enable_thinking\": false}' (default: none, as a server without them)"
)
#: Whether the model reasons before it replies, in templates that leave it to whoever serves.
SWITCHES = ("enable_thinking", "thinking")
#: What the conversation, the tokenizer or the renderer says.
_TAKEN = (
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "strftime_now",
    "raise_exception", "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
    "additional_special_tokens",
)  # fmt: skip


def parse_kwargs(text: str | None) -> dict[str, Any] | None:
    """'{"enable_thinking": false}' -> {"enable_thinking": False}; None stays None. Raises: RequestError."""
    if text is None:
        return None
    expected = f"expected a JSON object of names and values, e.g. {FLAG} '{{\"enable_thinking\": false}}'"
    try:
        found = json.loads(text, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{FLAG} {text}: {error}; {expected} (in quotes that the shell leaves whole).") from error
    if not isinstance(found, dict):
        raise RequestError(f"{FLAG} {text}: {expected}.")
    if not found:
        raise RequestError(f"{FLAG} {text} names no variable. Leave it out, or: {expected}.")
    for name in SWITCHES:
        # A template compares with false, and takes the text "false" for true.
        if name in found and not isinstance(found[name], bool):
            raise RequestError(
                f"{FLAG}: {name} is {json.dumps(found[name], ensure_ascii=False)}; expected true or false."
            )
    return found


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def shown(variables: dict[str, Any]) -> str:
    """Variables as they are typed, for people; the same whatever their order."""
    return json.dumps(variables, sort_keys=True, ensure_ascii=False)


def variables_of(template: str, tokenizer: Any) -> frozenset[str]:
    """The names that a template looks up and a user may give a value. None of one that cannot be parsed."""
    import jinja2
    from jinja2 import ext, meta, nodes

    class Generation(ext.Extension):
        """The tag that marks a reply for training; transformers brings it, too."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = jinja2.Environment(extensions=[Generation, ext.loopcontrols])
    try:
        found = meta.find_undeclared_variables(environment.parse(template))
    except jinja2.TemplateSyntaxError:  # whoever renders it says so
        return frozenset()
    return frozenset(found).difference(_TAKEN, _parameters(tokenizer))


def _parameters(tokenizer: Any) -> Iterable[str]:
    """What its own method would take for an argument, and not hand to the template."""
    return inspect.signature(tokenizer.apply_chat_template).parameters


def check_kwargs(variables: dict[str, Any], known: frozenset[str], template_name: str) -> None:
    """Raises: RequestError for a variable that the template does not look up, so that it would do nothing."""
    unknown = [name for name in variables if name not in known]
    if unknown:
        asks = f"it asks for {', '.join(sorted(known))}" if known else "it asks for none"
        raise RequestError(
            f"{FLAG}: {', '.join(unknown)} would do nothing: the chat template {template_name} has no such variable "
            f"({asks}). Take it out, or name the template that you serve with (--chat_template)."
        )
