"""What the draft inside a real vLLM engine saw and answered, for the parity tests.

The child is ``python -m tests.vllm.captured ASKED.json ANSWERED.json``. It runs engines in its own process, one after
the other, looks over the draft model's shoulder while a prompt is prefilled and a chain is drafted, and saves tokens,
positions, features and logits of those forward passes.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from eagle.vllm.engine import EngineRequest, serve
from tests.vllm.engines import run_child


def capture(request: EngineRequest, folder: Path) -> dict[str, torch.Tensor]:
    """tokens, positions ``[R]``, features ``[R, H]``, logits ``[R, V]`` of the first chain of the only prompt.

    Rows: one for each prompt token, then one for each further draft step, whose feature is the draft's own. Of an
    EAGLE-3 draft the features are what its ``fc`` made of the target's, which are there too: auxiliary ``[T, A * H]``.
    """
    (found,) = capture_all({"chain": request}, folder).values()
    assert isinstance(found, dict), found
    return found


def capture_all(requests: Mapping[str, EngineRequest], folder: Path) -> dict[str, dict[str, torch.Tensor] | str]:
    """By name what `capture` gives, or the traceback of an engine that failed; the others run all the same."""
    files = {name: str(folder / f"{name}.pt") for name in requests}
    asked = [
        {"request": dataclasses.asdict(request), "file": files[name], "name": name}
        for name, request in requests.items()
    ]
    failed = run_child("tests.vllm.captured", folder, asked)
    assert isinstance(failed, dict)
    return {name: failed.get(name) or torch.load(file, weights_only=True) for name, file in files.items()}


def record_forward(passes: list[dict[str, torch.Tensor]], read: list[torch.Tensor]) -> None:
    """Make vLLM's draft classes append a copy of what goes in and comes out of every pass to `passes`."""
    from vllm.model_executor.models.llama_eagle import EagleLlamaForCausalLM
    from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM

    def record(forward: Any) -> Any:
        def recorded(self: Any, input_ids: Any, positions: Any, hidden_states: Any, inputs_embeds: Any = None) -> Any:
            # Copied before the pass: the engine reuses its buffers.
            seen = {"tokens": input_ids.clone(), "positions": positions.clone(), "features": hidden_states.clone()}
            answer = forward(self, input_ids, positions, hidden_states, inputs_embeds)
            passes.append(seen | {"logits": self.compute_logits(answer[0]).clone()})
            return answer

        return recorded

    for draft in (EagleLlamaForCausalLM, Eagle3LlamaForCausalLM):
        draft.forward = record(draft.forward)
    combine = Eagle3LlamaForCausalLM.combine_hidden_states

    def recorded_combine(self: Any, hidden_states: Any) -> Any:
        read.append(hidden_states.clone())
        return combine(self, hidden_states)

    Eagle3LlamaForCausalLM.combine_hidden_states = recorded_combine


def first_chain(passes: list[dict[str, torch.Tensor]], prompt: list[int], depth: int) -> dict[str, torch.Tensor]:
    """The pass that prefills the prompt and the ``depth - 1`` single rows after it as one sequence, without padding."""
    shifted = torch.tensor(prompt[1:])
    start = next(
        at for at, seen in enumerate(passes) if torch.equal(seen["tokens"][: len(shifted)].cpu().long(), shifted)
    )
    lengths = [len(prompt)] + [1] * (depth - 1)
    chain = list(zip(passes[start : start + depth], lengths, strict=True))
    return {name: torch.cat([seen[name][:length].cpu() for seen, length in chain]) for name in passes[start]}


def main(argv: list[str]) -> int:
    from vllm.distributed import cleanup_dist_env_and_memory

    asked, answered = (Path(argument) for argument in argv)
    passes: list[dict[str, torch.Tensor]] = []
    read: list[torch.Tensor] = []
    record_forward(passes, read)
    failed = {}
    for content in json.loads(asked.read_text(encoding="utf-8")):
        request = EngineRequest(**content["request"])
        passes.clear()
        read.clear()
        try:
            serve(request)
            chain = first_chain(passes, request.prompts[0], request.num_speculative_tokens)
            if read:
                length = len(request.prompts[0])
                seen = next(rows for rows in read if len(rows) >= length and bool(rows.any()))
                chain["auxiliary"] = seen[:length].cpu()
            torch.save(chain, content["file"])
        except Exception:
            failed[content["name"]] = traceback.format_exc()
        gc.collect()
        cleanup_dist_env_and_memory()
    answered.write_text(json.dumps(failed), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
