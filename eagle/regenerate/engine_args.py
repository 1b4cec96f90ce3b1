"""What ``--engine_args`` has for vLLM: which flags may not be there, and which of them decide replies."""

from __future__ import annotations

import shlex

from eagle.engines import INDIFFERENT
from eagle.errors import RequestError

#: Flags that would make the server another one than is asked: where it listens, what it is called, whom it lets in.
_OURS = ("api-key", "headless", "host", "model", "port", "served-model-name", "uds")
_OURS_BEGIN = "ssl-"
#: Flags that leave the replies what they are but for rounding: beside those of every engine a server's own, and those
#: that step 3 decides itself. (How long the context is, every reply knows that it ended.)
_INDIFFERENT = {name.replace("_", "-") for name in INDIFFERENT} | {
    "async-scheduling", "data-parallel-size", "disable-log-requests", "disable-uvicorn-access-log", "dp",
    "enable-log-requests", "enable-prefix-caching", "max-model-len", "pipeline-parallel-size", "pp",
    "tensor-parallel-size", "tp", "uvicorn-log-level",
}  # fmt: skip


def check_engine_args(engine_args: str | None) -> None:
    """Raises: RequestError."""
    try:
        words = shlex.split(engine_args or "")
    except ValueError as error:
        raise RequestError(f"--engine_args {engine_args!r}: {error}; expected words as in a shell.") from error
    for name, _ in _flags(words):
        if name in _OURS or name.startswith(_OURS_BEGIN):
            raise RequestError(
                f"--engine_args has --{name}, and the vLLM that is started here listens to this job alone, at an "
                "address of its own. Leave it out, or start vLLM yourself and name it with --server."
            )


def deciding(engine_args: str | None) -> list[str]:
    """The flags that decide replies, in one order however they are written."""
    found = [(name, values) for name, values in _flags(shlex.split(engine_args or "")) if name not in _INDIFFERENT]
    return sorted(" ".join([f"--{name}", *values]) for name, values in found)


def _flags(words: list[str]) -> list[tuple[str, list[str]]]:
    """Every flag with its values; dashes and underscores are the same to vLLM, and so is an equals sign."""
    found: list[tuple[str, list[str]]] = [("", [])]
    for word in words:
        if not word.startswith("-") or word.lstrip("-")[:1].isdigit():
            found[-1][1].append(word)
            continue
        name, equals, value = word.lstrip("-").partition("=")
        name = name.replace("_", "-")
        if (general := name.partition(".")[0].removeprefix("no-")) in _INDIFFERENT:
            name = general
        found.append((name, [value] if equals else []))
    return found if found[0][1] else found[1:]
