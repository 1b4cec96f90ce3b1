"""What vLLM has to be told to serve a target with a draft; which targets it cannot serve with one."""

from __future__ import annotations

from dataclasses import dataclass

from eagle.drafts.families import DRAFT_FAMILIES
from eagle.drafts.interface import DraftFamily
from eagle.errors import RequestError
from eagle.target.config import ModelConfig
from eagle.target.families import TARGET_FAMILIES

#: vLLM's name for whose code runs the target: its own class where it has one, else transformers'.
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Serving:
    """Engine arguments that a target and its draft need beside ``speculative_config``.

    model_impl: whose code runs the target. max_model_len: the longest context that the draft's features are right for,
    None where there is no such limit.
    """

    model_impl: str = AUTO
    max_model_len: int | None = None

    def arguments(self) -> dict[str, str | int]:
        """Of ``vllm.LLM``."""
        found: dict[str, str | int] = {} if self.model_impl == AUTO else {"model_impl": self.model_impl}
        return found if self.max_model_len is None else found | {"max_model_len": self.max_model_len}

    def flags(self) -> str:
        """Of ``vllm serve``, with a space in front of each."""
        return "".join(f" --{name.replace('_', '-')} {value}" for name, value in self.arguments().items())

    def why(self) -> list[str]:
        """A sentence for each of them."""
        reasons = []
        if self.model_impl != AUTO:
            reasons.append(
                f"--model-impl {self.model_impl}: vLLM's own class of this base model does not hand over what the "
                "draft reads; transformers' does."
            )
        if self.max_model_len is not None:
            reasons.append(
                f"--max-model-len {self.max_model_len}: with a longer context vLLM runs the base model with the long "
                "factors of its rope, at every length, and its features are other ones than the draft was trained on."
            )
        return reasons


def serving_of(target: ModelConfig, family: DraftFamily, flag: str = "--base-path") -> Serving:
    """How vLLM serves the target with a draft of that family. flag: where the target came from.

    Raises: RequestError where it does not.
    """
    known = TARGET_FAMILIES[target.family]
    model_impl = known.serves.get(family.method)
    if model_impl is None:
        others = [other for other in DRAFT_FAMILIES.values() if other.method in known.serves]
        instead = "".join(f" Train {other.describes} for it: --draft {other.name}." for other in others)
        raise RequestError(
            f"{flag}: no vLLM serves {family.describes} with a base model of model_type {target.family!r} (run with "
            f"vLLM 0.32).{instead}"
        )
    rope = target.rope_scaling or {}
    longest = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
    return Serving(model_impl, longest)
