"""The training loop: accumulate, backward, clip, step, schedule, validate, save; explicit and resumable."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from eagle.drafts.alignment import Batch, StoredBatch
from eagle.drafts.network import DraftNetwork
from eagle.drafts.objective import LossSums, Objective
from eagle.drafts.starts import Start, StartData
from eagle.drafts.unroll import UnrolledDraft, chain_supervision
from eagle.train import checkpoint
from eagle.train.averaging import averaged, swap, update
from eagle.train.checkpoint import Position
from eagle.train.dataset import FeatureDataset, epoch_batches, micro_batches, validation_order
from eagle.train.divergence import LossGrowth, SkippedSteps, check_finite
from eagle.train.exchange import Exchange
from eagle.train.loader import Key, Loader, ahead
from eagle.train.options import TrainOptions
from eagle.train.picture import draw_run
from eagle.train.run_log import RunLog, StepResult
from eagle.train.schedule import lr_factor
from eagle.train.sharding import clip, is_sharded, no_sync, shard, whole_draft, whole_optimizer
from eagle.train.validation import Validation, validate


class Trainer:
    """One training run.

    run: what identifies it (store, target, options), compared when it is resumed. dtype: of what the draft reads.
    notes: on the records, for people.
    """

    def __init__(
        self,
        options: TrainOptions,
        accelerator: Accelerator,
        draft: DraftNetwork,
        objective: Objective,
        dtype: torch.dtype,
        train: FeatureDataset,
        validation: FeatureDataset,
        run: dict[str, Any],
        notes: Sequence[str] = (),
    ) -> None:
        self.notes = notes
        self.options, self.accelerator, self.draft = options, accelerator, draft
        self.objective, self.dtype = objective, dtype
        self.train_set, self.validation_set, self.run = train, validation, run
        self.processes = accelerator.num_processes
        self.global_size = options.bs * self.processes * options.gradient_accumulation_steps
        self.steps_per_epoch = math.ceil(len(train) / self.global_size)
        self.total_steps = self.steps_per_epoch * options.num_epochs
        if options.max_steps is not None:
            self.total_steps = min(self.total_steps, options.max_steps)
        self.position = Position()
        optimizer = torch.optim.AdamW(
            list(draft.trained_state().values()),
            lr=options.learning_rate(draft.config.hidden_size),
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(step, self.total_steps, options.warmup_ratio)
        )
        # accelerate's wrapper unscales float16 gradients; it changes nothing else.
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.best_tau, self._validations_without_gain = 0.0, 0
        self._is_resumed = False
        self.skipped = SkippedSteps()
        tracker = None if options.report_to == "none" else accelerator
        self.log = RunLog(
            options.run_folder, active=accelerator.is_main_process, total_steps=self.total_steps, tracker=tracker
        )
        self._last_save = time.monotonic()

    def initialise(self, start: Start) -> None:
        """Give the draft its first weights, each process looking at its share of the records."""
        order = np.random.RandomState(self.options.seed).permutation(len(self.train_set))
        own = order[self.accelerator.process_index :: self.processes]
        exchange = Exchange(self.accelerator)
        # An engine has something to do while the sums are added up.
        threads = self.options.loader_threads(self.accelerator.device.type) if self.options.is_engine else 0
        said = start(
            self.draft,
            StartData(
                examples=ahead(self.train_set.example, own.tolist(), threads),
                positions=self.options.init_positions / self.processes,
                max_len=self.options.max_len,
                device=self.accelerator.device,
                count=exchange.count,
                reduce=exchange.sum_on_main,
                broadcast=exchange.from_main,
            ),
        )
        if said:
            self.log.say(said)

    def resume(self, folder: Path, state: dict[str, Any]) -> None:
        """Take the run up where `folder` left it."""
        self._is_resumed = True
        saved = checkpoint.restore(folder, self.draft)
        self.optimizer.load_state_dict(saved["optimizer"])
        swap(self.optimizer)
        self.scheduler.load_state_dict(saved["scheduler"])
        self.position = Position(state["step"], state["epoch"], state["batch"])
        self.best_tau, self._validations_without_gain = saved["best_tau"], saved["validations_without_gain"]
        if self.accelerator.scaler is not None and saved["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.log.start_at(self.position.step, saved["seconds"])
        if self.accelerator.is_main_process:
            # The run may have been killed between the checkpoint and its pointers.
            checkpoint.point(self.options.run_folder, checkpoint.LAST, folder.name)
            best = checkpoint.resolve_pointer(self.options.run_folder / checkpoint.BEST)
            if saved["is_best"] or not best.is_dir():  # a damaged one may have been moved away
                checkpoint.point(self.options.run_folder, checkpoint.BEST, folder.name)
        self.log.say(f"resuming from {folder} (step {self.position.step} of {self.total_steps})")

    def fit(self) -> None:
        """Train to the end: the last epoch, ``--max_steps``, or `patience` epochs without a better τ."""
        model = UnrolledDraft(self.draft)
        if is_sharded():
            model = shard(self.accelerator, model, self.optimizer)
        else:
            model = self.accelerator.prepare_model(model)
        if not self._is_resumed:
            # Takes back what a run wrote that was killed before its first checkpoint.
            self.log.start_at(None, self.log.seconds)
            self._judge_start(model)
        growth, save_now = LossGrowth(), False
        for epoch in range(self.position.epoch, self.options.num_epochs):
            if self.position.step >= self.total_steps or self._out_of_patience():
                break
            with self._loader(self.train_set, self._epoch_keys(epoch)) as loader:
                for group in loader.groups(self.options.gradient_accumulation_steps):
                    result, save_now = self._step(model, loader, group)
                    self.position = Position(self.position.step + 1, epoch, self.position.batch + 1)
                    self.log.step(self.position.step, epoch, result)
                    growth.check(self.position.step, result, group)
                    ends = self.position.step >= self.total_steps or self.position.batch == self.steps_per_epoch
                    if save_now and not ends:
                        self._save(None)
                    if self.position.step >= self.total_steps:
                        break
            self._end_epoch(model, epoch, save_now)
        for note in self.skipped.notes():
            self.log.say(f"note: {note}")
        self.log.close()

    def _judge_start(self, model: torch.nn.Module) -> None:
        """Validate and save what training starts from: `best` is the start as long as nothing is better."""
        start = self._validate(model, "before training")
        if self._judge(start):
            self._save(start, is_best=True)

    def _end_epoch(self, model: torch.nn.Module, epoch: int, save_now: bool) -> None:
        """Validate and save where it is due; the best one so far always is. save_now: `--save_every` wants it."""
        options = self.options
        self.position = Position(self.position.step, epoch + 1, 0)
        last = epoch + 1 == options.num_epochs or self.position.step >= self.total_steps
        checked = None
        if last or (epoch + 1) % options.eval_freq == 0:
            checked = self._validate(model, f"epoch {epoch + 1}")
        is_best = self._judge(checked)
        if last or save_now or is_best or (epoch + 1) % options.save_freq == 0 or self._out_of_patience():
            self._save(checked, is_best)
        if self._out_of_patience() and not last:
            self.log.say(f"stopping: no better τ for {options.patience} validations")

    def _out_of_patience(self) -> bool:
        return bool(self.options.patience) and self._validations_without_gain >= self.options.patience

    def _epoch_keys(self, epoch: int) -> list[Key]:
        """This process's micro-batches of every global batch left in the epoch."""
        options = self.options
        batches = epoch_batches(self.train_set.lengths, self.global_size, options.seed, epoch)
        pieces = [
            (piece, indices)
            for indices in batches[self.position.batch :]
            for piece in micro_batches(
                indices, options.bs, self.accelerator.process_index, self.processes, options.gradient_accumulation_steps
            )
        ]
        # A process without records still takes part, with one that counts for nothing.
        return [
            Key(epoch, tuple(map(int, piece if len(piece) else indices[:1])), not len(piece))
            for piece, indices in pieces
        ]

    def _validation_keys(self) -> list[Key]:
        """This process's micro-batches of the validation records."""
        order = validation_order(self.validation_set.lengths, self.options.bs)
        keys = [Key(0, tuple(map(int, indices))) for indices in order]
        # As many for every process, whose forward passes wait for each other; what fills up counts for nothing.
        keys += [Key(0, keys[-1].indices[-1:], is_empty=True)] * (-len(keys) % self.processes)
        return keys[self.accelerator.process_index :: self.processes]

    def _loader(self, data: FeatureDataset, keys: Sequence[Key]) -> Loader:
        where = self.accelerator.device
        return Loader(data, keys, where, self.dtype, self.options.loader_threads(where.type))

    def _step(self, model: torch.nn.Module, loader: Loader, group: list[StoredBatch]) -> tuple[StepResult, bool]:
        """One optimizer step over this process's micro-batches: the gradient of the whole global batch.

        Also whether it is time to save, which the main process decides for all.
        """
        accelerator, options = self.accelerator, self.options
        # Positions that count, per unrolled step, over all micro-batches and processes.
        valid = [chain_supervision(batch.supervised, options.ttt_steps).flatten(1).sum(1) for batch in group]
        counts = accelerator.reduce(torch.stack(valid).sum(0).to(accelerator.device, torch.float32))
        sums = torch.zeros(4, device=accelerator.device)
        for number, batch in enumerate(loader.on_device(group), 1):
            with no_sync(accelerator, model) if number < len(group) else torch.enable_grad():
                found = self._losses(model, batch, counts)
                feature_loss, token_loss = self.objective.means(found, counts)
                loss = self.objective.total(feature_loss, token_loss)
                # DDP averages over processes; the sum over the global batch is wanted.
                accelerator.backward(loss * self.processes)
            first = found.token[0] / counts[0].clamp_min(1)
            parts = (feature_loss, token_loss, first, found.agrees[0].sum())
            sums += torch.stack([part.detach().float() for part in parts])
        save_now = accelerator.is_main_process and self._save_is_due()
        flag = torch.tensor([float(save_now)], device=accelerator.device)
        norm = clip(accelerator, model, self.optimizer, options.grad_clip or math.inf)
        said = torch.cat([sums, flag, norm.to(accelerator.device, torch.float32).reshape(1)])
        feature_loss, token_loss, first_loss, correct, save, norms = accelerator.reduce(said).tolist()
        lr = float(self.scheduler.get_last_lr()[0])
        # Gradients that overflow in float16 are its scaler's business.
        judged = feature_loss + token_loss + (norms if accelerator.scaler is None else 0)
        check_finite(judged, self.position.step + 1, group, lr)
        self.optimizer.step()
        self.skipped.check(self.position.step + 1, self.optimizer.step_was_skipped)
        update(self.optimizer, self.position.step + 1, options.ema)
        self.scheduler.step()
        self.optimizer.zero_grad()
        result = StepResult(
            loss=self.objective.total(feature_loss, token_loss),
            feature_loss=feature_loss,
            token_loss=token_loss,
            token_loss_step_1=first_loss,
            accuracy=correct / max(float(counts[0]), 1.0),
            supervised_tokens=int(counts[0]),
            lr=lr,
        )
        return result, bool(save)

    def _losses(self, model: torch.nn.Module, batch: Batch, counts: torch.Tensor) -> LossSums:
        """Sums over a micro-batch. counts: ``[S]``, the positions of every step in the global batch."""
        with self.accelerator.autocast():
            states = model(batch.tokens, batch.features, self.options.ttt_steps)
        valid = chain_supervision(batch.supervised, self.options.ttt_steps)
        return self.objective.sums(batch.at_places(states), batch.targets, batch.at_places(valid), counts)

    def _save_is_due(self) -> bool:
        every = self.options.save_interval()
        if every is None:
            return False
        steps, seconds = every
        if steps:
            return (self.position.step + 1) % steps == 0
        return time.monotonic() - self._last_save >= seconds

    def _validate(self, model: torch.nn.Module, when: str) -> Validation | None:
        if not len(self.validation_set):
            return None
        keys = self._validation_keys()
        started = time.monotonic()
        with self._loader(self.validation_set, keys) as loader:
            batches = (batch for group in loader.groups(1) for batch in loader.on_device(group))

            def to_blame(number: int) -> Sequence[int]:
                batch = loader.load(keys[number])
                return batch.not_finite() or batch.conversations

            with averaged(self.optimizer, model):
                result = validate(self.accelerator, model, self.objective, batches, to_blame)
        if not result.positions:  # then τ would be that of no draft at all
            self.log.say(f"{when:>15}: none of the validation records has a supervised position; no τ")
            return None
        self.log.validation(self.position.step, self.position.epoch, when, result, time.monotonic() - started)
        return result

    def _judge(self, result: Validation | None) -> bool:
        """Take a validation into account, for `best` and for `--patience`. Whether it is the best one so far."""
        if result is None:
            return False
        is_best = result.tau[-1] > self.best_tau
        self.best_tau = max(self.best_tau, result.tau[-1])
        self._validations_without_gain = 0 if is_best else self._validations_without_gain + 1
        return is_best

    def _save(self, result: Validation | None, is_best: bool = False) -> None:
        # Where nothing was judged, as without validation records, the newest is taken for the best.
        is_best = is_best or not self.best_tau
        with averaged(self.optimizer):
            self._write(result, is_best)
        self._last_save = time.monotonic()
        self.accelerator.wait_for_everyone()

    def _write(self, result: Validation | None, is_best: bool) -> None:
        writes = self.accelerator.is_main_process
        weights, optimizer = whole_draft(self.draft, writes), whole_optimizer(self.optimizer, writes)
        if writes:
            scaler = self.accelerator.scaler
            resume = {
                "optimizer": optimizer,
                "scheduler": self.scheduler.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "best_tau": self.best_tau,
                "validations_without_gain": self._validations_without_gain,
                "is_best": is_best,
                "seconds": self.log.seconds,
            }
            cpdir, metrics = self.options.run_folder, result.metrics() if result else {}
            folder = checkpoint.save(cpdir, self.draft, resume, self.position, self.run, metrics, weights)
            if is_best:
                checkpoint.point(cpdir, checkpoint.BEST, folder.name)
            checkpoint.prune(cpdir, self.options.keep)
            draw_run(cpdir)
