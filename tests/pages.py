"""The blocks of code in a page of the documentation, and the command lines in them."""

from __future__ import annotations

import re
import shlex

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_EXPORT = re.compile(r"^export (\w+)=(\S+)", re.MULTILINE)


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of every block of code."""
    return [(language, content) for _, language, content in FENCE.findall(text)]


def shell_blocks(text: str) -> list[str]:
    """The blocks of shell, in order."""
    return [content for language, content in blocks(text) if language == "bash"]


def commands(text: str) -> list[list[str]]:
    """The command lines in a page's blocks of shell, as words; what the page exports stands in place of its name."""
    shell = "\n".join(shell_blocks(text))
    for name, value in _EXPORT.findall(shell):
        shell = re.sub(rf"\${name}\b", lambda _, value=value: value, shell)
    lines = shell.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]
