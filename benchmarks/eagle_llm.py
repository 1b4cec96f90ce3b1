"""Runs the published trainer, as its wheel has it, for some steps on this machine:

    python benchmarks/eagle_llm.py WHEEL STEPS METRICS --basepath ... --configpath ... --tmpdir ... --cpdir ... --bs 4

WHEEL is the folder that eagle-llm 1.2.1 was unpacked to. Its code is imported unchanged; what it needs and today's
packages or a CPU have not is put in its way: a logger, names that transformers has dropped, ``.cuda()``, the base of
its rotation. Writes a line a step to METRICS: ``step``, ``supervised_tokens``, ``seconds``.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
import types
from pathlib import Path

import torch


def main() -> None:
    wheel, steps, metrics = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    sys.path[0] = str(wheel)  # its package is called eagle, too
    sys.argv[1:] = sys.argv[4:]
    _restore_names()
    sys.modules["wandb"] = _Logger(steps, metrics)  # only now: accelerate looks whether the real one is there
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor
    runpy.run_module("eagle.train.main", run_name="__main__")


class _Logger(types.ModuleType):
    """In the place of wandb: counts the steps, and ends the run."""

    def __init__(self, steps: int, metrics: Path) -> None:
        super().__init__("wandb")
        self.steps, self.metrics, self.step = steps, metrics, 0

    def init(self, **_: object) -> None:
        self.started = time.perf_counter()

    def log(self, _: dict) -> None:
        self.step += 1
        supervised = int(sys._getframe(1).f_globals["ct"])  # the trainer is one script: its count of this step
        line = {"step": self.step, "supervised_tokens": supervised, "seconds": time.perf_counter() - self.started}
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.step == self.steps:
            sys.exit()


def _restore_names() -> None:
    import transformers.modeling_utils
    import transformers.pytorch_utils
    import transformers.utils

    def decorator(*_: object, **__: object):
        return lambda function: function

    for name in ("add_start_docstrings", "add_start_docstrings_to_model_forward", "replace_return_docstrings"):
        if not hasattr(transformers.utils, name):
            setattr(transformers.utils, name, decorator)
    if not hasattr(transformers.pytorch_utils, "ALL_LAYERNORM_LAYERS"):
        transformers.pytorch_utils.ALL_LAYERNORM_LAYERS = []
    # transformers gives every configuration a rope_scaling, which the trainer takes for a stretched context.
    from eagle.model.cnets import LlamaAttention, LlamaRotaryEmbedding

    def plain_rope(attention: LlamaAttention) -> None:
        attention.rotary_emb = LlamaRotaryEmbedding(
            attention.head_dim, attention.max_position_embeddings, base=attention.config.theta
        )

    LlamaAttention._init_rope = plain_rope


if __name__ == "__main__":
    main()
