"""In vLLM's place, where there is none: an engine that hands over what transformers' model gives, as vLLM's would.

`stub_python` makes an interpreter that has it for vLLM; there it can be told to fail.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from eagle.generate.handover import Handover
from eagle.target.trunk import from_pretrained_dtype

#: What the interpreter's engine does at its so many-th batch: "killed 3", "raises 3", "hangs 3".
FAULT = "STUB_ENGINE_FAULT"
#: Files by which a vLLM is known to hand hidden states over.
_KNOWN_BY = (
    "model_executor/models/extract_hidden_states.py",
    "distributed/kv_transfer/kv_connector/v1/example_hidden_states_connector.py",
)


class Engine:
    """arguments: what vLLM is started with. spoil: what becomes of a sequence's states."""

    def __init__(self, model: Path, arguments: dict[str, Any], handover: Handover) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model, **from_pretrained_dtype(torch.float32)).model.eval()
        config = arguments["speculative_config"]["draft_model_config"]["hf_config"]
        self.layers = config["eagle_aux_hidden_state_layer_ids"]
        self.handover = handover
        self.spoil: Callable[[torch.Tensor], torch.Tensor | None] = lambda states: states

    @torch.no_grad()
    def generate(self, prompts: Sequence[dict[str, Any]], sampling: Sequence[Any], use_tqdm: bool) -> None:
        # In an order of its own, as requests end.
        for prompt, one in reversed(list(zip(prompts, sampling, strict=True))):
            seen: list[torch.Tensor] = []
            hook = self.model.norm.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            given = self.model(torch.tensor([prompt["prompt_token_ids"]]), output_hidden_states=True).hidden_states
            hook.remove()
            states = torch.stack([*(given[layer] for layer in self.layers[:-1]), seen[0]], dim=2)[0]
            spoiled = self.spoil(states)
            if spoiled is not None:
                self.handover.put(one.extra_args["kv_transfer_params"]["eagle_key"], spoiled)


class LLM(Engine):
    """As ``vllm.LLM``."""

    def __init__(self, **arguments: Any) -> None:
        torch.set_num_threads(1)
        folder = arguments["kv_transfer_config"]["kv_connector_extra_config"].get("eagle_folder")
        super().__init__(Path(arguments["model"]), arguments, Handover(Path(folder) if folder else None))
        self.batches = 0

    def generate(self, prompts: Sequence[dict[str, Any]], sampling: Sequence[Any], use_tqdm: bool) -> None:
        self.batches += 1
        what, _, at = os.environ.get(FAULT, "").partition(" ")
        if what and self.batches == int(at):
            if what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "hangs":
                time.sleep(1000)
            raise RuntimeError("the stub was told to fail")
        super().generate(prompts, sampling, use_tqdm)


class SamplingParams(SimpleNamespace):
    """As ``vllm.SamplingParams``."""


def stub_python(folder: Path, fault: str = "") -> Path:
    """An interpreter like this one, which has the stub for a vLLM 0.32.0."""
    package = folder / "vllm"
    for name in _KNOWN_BY:
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).touch()
    if not (folder / "tests").exists():  # the package takes the checkout off the path
        (folder / "tests").symlink_to(Path(__file__).parent)
    (package / "__init__.py").write_text("from tests.stub_engine import LLM, SamplingParams\n")
    metadata = folder / "vllm-0.32.0.dist-info" / "METADATA"
    metadata.parent.mkdir(exist_ok=True)
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    python = folder / f"python {fault}".rstrip()
    python.write_text(
        f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(folder))}:"$PYTHONPATH" {FAULT}={shlex.quote(fault)} '
        f'OMP_NUM_THREADS=1 exec {shlex.quote(sys.executable)} "$@"\n'
    )
    python.chmod(0o755)
    return python
