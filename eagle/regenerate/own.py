"""The target's replies decoded here, by transformers, in batches: for small targets, and where no engine is installed.

Every thread that asks waits for its reply; what waits is decoded together, prompts of like length in a batch, padded on
the left. A reply depends on its own seed and on no other reply, but for rounding: which prompts share a batch changes
the last bits of a sum, and so, in 16 bits, now and then a token.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eagle.decode.sampling import Sampling, draw
from eagle.device import describe, is_out_of_memory
from eagle.dtypes import check_computes, dtype_name
from eagle.errors import WorkError
from eagle.regenerate.dialogue import SAMPLED
from eagle.regenerate.journal import LENGTH, STOP
from eagle.regenerate.served import Question, Said
from eagle.regenerate.transport import Stopped
from eagle.streams import make_current
from eagle.target.config import load_config
from eagle.target.trunk import check_packages, from_pretrained_dtype, has_long_rope, served_config


@dataclass(slots=True)
class _Waiting:
    question: Question
    said: Future[Said] = field(default_factory=Future)


class OwnTarget:
    """The target in this process. batch: prompts that are decoded at once. stop: token ids that end a reply."""

    tokens_from = SAMPLED

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        batch: int,
        context: int,
        sampling: Sampling,
        stop: Sequence[int],
    ) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        config = load_config(folder)
        check_packages(config.family)
        check_computes(dtype, device.type)
        self.context, self._batch, self._sampling, self._stop = context, batch, sampling, list(stop)
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), config=served_config(folder, config), **from_pretrained_dtype(dtype)
        )
        if has_long_rope(config):
            # Phi-3's class forgets its cache where a batch grows past the original context, since its rope would change
            # there; this one has the long factors from the start.
            model.config.original_max_position_embeddings = config.max_position_embeddings
        self._model = model.to(device).eval()
        self._said = f"decoded here by transformers, {dtype_name(dtype)} on {describe(device)}, {batch} at a time"
        self._waiting: list[_Waiting] = []
        self._changed, self._stopped = threading.Condition(), False
        threading.Thread(target=self._decode_batches, daemon=True).start()

    def describe(self) -> str:
        return self._said

    def state(self) -> str:
        return ""

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            left, self._waiting = self._waiting, []
            self._changed.notify_all()
        for waiting in left:
            waiting.said.set_exception(Stopped())

    def ask(self, question: Question) -> Said:
        """Raises: Stopped."""
        waiting = _Waiting(question)
        with self._changed:
            if self._stopped:
                raise Stopped
            self._waiting.append(waiting)
            self._changed.notify_all()
        return waiting.said.result()

    def _decode_batches(self) -> None:
        make_current(self._model.device)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopped)
                if self._stopped:
                    return
                # A moment for the others: those that were answered together ask together.
                self._changed.wait_for(lambda: len(self._waiting) >= self._batch or self._stopped, timeout=0.05)
                # The one that waits longest, and those nearest to it in length.
                oldest = len(self._waiting[0].question.prompt) if self._waiting else 0
                order = sorted(self._waiting, key=lambda one: abs(len(one.question.prompt) - oldest))
                batch = order[: self._batch]
                self._waiting = [waiting for waiting in self._waiting if waiting not in batch]
            if not batch:
                continue
            try:
                replies = self.decode([waiting.question for waiting in batch])
            except BaseException as error:
                if isinstance(error, RuntimeError) and is_out_of_memory(error):
                    error = WorkError(
                        f"{len(batch)} prompts at once, and their replies, do not fit the memory of "
                        f"{describe(self._model.device)}. Lower --concurrency (it was {self._batch}) and run the same "
                        "command again: what has come is kept."
                    )
                for waiting in batch:
                    waiting.said.set_exception(error)
                continue
            for waiting, said in zip(batch, replies, strict=True):
                waiting.said.set_result(said)

    @torch.inference_mode()
    def decode(self, questions: Sequence[Question]) -> list[Said]:
        """Replies to a batch of questions, each up to its room or a stop token."""
        from transformers import GenerationConfig, LogitsProcessorList

        model, device = self._model, self._model.device
        longest = max(len(question.prompt) for question in questions)
        ids = torch.zeros(len(questions), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, question in enumerate(questions):
            ids[row, longest - len(question.prompt) :] = torch.tensor(question.prompt)
            mask[row, longest - len(question.prompt) :] = 1
        room = max(question.room for question in questions)
        # What a model's generation_config.json says of sampling would be added: the flags say how it is sampled.
        config = GenerationConfig(
            do_sample=False, max_new_tokens=room, eos_token_id=self._stop or None, pad_token_id=0, use_cache=True
        )
        model.generation_config = config
        processors = LogitsProcessorList()
        if not self._sampling.greedy:
            processors.append(SeededSampling(self._sampling, [question.seed for question in questions], device))
        found = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config,
            logits_processor=processors,
        )  # fmt: skip
        return [
            self._cut(row[longest:], question.room) for row, question in zip(found.tolist(), questions, strict=True)
        ]

    def _cut(self, tokens: list[int], room: int) -> Said:
        """A reply up to its first stop token: what stands behind that is padding."""
        end = next((at + 1 for at, token in enumerate(tokens) if token in self._stop), None)
        ids = tokens[: min(room, len(tokens) if end is None else end)]
        return Said(STOP if end is not None and end <= room else LENGTH, ids, "", len(ids))


class SeededSampling:
    """Leaves of every row's logits only the token that its own generator draws, so that the likeliest is that one."""

    def __init__(self, sampling: Sampling, seeds: Sequence[int], device: torch.device) -> None:
        self._sampling = sampling
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores ``[B, V]`` -> the same shape."""
        probabilities = self._sampling.distribution(scores)
        drawn = torch.cat(
            [draw(row[None], generator) for row, generator in zip(probabilities, self._generators, strict=True)]
        )
        return torch.full_like(scores, float("-inf")).scatter_(1, drawn, 0.0)
