"""Versions of packages, by what is installed: torch is not imported."""

from __future__ import annotations

import re


def release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: (2, 1, 0) of 2.1.0.post3 and of 2.1.0+cpu; () without any."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def dotted(numbers: tuple[int, ...]) -> str:
    """'2.1.0' of (2, 1, 0)."""
    return ".".join(map(str, numbers))


def installed(package: str) -> str | None:
    """Its version; None where it is not installed."""
    # Here, since `eagle` imports this module while the user's folder is still before the standard library's.
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def transformers_release() -> tuple[int, ...]:
    """The numbers of the installed transformers; () without one."""
    return release(installed("transformers") or "")
