"""Text of other people, made fit to be shown."""

from __future__ import annotations

from collections.abc import Iterable

#: Shown of a list.
_SHOWN = 4
#: What a terminal would act on, or a stream could not encode, as it is shown. Tabs and line breaks stay.
_VISIBLE = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"},  # the pictures Unicode has of them
    0x7F: "\u2421",
    **{code: f"\\x{code:02x}" for code in range(0x80, 0xA0)},
    **{code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)},  # halves of a character, and bytes of odd file names
}


def visible(text: str) -> str:
    """The text with control characters shown, not sent: a record must not colour, clear or retitle a terminal."""
    return text.translate(_VISIBLE)


def listed(items: Iterable[str], separator: str = ", ") -> str:
    """The first of them, and how many more there are."""
    items = list(items)
    return separator.join(items[:_SHOWN]) + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")
