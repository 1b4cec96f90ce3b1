"""The training loop: accumulate, backward, clip, step, schedule, validate, save; explicit and resumable."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm import tqdm

from eagle.cli import WorkError, progress_bar
from eagle.draft import DraftModel
from eagle.train import checkpoint
from eagle.train.checkpoint import Position
from eagle.train.closed_form import NormalEquations, start_from
from eagle.train.dataset import Batch, FeatureDataset, collate, epoch_batches, micro_batches, shift
from eagle.train.losses import head_loss, smooth_l1
from eagle.train.options import TrainOptions
from eagle.train.validate import Validation, validate

METRICS = "metrics.jsonl"


@dataclass(slots=True)
class StepSums:
    """What one optimizer step saw, summed over micro-batches and processes."""

    supervised: float = 0.0
    feature_loss: float = 0.0
    token_loss: float = 0.0
    correct: float = 0.0


class Trainer:
    """One training run.

    run: what identifies it (store, target, options), compared when it is resumed. `head` is the frozen ``lm_head``
    ``[V, H]`` on the device.
    """

    def __init__(
        self,
        options: TrainOptions,
        accelerator: Accelerator,
        model: DraftModel,
        head: torch.Tensor,
        train: FeatureDataset,
        validation: FeatureDataset,
        run: dict[str, Any],
    ) -> None:
        self.options, self.accelerator, self.draft, self.head = options, accelerator, model, head
        self.train_set, self.validation_set, self.run = train, validation, run
        self.processes = accelerator.num_processes
        self.global_size = options.bs * self.processes * options.gradient_accumulation_steps
        self.steps_per_epoch = math.ceil(len(train) / self.global_size)
        self.total_steps = self.steps_per_epoch * options.num_epochs
        self.position = Position()
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=options.learning_rate(model.config.hidden_size),
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._lr_factor)
        self.best_accuracy = -1.0
        self._seconds_before = 0.0

    def _lr_factor(self, step: int) -> float:
        """Linear warm-up over the run's first `warmup_ratio`, then linear to zero at its real end."""
        warmup = max(1, round(self.total_steps * self.options.warmup_ratio))
        if step < warmup:
            return (step + 1) / warmup
        return max(0.0, (self.total_steps - step) / max(1, self.total_steps - warmup))

    def log(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def initialise(self) -> None:
        """Closed-form start, each process taking its share of the records."""
        started = time.monotonic()
        equations = NormalEquations(self.draft, self.accelerator.device)
        order = np.random.RandomState(self.options.seed).permutation(len(self.train_set))
        for index in order[self.accelerator.process_index :: self.processes]:
            equations.add([shift(self.train_set.record(int(index)))])
            if equations.positions >= self.options.init_positions / self.processes:
                break
        for name in ("xx", "xy"):
            # NPUs have no float64 sums.
            dtype = torch.float32 if self.accelerator.device.type == "npu" else torch.float64
            total = self.accelerator.reduce(getattr(equations, name).to(self.accelerator.device, dtype))
            setattr(equations, name, total.cpu().double())
        start_from(self.draft, equations.solve())
        self.log(f"closed-form start from {equations.positions:,} positions in {time.monotonic() - started:.1f} s")

    def resume(self, folder: Path, state: dict[str, Any]) -> None:
        """Take the run up where `folder` left it."""
        saved = checkpoint.restore(folder, self.draft)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.position = Position(state["step"], state["epoch"], state["batch"])
        self.best_accuracy, self._seconds_before = saved["best_accuracy"], saved["seconds"]
        if self.accelerator.is_main_process:
            self._drop_metrics_after(self.position.step)
            # The run may have been killed between the checkpoint and its pointers.
            checkpoint.point(self.options.cpdir, checkpoint.LAST, folder.name)
            if saved["is_best"]:
                checkpoint.point(self.options.cpdir, checkpoint.BEST, folder.name)
        self.log(f"resuming from {folder} (step {self.position.step} of {self.total_steps})")

    def _drop_metrics_after(self, step: int) -> None:
        path = self.options.cpdir / METRICS
        if not path.is_file():
            return
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        temporary = path.with_name(f".{METRICS}.tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        temporary.replace(path)

    def fit(self) -> Validation | None:
        """Train to the end; returns the last validation."""
        model = self.accelerator.prepare_model(self.draft)
        result = None
        started = time.monotonic() - self._seconds_before
        if self.position.step == 0:
            if self.accelerator.is_main_process:
                self._drop_metrics_after(-1)  # of a run killed before its first checkpoint
            result = self._validate(model, started, "before training")
        is_main = self.accelerator.is_main_process
        bar = progress_bar(self.total_steps, "step", initial=self.position.step, disable=not is_main)
        with bar:
            for epoch in range(self.position.epoch, self.options.num_epochs):
                for group in self._groups(epoch):
                    sums = self._step(model, group)
                    self.position = Position(self.position.step + 1, epoch, self.position.batch + 1)
                    self._record_step(sums, started, bar)
                self.position = Position(self.position.step, epoch + 1, 0)
                last = epoch + 1 == self.options.num_epochs
                checked = None
                if last or (epoch + 1) % self.options.eval_freq == 0:
                    checked = result = self._validate(model, started, f"epoch {epoch + 1}")
                if last or (epoch + 1) % self.options.save_freq == 0:
                    self._save(checked, time.monotonic() - started)
        return result

    def _groups(self, epoch: int) -> Iterator[list[Batch]]:
        """This process's micro-batches of every global batch left in the epoch."""
        options = self.options
        batches = epoch_batches(self.train_set.lengths, self.global_size, options.seed, epoch)
        keys, empty = [], []
        for batch in batches[self.position.batch :]:
            for piece in micro_batches(
                batch, options.bs, self.accelerator.process_index, self.processes, options.gradient_accumulation_steps
            ):
                # A process without records still takes part, with one that counts for nothing.
                keys.append([(epoch, int(index)) for index in (piece if len(piece) else batch[:1])])
                empty.append(not len(piece))
        loader = DataLoader(self.train_set, batch_sampler=keys, collate_fn=collate, num_workers=options.num_workers)
        group = []
        for batch, is_empty in zip(loader, empty, strict=True):
            if is_empty:
                batch.supervised.zero_()
            group.append(batch)
            if len(group) == options.gradient_accumulation_steps:
                yield group
                group = []

    def _step(self, model: torch.nn.Module, group: list[Batch]) -> StepSums:
        """One optimizer step over this process's micro-batches: the gradient of the whole global batch."""
        accelerator, options = self.accelerator, self.options
        own = sum(int(batch.supervised.sum()) for batch in group)
        total = accelerator.reduce(torch.tensor(float(own), device=accelerator.device)).item()
        sums = torch.zeros(3, device=accelerator.device)
        for number, cpu_batch in enumerate(group):
            batch = cpu_batch.to(accelerator.device, self.head.dtype)
            last = number + 1 == len(group)
            with accelerator.no_sync(model) if not last else torch.enable_grad():
                with accelerator.autocast():
                    predicted = model(batch.tokens, batch.features)
                predicted, targets = predicted[batch.supervised], batch.targets[batch.supervised]
                head = head_loss(predicted, targets, self.head)
                features = smooth_l1(predicted, targets).sum()
                loss = options.vloss_weight * features + options.ploss_weight * head.token_loss
                # DDP averages over processes; the sum over the global batch is wanted, per supervised position.
                accelerator.backward(loss * (self.processes / max(total, 1.0)))
            sums += torch.stack([features.detach().float(), head.token_loss.detach().float(), head.correct.float()])
        if options.grad_clip:
            accelerator.clip_grad_norm_(model.parameters(), options.grad_clip)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        features, tokens, correct = accelerator.reduce(sums).tolist()
        if not math.isfinite(features + tokens):
            raise WorkError(
                f"The loss is not finite at step {self.position.step + 1} (features {features}, tokens {tokens}). "
                f"Lower --lr (it is {self.optimizer.param_groups[0]['lr']:.2e}); the last checkpoint is whole."
            )
        return StepSums(total, features, tokens, correct)

    def _record_step(self, sums: StepSums, started: float, bar: tqdm) -> None:
        if not self.accelerator.is_main_process:
            return
        count = max(sums.supervised, 1.0)
        feature_loss, token_loss = sums.feature_loss / count, sums.token_loss / count
        loss = self.options.vloss_weight * feature_loss + self.options.ploss_weight * token_loss
        seconds = time.monotonic() - started
        self._write_metrics(
            step=self.position.step,
            epoch=self.position.epoch,
            loss=loss,
            feature_loss=feature_loss,
            token_loss=token_loss,
            accuracy=sums.correct / count,
            supervised_tokens=int(sums.supervised),
            lr=self.scheduler.get_last_lr()[0],
            seconds=round(seconds, 3),
        )
        bar.set_postfix_str(f"epoch {self.position.epoch + 1}, loss {loss:.3f}, accuracy {sums.correct / count:.3f}")
        bar.update()

    def _write_metrics(self, **values: Any) -> None:
        with (self.options.cpdir / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def _validate(self, model: torch.nn.Module, started: float, when: str) -> Validation | None:
        if not len(self.validation_set):
            return None
        own = range(self.accelerator.process_index, len(self.validation_set), self.processes)
        keys = [[(0, index) for index in own[at : at + self.options.bs]] for at in range(0, len(own), self.options.bs)]
        loader = DataLoader(self.validation_set, batch_sampler=keys, collate_fn=collate)
        result = validate(self.accelerator, model, self.head, loader)
        self.log(
            f"{when:>16}: validation accuracy {result.accuracy:.3f}, feature loss {result.feature_loss:.4f}, "
            f"token loss {result.token_loss:.3f} over {result.positions:,} positions"
        )
        if self.accelerator.is_main_process:
            seconds = round(time.monotonic() - started, 3)
            self._write_metrics(step=self.position.step, epoch=self.position.epoch, seconds=seconds, **result.metrics())
        return result

    def _save(self, result: Validation | None, seconds: float) -> None:
        # Without validation records the newest is taken for the best.
        is_best = result.accuracy > self.best_accuracy if result else not len(self.validation_set)
        if is_best and result:
            self.best_accuracy = result.accuracy
        if self.accelerator.is_main_process:
            optimizer = {
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "best_accuracy": self.best_accuracy,
                "is_best": is_best,
                "seconds": seconds,
            }
            cpdir, metrics = self.options.cpdir, result.metrics() if result else {}
            folder = checkpoint.save(cpdir, self.draft, optimizer, self.position, self.run, metrics)
            if is_best:
                checkpoint.point(cpdir, checkpoint.BEST, folder.name)
            checkpoint.prune(cpdir, self.options.keep)
        self.accelerator.wait_for_everyone()
