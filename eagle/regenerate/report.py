"""What became of conversations and requests, in words and for the report beside the output."""

from __future__ import annotations

from collections import Counter
from typing import Any

from eagle.regenerate.asking import Counts
from eagle.regenerate.conversations import Conversations
from eagle.regenerate.dialogue import ENDS, FAILED


def chosen_lines(conversations: Conversations) -> list[str]:
    lines = [line for line in conversations.tally.lines() if line.startswith("dropped") or "first:" in line]
    repaired = conversations.tally.repaired.items()
    lines += [f"mended  {count:>7,}  {name.replace('_', ' ')}: later turns are not asked" for name, count in repaired]
    if conversations.silent:
        lines.append(f"dropped {conversations.silent:>7,}  no user speaks")
    if conversations.duplicates:
        lines.append(f"dropped {conversations.duplicates:>7,}  the same questions as another conversation's")
    return lines


def result_lines(counted: Counter[str], counts: Counts) -> list[str]:
    """What became of the requests, for people."""
    lines = [f"{counted['supervised']:,} supervised tokens in {counted['rows']:,} rows"] if counted["rows"] else []
    if counts.asked:
        rate = counts.tokens / max(1e-9, counts.seconds)
        lines.append(f"asked   {counts.asked:>7,}  now, {counts.tokens:,} tokens, {rate:,.0f} a second")
    if counted["truncated"]:
        share = counted["truncated"] / max(1, counted["replies"])
        lines.append(f"cut off {counted['truncated']:>7,}  replies ({share:.0%}), kept without an end of turn")
    if counted["refusals"]:
        lines.append(f"kept    {counted['refusals']:>7,}  replies that begin as a refusal: the target's own words")
    for end, words in ENDS.items():
        if count := counted[f"end_{end}"]:
            lines.append(f"shorter {count:>7,}  {words}")
    if counted["without_reply"]:
        lines.append(f"dropped {counted['without_reply']:>7,}  of these, as their first reply is missing")
    for said in list(dict.fromkeys(counts.failures.values()))[:3]:
        lines.append(f"{'':>17}failed: {said}")
    return lines


def to_json(conversations: Conversations, counted: Counter[str]) -> dict[str, Any]:
    content = {"silent": conversations.silent, "duplicates": conversations.duplicates, **conversations.tally.to_json()}
    return {"counts": dict(sorted((key, value) for key, value in counted.items() if value)), **content}


def missing(counts: Any) -> int:
    """Of a report's counts, the conversations that lack replies whose requests failed."""
    found = counts.get(f"end_{FAILED}") if isinstance(counts, dict) else None
    return found if isinstance(found, int) else 0
