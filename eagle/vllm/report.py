"""What `eagle.vllm.verify` says: two engines' results beside each other, for people and for report.json."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

from eagle.data.loss_mask import Encoder
from eagle.data.prompts import Prompt
from eagle.vllm.engine import EngineRequest, EngineResult
from eagle.vllm.serving import AUTO

#: How many tokens of both continuations a difference shows.
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a reply with the draft leaves the one without. position: the first token that differs, counted from 0."""

    prompt: int
    position: int
    without: list[int]
    with_draft: list[int]


def differences(without: list[list[int]], with_draft: list[list[int]]) -> list[Difference]:
    """The first difference of every reply that is not the same."""
    found = []
    for index, (plain, drafted) in enumerate(zip(without, with_draft, strict=True)):
        if plain == drafted:
            continue
        shorter = min(len(plain), len(drafted))
        position = next((at for at in range(shorter) if plain[at] != drafted[at]), shorter)
        end = position + _SHOWN
        found.append(Difference(index, position, plain[position:end], drafted[position:end]))
    return found


def build_report(
    request: EngineRequest,
    with_draft: EngineResult,
    without: EngineResult | None,
    prompts: list[Prompt],
    encoder: Encoder,
    native: EngineResult | None = None,
) -> dict[str, Any]:
    """Everything measured, for people and for report.json.

    without: the engine that was compared, of the same class of the target; None where it was left out. native: one
    without the draft by vLLM's own class, where that is another one: the speed to beat is what would be served.
    """
    found = differences(without.outputs, with_draft.outputs) if without else []
    first = None
    if found:
        first = {
            "prompt": prompts[found[0].prompt].id,
            "category": prompts[found[0].prompt].category,
            "position": found[0].position,
            "without": encoder.tokenizer.decode(found[0].without),
            "with": encoder.tokenizer.decode(found[0].with_draft),
        }
    served = native or without
    speed, alone = with_draft.tokens_per_second(), served.tokens_per_second() if served else None
    return {
        "loaded": True,
        "base": request.model,
        "draft": request.draft,
        "vllm": with_draft.vllm,
        "device": with_draft.device,
        "dtype": with_draft.dtype,
        "num_speculative_tokens": request.num_speculative_tokens,
        "max_new_tokens": request.max_new_tokens,
        "batch_size": request.batch_size,
        "prompts": len(prompts),
        "tokens": with_draft.tokens(),
        "identical": not found if without else None,
        "differing_prompts": len(found) if without else None,
        "first_difference": first,
        "drafts": with_draft.drafts,
        "drafted_tokens": with_draft.drafted,
        "accepted_tokens": with_draft.accepted,
        "acceptance": with_draft.acceptance(),
        "accepted_per_position": [count / max(1, with_draft.drafts) for count in with_draft.accepted_per_position],
        "tau": with_draft.tau(),
        "model_impl": request.model_impl,
        "tokens_per_second": speed,
        "tokens_per_second_without": alone,
        "model_impl_without": (AUTO if native else request.model_impl) if served else None,
        "speed_ratio": speed / alone if alone else None,
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    lines = [
        f"loaded    yes, by vLLM {report['vllm']} on {report['device']}: {report['dtype']}, "
        f"{report['num_speculative_tokens']} tokens drafted at once, {report['prompts']} prompts, "
        f"{report['batch_size']} at a time"
    ]
    first, alone = report["first_difference"], report["tokens_per_second_without"]
    if report["identical"] is None:
        lines.append("output    not compared with the base model's own")
    elif first is None:
        lines.append(f"output    identical with and without the draft ({report['tokens']:,} tokens)")
    else:
        named = f"{first['prompt']} ({first['category']})" if first["category"] else first["prompt"]
        lines += [
            f"output    differs in {report['differing_prompts']} of {report['prompts']} replies, first in "
            f"prompt {named}, token {first['position']} of the reply (from 0)",
            f"          without: {first['without']!r}",
            f"          with:    {first['with']!r}",
            f"          {_rounding(report['dtype'])}",
        ]
    per_position = "  ".join(f"{at}: {rate:.3f}" for at, rate in enumerate(report["accepted_per_position"], start=1))
    lines += [
        f"accepted  by position  {per_position}   ({report['accepted_tokens']:,} of {report['drafted_tokens']:,} "
        f"drafted tokens, {report['acceptance']:.3f})",
        f"tau       {report['tau']:.3f} tokens per forward pass of the target",
        f"speed     {report['tokens_per_second']:.1f} tokens/s with the draft"
        + (f", {alone:.1f} without{_natively(report)}: ratio {report['speed_ratio']:.2f}" if alone else ""),
    ]
    return lines


def _natively(report: dict[str, Any]) -> str:
    if report["model_impl"] == report["model_impl_without"]:
        return ""
    return f" (by vLLM's own class of the base model, where the draft needs --model-impl {report['model_impl']})"


def _rounding(dtype: str) -> str:
    if dtype == "float32":
        return "In float32 the two should agree; on a GPU, see that TF32 is off."
    return (
        f"In {dtype} vLLM's own rounding differs when several tokens are verified at once, so two nearly equal "
        "tokens may change places; --dtype float32 tells that from a fault."
    )


def verdict(report: dict[str, Any]) -> str | None:
    """What is wrong with the draft, None where nothing is."""
    if not report["drafted_tokens"]:
        return "vLLM drafted nothing: the replies are too short to measure. Raise --max_new_tokens."
    if not report["accepted_tokens"]:
        return (
            f"None of {report['drafted_tokens']:,} drafted tokens was accepted: vLLM loaded a draft that does not fit. "
            "docs/vllm.md lists what causes this; exporting it again with this toolkit checks for all of them."
        )
    if report["identical"] is False and report["dtype"] == "float32":
        return "The output with the draft differs from the output without it, in float32."
    return None


def measured_text(report: dict[str, Any]) -> str:
    """The sentence for the draft's note."""
    per_position = ", ".join(f"{rate:.2f}" for rate in report["accepted_per_position"])
    return (
        f"τ {report['tau']:.2f} with {report['num_speculative_tokens']} speculative tokens, greedy; accepted by "
        f"position {per_position} (vLLM {report['vllm']}, {report['device']}, {report['dtype']}, "
        f"{report['prompts']} prompts, {datetime.date.today().isoformat()})."
    )
