"""What vLLM has to be told to serve a target with a draft; which targets it cannot serve with one."""

from __future__ import annotations

from dataclasses import dataclass

from eagle.drafts.families import check_served
from eagle.drafts.interface import DraftFamily
from eagle.target.config import ModelConfig
from eagle.target.families import TARGET_FAMILIES
from eagle.target.trunk import least_context

#: vLLM's name for whose code runs the target: its own class where it has one, else transformers'.
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Serving:
    """What a target and its draft need beside ``speculative_config``.

    model_impl: whose code runs the target. least_context: the shortest context to serve that makes vLLM compute the
    features that the draft was trained on, 0 where all do. scaled_elsewhere: whether transformers' class hands the
    draft other embeddings than vLLM's own.
    """

    model_impl: str = AUTO
    least_context: int = 0
    scaled_elsewhere: bool = False

    def flags(self) -> str:
        """Of ``vllm serve``, with a space in front of each."""
        return "" if self.model_impl == AUTO else f" --model-impl {self.model_impl}"

    def arguments(self) -> dict[str, str]:
        """The same of ``vllm.LLM``."""
        return {} if self.model_impl == AUTO else {"model_impl": self.model_impl}

    def reasons(self) -> list[str]:
        """What to know of it, for people."""
        found = []
        if self.model_impl != AUTO:
            found.append(
                f"`--model-impl {self.model_impl}` is needed: vLLM's own class of this base model does not hand over "
                "what the draft reads, and transformers' does."
            )
        if self.scaled_elsewhere and self.model_impl == AUTO:
            found.append(
                "No `--model-impl transformers`: the draft would be given the embeddings as that class scales them, "
                "which are not those of the training."
            )
        if self.least_context:
            found.append(
                f"No `--max-model-len` below {self.least_context}: vLLM would take the short factors of the base "
                "model's longrope, and hand over other features than those of the training."
            )
        return found


def serving_of(target: ModelConfig, family: DraftFamily) -> Serving:
    """How vLLM serves the target with a draft of that family.

    Raises: RequestError where it does not.
    """
    check_served(family, target)
    model_impl = TARGET_FAMILIES[target.family].serves[family.method]
    return Serving(model_impl, least_context(target), TARGET_FAMILIES[target.family].scales_embeddings)
