"""What `eagle.decode.serving_choice` found, for people."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eagle.decode.step_costs import COMMAND


def serving_lines(report: dict[str, Any] | None) -> Iterator[str]:
    """For people. report: as `eagle.decode.serving_choice.serving_report`, None where nothing was drafted."""
    if report is None:
        yield ""
        yield (
            "Serving: nothing was drafted, since no reply is longer than one token, and so nothing is said. Raise "
            "--max_new_tokens, or ask for longer replies."
        )
        return
    curves = [one for choice in report["batches"] for one in choice["curves"]]
    names = _names({one["draft"] for one in curves})
    yield ""
    yield f"Serving: speed-up over no draft by K, from the step costs of {report['said']}:"
    width = max((len(_named(one, names)) for one in curves), default=0)
    columns = sorted({point["num_speculative_tokens"] for one in curves for point in one["points"]})
    for choice in report["batches"]:
        yield f"batch {choice['batch_size']:<{max(0, width - 4)}}" + "".join(f"{f'K {k}':>8}" for k in columns)
        for one in choice["curves"]:
            cells = {point["num_speculative_tokens"]: point for point in one["points"]}
            yield f"  {_named(one, names):{width}}" + "".join(_cell(cells.get(k)) for k in columns)
            if one["not_measured"]:
                tokens = ", ".join(map(str, one["not_measured"]))
                yield f"  {_named(one, names)} was not measured at K {tokens} with this batch size"
        yield f"  {_verdict(choice, names)}"
        yield from (f"  {line}" for line in _needs(choice, report["most_tokens"]))
    if report["not_judged"]:
        batches = ", ".join(map(str, report["not_judged"]))
        yield f"batch {batches}: no draft whose acceptance is known was measured there, so nothing is said of it."
    if any(point["is_between"] for one in curves for point in one["points"]):
        yield "~: the cost was not measured and lies on the line between two that were."
    short = (one for one in curves if not one["estimate"] and one["drafted"] < one["most_tokens"])
    yield from dict.fromkeys(
        f"{_named(one, names)}: no more than {one['drafted']} tokens were drafted, so a larger K of it is not judged. "
        f"Draft {one['most_tokens']} at once to have all judged that were measured."
        for one in short
    )
    if report["not_judged"] or any(one["not_measured"] for one in (*report["batches"], *curves)):
        yield f"What was not measured is added by {COMMAND} with the same --output, for that batch size, shape and K."
    yield from dict.fromkeys(f"{_size(one['shape'])}: {one['estimate']}" for one in curves if one["estimate"])


def _size(shape: dict[str, Any]) -> str:
    return f"{shape['family']} of {shape['draft_vocab_size']:,}"


def _names(drafts: set[str]) -> dict[str, str]:
    """Of each draft's folder the end that no other one has: exports are all called alike."""
    found = {}
    for draft in drafts:
        parts, others = Path(draft).parts, [Path(other).parts for other in drafts - {draft}]
        ends = (parts[-count:] for count in range(1, len(parts)))
        found[draft] = str(Path(*next((end for end in ends if all(one[-len(end) :] != end for one in others)), parts)))
    return found


def _named(one: dict[str, Any], names: dict[str, str]) -> str:
    what = _size(one["shape"])
    return f"{what} (estimate)" if one["estimate"] else f"{what} ({names[one['draft']]})"


def _cell(point: dict[str, Any] | None) -> str:
    return f"{'-':>8}" if point is None else f"{point['speedup']:>7.2f}{'~' if point['is_between'] else ' '}"


def _verdict(choice: dict[str, Any], names: dict[str, str]) -> str:
    speedup = choice["speedup"]
    named, tokens = _size(choice), choice["closest"]
    if len(names) > 1 and not choice["is_estimate"]:
        named += f" ({names[choice['draft']]})"
    if not choice["pays"]:
        return (
            f"No draft pays: {named} at K {tokens} comes closest, {speedup:.2f} times, and would need τ "
            f"{choice['needed_tau']:.2f} there.{_doubt(choice)}"
        )
    estimated = ", an estimate" if choice["is_estimate"] else ""
    return f"Best: {named}, K {tokens}: {speedup:.2f} times{estimated}.{_doubt(choice)}"


def _doubt(choice: dict[str, Any]) -> str:
    """What of it may be chance."""
    spread, error = choice["spread"], choice["error"]
    if abs(choice["speedup"] - 1) > spread + error:
        return ""
    if error < 0.005:
        return f" The costs' spread of {spread:.0%} does not tell that from none: measure on a quieter machine."
    return (
        f" The costs' spread of {spread:.0%} and τ's sampling error of {error:.0%} do not tell that from none: decode "
        "more prompts, measure on a quieter machine."
    )


def _needs(choice: dict[str, Any], most: int) -> Iterator[str]:
    """most: the largest K that was measured of any shape."""
    more = "more than that" if choice["pays"] else "anything"
    for one in choice["needs"]:
        yield (
            f"{_size(one['shape'])} would be worth {more} from τ {one['tau']:.2f} at K "
            f"{one['num_speculative_tokens']} ({one['rate']:.2f} of the tokens accepted that follow accepted ones)"
        )
    for one in choice["never"]:
        yield f"{_size(one)} could not be worth {more} at any K up to {most}, however much were accepted"
    for one in choice["not_measured"]:
        size, tokens = _size(one["shape"]), ", ".join(map(str, one["tokens"]))
        if one["is_whole"]:
            yield f"{size} was not measured at this batch size, so nothing is said of it"
        else:
            yield (
                f"{size} was not measured at K {tokens} with this batch size; at the others it could not be worth "
                f"{more}, however much were accepted"
            )
