"""What the draft inside an engine is given and answers: vLLM mixes `Watching` into its workers.

    worker_extension_cls="eagle.vllm.capture.Watching"      in the engine's options
    watch(engine, sequences, folder)                        one sequence after the other, alone in the engine
    load_watched(file)                                      in the process that asked

No class of vLLM's is named here: what is looked at is the proposer of the worker's model runner and what that is called
with, the same for every kind of draft.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eagle.errors import WorkError

#: What a proposer is told of the rows that are sampled from, and what older releases call it.
_LAST, _LAST_OF_OLDER = "token_indices_to_sample", "last_token_indices"


@dataclass(frozen=True, slots=True)
class Watched:
    """One sequence through an engine, which generated what is behind its prompt.

    tokens: ``[T]``, prompt and reply. prompt: its length. features: ``[R, W]``, what the draft was given of the target
    at positions 0..R-1, in the engine's dtype; of the last tokens there are none. starts: ``[N]``, positions from which
    chains were drafted: one from position i saw x[0..i+1] and guesses x[i+2] first. drafted: ``[N, K]``, the guesses.
    """

    tokens: torch.Tensor
    prompt: int
    features: torch.Tensor
    starts: torch.Tensor
    drafted: torch.Tensor


class Watching:
    """A mixin of vLLM's workers. Names begin with ``eagle_`` because they become the worker's own."""

    def eagle_watch(self) -> None:
        """Keep what the draft is called with from here on. Raises: WorkError where there is no proposer to look at."""
        drafter = getattr(self.model_runner, "drafter", None)  # type: ignore[attr-defined]
        if drafter is None or not hasattr(drafter, "propose"):
            raise WorkError(
                "This engine's model runner shows no proposer to look at. Start it with VLLM_USE_V2_MODEL_RUNNER=0 in "
                "the environment."
            )
        if not hasattr(self, "eagle_seen"):
            self.eagle_seen: list[dict[str, torch.Tensor]] = []
            drafter.propose = _recorded(drafter.propose, self.eagle_seen)
        self.eagle_seen.clear()

    def eagle_save(self, file: str) -> None:
        """Write what was seen since; the ranks of one engine see the same."""
        if getattr(self, "rank", 0) == 0 and hasattr(self, "eagle_seen"):
            torch.save(self.eagle_seen, file)


def _recorded(propose: Any, seen: list[dict[str, torch.Tensor]]) -> Any:
    def recorded(*args: Any, **given: Any) -> Any:
        # Copied before the call: the engine reuses its buffers.
        call = {name: given[name].clone() for name in ("target_positions", "target_hidden_states", "next_token_ids")}
        last = given["token_indices_to_sample"] if _LAST in given else given[_LAST_OF_OLDER]
        rows = given["target_positions"].shape[-1]
        call["last"] = torch.tensor([rows - 1]) if last is None else last.clone()
        drafted = propose(*args, **given)
        seen.append({name: tensor.cpu() for name, tensor in (call | {"drafted": drafted.clone()}).items()})
        return drafted

    return recorded


def watch(engine: Any, sampling: Any, tokens: list[int], file: Path) -> Watched:
    """Generate behind these tokens and tell what the draft saw. file: where the worker may write it."""
    engine.reset_prefix_cache()  # or the features of what it knows already are not computed
    engine.collective_rpc("eagle_watch")
    (reply,) = engine.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)
    engine.collective_rpc("eagle_save", args=(str(file),))
    seen = torch.load(file, weights_only=True)
    return assembled(seen, tokens, list(reply.outputs[0].token_ids))


def assembled(seen: list[dict[str, torch.Tensor]], prompt: list[int], reply: list[int]) -> Watched:
    """The sequence from the calls in order: rows behind ``last`` were rejected, and are computed again later."""
    tokens = torch.tensor([*prompt, *reply])
    rows: dict[int, torch.Tensor] = {}
    starts, drafted = [], []
    for call in seen:
        last = int(call["last"][0])
        positions = call["target_positions"].flatten()[: last + 1].tolist()
        rows |= dict(zip(positions, call["target_hidden_states"][: last + 1], strict=True))
        if positions[-1] >= len(prompt) - 1:  # the draft also runs behind every part of a long prompt
            starts.append(positions[-1])
            drafted.append(call["drafted"][0].long())
    known = next((at for at in range(len(tokens)) if at not in rows), len(tokens))
    return Watched(
        tokens,
        len(prompt),
        torch.stack([rows[at] for at in range(known)]) if known else torch.empty(0, 0),
        torch.tensor(starts, dtype=torch.long),
        torch.stack(drafted) if drafted else torch.empty(0, 0, dtype=torch.long),
    )


def save_watched(watched: list[Watched], file: Path) -> None:
    content = [{name: getattr(one, name) for name in Watched.__slots__} for one in watched]
    torch.save(content, file)


def load_watched(file: Path) -> list[Watched]:
    return [Watched(**one) for one in torch.load(file, weights_only=True)]
