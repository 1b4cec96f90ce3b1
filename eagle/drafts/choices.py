"""What is up to the user in some draft families and not in others."""

from __future__ import annotations

from dataclasses import dataclass

from eagle.errors import RequestError


@dataclass(frozen=True, slots=True)
class DraftChoices:
    """``--aux_layers`` and ``--draft_vocab_size``; None where the family is to choose.

    held_layers: what a store holds the inputs of, for whoever chose no layers.
    """

    aux_layers: tuple[int, ...] | None = None
    draft_vocab_size: int | None = None
    held_layers: tuple[int, ...] | None = None

    def refuse(self, names: tuple[str, ...], describes: str, instead: str) -> None:
        """Raises: RequestError where one of these was made. describes: the draft; instead: what they are for."""
        for name in names:
            if (value := getattr(self, name)) is not None:
                shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
                raise RequestError(f"--{name} {shown}: {describes} has no such choice. Leave it out, or {instead}.")


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """'2,16,29' -> (2, 16, 29); None stays None. Raises: RequestError."""
    if text is None:
        return None
    entries = [entry.strip() for entry in text.split(",")]
    wrong = [entry for entry in entries if not (entry.isascii() and entry.isdigit())]
    if wrong:
        raise RequestError(f'--aux_layers "{text}": {wrong[0]!r} is no layer number; expected e.g. 2,16,29.')
    return tuple(map(int, entries))
