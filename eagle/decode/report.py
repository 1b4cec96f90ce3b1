"""What `eagle.evaluate` found, for report.json and for people."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from eagle.decode.acceptance_counts import Acceptance
from eagle.decode.diagnosis import diagnosis, diagnosis_lines
from eagle.decode.recommendation import Estimate, recommendation
from eagle.decode.replies import Reply

NO_CATEGORY = "uncategorised"


def summary(replies: Sequence[Reply], depth: int, vocabulary: Collection[int] | None) -> dict[str, Any]:
    """The numbers of some replies, drafted `depth` tokens deep. vocabulary: the draft's, None where it has all tokens.

    Speeds count whole replies, prefill included; None where nothing was measured.
    """
    steps = [step for reply in replies for step in reply.drafted.steps]
    acceptance = Acceptance.of(steps, depth)
    tokens = sum(len(reply.drafted.tokens) for reply in replies)
    alone = [reply.alone for reply in replies if reply.alone is not None]
    speed = ratio(tokens, sum(reply.drafted.seconds for reply in replies))
    baseline = ratio(sum(len(one.tokens) for one in alone), sum(one.seconds for one in alone))
    return {
        "replies": len(replies),
        "tokens": tokens,
        "steps": len(steps),
        "tau": acceptance.tau(),
        "accepted_per_position": acceptance.per_position(),
        "n_alpha": acceptance.n_alpha(),
        "draft_ms_per_step": mean_ms(step.draft_seconds for step in steps),
        "target_ms_per_step": mean_ms(step.target_seconds for step in steps),
        "tokens_per_s": speed,
        "baseline_tokens_per_s": baseline,
        "speedup": speed / baseline if speed and baseline else None,
        "draft_vocabulary": None if vocabulary is None else {
            "size": len(vocabulary),
            "coverage": ratio(sum(token in vocabulary for reply in replies for token in reply.drafted.tokens), tokens),
            "rejected": acceptance.rejected,
            "rejected_outside": acceptance.outside,
        },
    }  # fmt: skip


def ratio(count: float, seconds: float) -> float | None:
    return count / seconds if seconds else None


def mean_ms(seconds: Any) -> float | None:
    values = list(seconds)
    return 1000 * sum(values) / len(values) if values else None


def build_report(
    replies: Sequence[Reply],
    depth: int,
    greedy: bool,
    estimates: Sequence[Estimate],
    vocabulary: Collection[int] | None = None,
) -> dict[str, Any]:
    """Overall, by category, where it is weak and what would help, what would be fastest.

    vocabulary: the draft's, None where it has all tokens.

    identical_to_target: whether every reply equals the target's own greedy one; None when sampling, or where the
    target was not run alone.
    """
    compared = [reply for reply in replies if reply.alone is not None] if greedy else []
    differing = [f"{reply.prompt} turn {reply.turn}" for reply in compared if not reply.identical()]
    categories: dict[str, list[Reply]] = {}
    for reply in replies:
        categories.setdefault(reply.category or NO_CATEGORY, []).append(reply)
    return {
        **summary(replies, depth, vocabulary),
        "identical_to_target": not differing if compared else None,
        "identical_replies": len(compared) - len(differing) if compared else None,
        "differing_replies": differing,
        "categories": {name: summary(some, depth, vocabulary) for name, some in categories.items()},
        "diagnosis": diagnosis(replies, depth, vocabulary),
        "recommendation": recommendation(estimates) if estimates else None,
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    """The tables."""
    rows = [("all", report)]
    if len(report["categories"]) > 1:
        rows = [*report["categories"].items(), *rows]
    depth = len(report["accepted_per_position"])
    width = max(len(name) for name, _ in rows)
    head = f"{'':{width}}  replies  tokens     τ"
    head += "".join(f"{f'pos {at}':>7}" for at in range(1, depth + 1))
    lines = ["", f"{head}  tokens/s   alone  ratio"]
    for name, row in rows:
        line = f"{name:{width}}  {row['replies']:>7}{row['tokens']:>8}{row['tau']:>6.2f}"
        line += "".join(f"{rate:>7.3f}" for rate in row["accepted_per_position"])
        line += f"{number(row['tokens_per_s'], 1):>10}{number(row['baseline_tokens_per_s'], 1):>8}"
        lines.append(f"{line}{number(row['speedup'], 2):>7}")
    alphas = "  ".join(f"{n}-α {number(rate, 3)}" for n, rate in enumerate(report["n_alpha"]))
    drafting, verifying = number(report["draft_ms_per_step"], 1), number(report["target_ms_per_step"], 1)
    lines += [
        "",
        f"n-α        {alphas}   (accepted where the n tokens before were)",
        f"step       draft {drafting} ms, target {verifying} ms; {report['steps']:,} steps",
        *_vocabulary_lines(report["draft_vocabulary"]),
        f"memory     {report['peak_memory_gb']:.2f} GB at most ({report['hardware']}, {report['dtype']})",
        f"output     {_identity(report)}",
    ]
    if report["skipped_prompts"]:
        lines.append(f"left out   {len(report['skipped_prompts'])} prompts longer than the model's length")
    lines += diagnosis_lines(report["diagnosis"])
    if report["recommendation"]:
        lines += _recommendation_lines(report)
    return lines


def _vocabulary_lines(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    rejected, outside = found["rejected"], found["rejected_outside"]
    share = "-" if found["coverage"] is None else f"{found['coverage']:.1%}"
    return [
        f"vocabulary the draft's {found['size']:,} tokens are {share} of the output; of {rejected:,} rejections "
        f"{outside:,} are of a token that is not among them"
    ]


def _identity(report: dict[str, Any]) -> str:
    same = report["identical_replies"]
    if same is None:
        return "not compared with the target's own" + ("" if report["temperature"] == 0 else " (sampled)")
    if report["identical_to_target"]:
        return f"the target's own greedy output, token for token, in all {same} replies"
    text = f"differs from the target's own in {report['replies'] - same} of {report['replies']} replies"
    if report["dtype"] == "float32":
        return text + "; in float32 it should not (on a GPU, see that TF32 is off)"
    return (
        text + f"; rounding in {report['dtype']} does that where two tokens are nearly equal (--dtype float32 proves)"
    )


def _recommendation_lines(report: dict[str, Any]) -> list[str]:
    found = report["recommendation"]
    size = "K" if report["mode"] == "chain" else "nodes"
    lines = ["", f"{size:>5}     τ  draft ms  target ms  tokens/s  ratio   (estimated from the cost of a step here)"]
    for one in found["curve"]:
        mark = "  <- fastest" if one["num_draft_tokens"] == found["num_draft_tokens"] else ""
        lines.append(
            f"{one['num_draft_tokens']:>5}{one['tau']:>6.2f}{one['draft_ms']:>10.1f}{one['target_ms']:>11.1f}"
            f"{one['tokens_per_s']:>10.1f}{one['speedup']:>7.2f}{mark}"
        )
    if found["num_draft_tokens"] == 0:
        lines.append("On this machine no speculation is fastest with this draft at one sequence at a time.")
    elif found["num_draft_tokens"] == found["largest_measured"]:
        lines.append("The largest measured is the fastest: a larger --num_draft_tokens may be faster still.")
    return lines


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
