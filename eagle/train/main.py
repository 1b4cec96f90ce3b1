"""Step 4: train the draft on a store of features.

    accelerate launch -m --mixed_precision=bf16 eagle.train.main --tmpdir ./features --cpdir ./checkpoints \\
        --configpath configs/llama_2_chat_7B_config.json --basepath ./llama-2-7b-chat --bs 4

Also ``python -m eagle.train.main ...``, and for several processes on a CPU
``torchrun --standalone --nproc_per_node 2 -m eagle.train.main ...``. Writes ``CPDIR/state_<step>/`` with ``best`` and
``last`` pointing at one of them; the same command continues an interrupted run. Exit codes: 0 done, 1 the work failed,
2 the request is wrong.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed

from eagle import device
from eagle.data.mixture import spelled
from eagle.drafts.coverage import coverage
from eagle.drafts.families import DEFAULT_DRAFT
from eagle.drafts.saved import warm_start
from eagle.entry import run
from eagle.errors import RequestError, WorkError
from eagle.files import existing_path, locked, output_folder, write_json
from eagle.generate.engine_check import shaping
from eagle.generate.sources import DEFAULT_SOURCE
from eagle.provenance import provenance
from eagle.store.reader import FeatureStore
from eagle.target.check import check_target
from eagle.target.identity import Identity
from eagle.target.weights import read_embedding, read_head, read_norm
from eagle.train import checkpoint
from eagle.train.accelerator import end_training, make_accelerator
from eagle.train.agreement import describe
from eagle.train.arguments import read_options
from eagle.train.dataset import FeatureDataset, RecordStore, keep_apart, split_store, usable_records
from eagle.train.draft_choice import draft_config, warn_of_coverage
from eagle.train.dry_run import dry_run
from eagle.train.engine import check_engine, describe_engine, log_of, shared_engine
from eagle.train.group import Group, meet
from eagle.train.launch_check import launch_notes
from eagle.train.live_features import LiveFeatures, LiveSource
from eagle.train.loop import Trainer
from eagle.train.options import FREE_ON_RESUME, TrainOptions, rate_as_in
from eagle.train.validation import DEPTH
from eagle.train.whole_store import whole_store

RUN = "train_options.json"
#: What a run says of the training records that it leaves out because they are validated on; nothing where none are.
TWINS = "twins_left_out"


def check_cpdir(options: TrainOptions) -> None:
    """Raises: RequestError where the folder holds something that is no training run."""
    cpdir = options.run_folder
    if cpdir.exists() and not cpdir.is_dir():
        raise RequestError(f"--cpdir {cpdir} is a file; expected a folder for checkpoints.")
    # A run killed in its first moments leaves hidden files only.
    found = sorted(p.name for p in cpdir.iterdir() if not p.name.startswith("."))[:3] if cpdir.is_dir() else []
    if found and not (cpdir / RUN).is_file():
        raise RequestError(
            f"--cpdir {cpdir} is not empty ({', '.join(found)}, ...) and holds no training run. Name a new folder."
        )


def live_features(options: TrainOptions, accelerator: Accelerator, widths: dict[str, int]) -> LiveFeatures:
    """The base model, which computes features of these widths as training goes."""
    assert options.data_path
    source = LiveSource(
        options.data_path,
        options.end_num,
        options.data_seed,
        options.max_len,
        options.chat_template,
        options.allow_truncated,
        options.dtype,
        options.chat_template_kwargs,
        options.feature_source,
    )
    return LiveFeatures(source, options.base, accelerator.device, widths, accelerator.num_processes)


def open_store(options: TrainOptions, accelerator: Accelerator, identity: Identity) -> FeatureStore:
    """The store of features, made of this base model."""
    assert options.tmpdir
    folder = options.tmpdir
    store = whole_store(folder, "--tmpdir", accelerator) if options.skip_damaged else FeatureStore(folder)
    store.check_target(identity.current, options.base, identity.as_in)
    return store


def build(options: TrainOptions, accelerator: Accelerator, saved: checkpoint.Saved | None) -> Trainer:
    """Everything the request names, loaded and checked against each other. saved: what the run goes on from.

    Raises: FileNotFoundError, RequestError.
    """
    existing_path(options.base, "--basepath", "folder")
    checked = check_target(options.base, "--basepath", use=options.use)
    target, weights, identity = checked.config, checked.weights, checked.identity
    family = options.family
    engine = check_engine(options, target, accelerator.device) if options.is_engine else None
    held = open_store(options, accelerator, identity) if options.tmpdir else None
    config = draft_config(options, target, held.widths if held else {})
    if saved:
        checkpoint.check_same_network(saved[0], config, family)
    store: RecordStore = held or live_features(options, accelerator, family.features(config))
    where = f"--tmpdir {options.tmpdir}"
    if options.data_path:
        where = f"--data_path {spelled(options.data_path)}"
    usable, notes = usable_records(store, options.max_len, where)
    train, held_out = split_store(store, options.val_ratio, options.seed, usable)
    if not len(train):
        raise RequestError(
            f"{where} holds {len(usable):,} records with something to learn from, and --val_ratio {options.val_ratio} "
            "leaves none to train on. Lower --val_ratio, or take more conversations."
        )
    before = saved[1].get("run", {}) if saved else None
    # A run that an earlier version began has trained on them, and its batches are of all these records.
    apart, more = keep_apart(store, train, held_out, options.max_len, leave_out=before is None or TWINS in before)
    notes += more

    # With mixed precision the frozen matrices take its dtype; without, everything is float32.
    compute = device.compute_dtype(accelerator.mixed_precision)
    draft = family.build(config, read_embedding(weights, target).to(compute)).to(accelerator.device)
    if target.shares_head:
        head = draft.embed_tokens.weight.detach()
    else:
        head = read_head(weights, target).to(accelerator.device, compute)

    if options.freeze_head:
        draft.freeze_head()

    @functools.cache
    def counts() -> np.ndarray:
        return store.token_counts(target.vocab_size, options.max_len)

    if not saved and options.init in family.starts:
        family.prepare(draft, head, read_norm(weights, target), counts)
    elif not saved:
        for note in warm_start(draft, Path(options.init), "--init", family, target, lambda: head):
            if accelerator.is_main_process:
                print(f"note: {note}")
    if not saved and draft.ids is not None:
        covered = coverage(counts(), draft.ids.cpu().numpy())
        notes.append(covered.describe())
        if accelerator.is_main_process:
            warn_of_coverage(covered, options)
    if held and not held.names_target:
        notes.append(
            f"nothing in {where} says which model its features are of, so that they could not be compared with "
            f"--basepath {options.base}"
        )
    if engine:
        notes.append(describe_engine(options, engine))
    if options.max_len == target.window:
        notes.append(f"records are cut to {target.window} tokens: the base model, and so its draft, attends to no more")

    settings = {k: v for k, v in options.to_json().items() if k not in FREE_ON_RESUME}
    settings["lr"] = rate_as_in(before, options.learning_rate(config.hidden_size), config.hidden_size)
    run_identity = {
        # A run that version 0.1 began goes on under the name it gave the target.
        "target": identity.as_in(before.get("target") if before else None),
        "records": len(store),
        "tokens": store.tokens,
        "features": store.identity(),
        "conversations": store.records_digest(),
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        **settings,
        **config.extra,
    }
    if len(apart) < len(train):
        run_identity[TWINS] = len(train) - len(apart)
    if chosen := shaping(options.engine_args or {}):
        run_identity["engine_args"] = chosen
    if options.draft == DEFAULT_DRAFT:  # as in checkpoints of versions that knew no other
        del run_identity["draft"]
    # And did not say which conversations they were of.
    if before is not None and "conversations" not in before:
        del run_identity["conversations"]
    # And no other weights, and no engine.
    only_ones = {"ttt_decay": 1.0, "freeze_head": False, "ema": 0.0, "feature_source": DEFAULT_SOURCE}
    for name, only in only_ones.items():
        if run_identity[name] == only:
            del run_identity[name]
    data_set = functools.partial(
        FeatureDataset, store, max_len=options.max_len, reads=draft.reads, vocab_size=target.vocab_size
    )
    return Trainer(
        options,
        accelerator,
        draft,
        family.objective(draft, head, options.losses()),
        compute,
        data_set(apart, noise=options.noise, seed=options.seed),
        data_set(held_out),
        run_identity,
        notes,
    )


def main(argv: list[str] | None = None) -> int:
    with meet() as group, room_named():
        return run_training(group.ready(lambda: read_options(argv)), group)


@contextmanager
def room_named() -> Iterator[None]:
    """Raises: WorkError with what to do about it in place of a card's own words that its memory is full."""
    try:
        yield
    except WorkError:  # it says by itself what was too small, and of which process
        raise
    except RuntimeError as error:
        if not device.is_out_of_memory(error):
            raise
        raise WorkError(
            f"The card has too little memory for this run: {str(error).splitlines()[0]} Lower --bs and raise "
            "--gradient_accumulation_steps by as much, which is the same run; or lower --max_len, which is another and "
            "wants a new --cpdir; or share the draft among several cards (configs/fsdp.yaml). The same command with "
            "--dry_run says what it takes."
        ) from error


def run_training(options: TrainOptions, group: Group | None = None) -> int:
    """Train as asked for, to the end. group: the processes that do (default: this one alone).

    Raises: FileNotFoundError, RequestError, WorkError.
    """
    group = group or Group()
    if options.dry_run:
        return group.ready(lambda: plan_training(options))
    accelerator, trainer, saved = group.ready(lambda: open_training(options))
    trainer.notes = [*trainer.notes, *group.compare(lambda: describe(trainer, saved[1] if saved else None))]
    with ExitStack() as held:
        group.ready(lambda: held.enter_context(claimed(trainer, saved)))
        if accelerator.is_main_process:
            write_json(options.run_folder / RUN, {"options": options.to_json(), "made_by": provenance()})
        live = trainer.train_set.store
        if options.is_engine and isinstance(live, LiveFeatures):
            trainer.log.say(f"starting {options.feature_source}; what it says is in {log_of(options, 0)}")
            live.source = held.enter_context(shared_engine(options, accelerator, live, group))
            trainer.log.restart()
        return train(options, accelerator, trainer, saved)


def plan_training(options: TrainOptions) -> int:
    if options.tmpdir and options.tmpdir.exists():  # a plan needs none
        existing_path(options.tmpdir, "--tmpdir", "folder")
    return dry_run(options, make_accelerator(dataclasses.replace(options, report_to="none")))


def open_training(options: TrainOptions) -> tuple[Accelerator, Trainer, checkpoint.Saved | None]:
    """What the request names, opened; nothing is written."""
    if options.tmpdir:
        existing_path(options.tmpdir, "--tmpdir", "folder")
    check_cpdir(options)
    accelerator = make_accelerator(options)
    set_seed(options.seed)
    saved = checkpoint.load_last(options.run_folder)
    return accelerator, build(options, accelerator, saved), saved


@contextmanager
def claimed(trainer: Trainer, saved: checkpoint.Saved | None) -> Iterator[None]:
    """The folder for checkpoints, there and this run's alone."""
    cpdir = trainer.options.run_folder
    output_folder(cpdir, "--cpdir")
    with locked(cpdir, "--cpdir") if trainer.accelerator.is_main_process else nullcontext():
        if checkpoint.states(cpdir)[-1:] != ([saved[0]] if saved else []):
            raise RequestError(f"--cpdir {cpdir} was written to by another job meanwhile. See that it has ended.")
        if saved:
            checkpoint.check_same_run(cpdir, saved[1]["run"], trainer.run)
        yield


def train(options: TrainOptions, accelerator: Accelerator, trainer: Trainer, saved: checkpoint.Saved | None) -> int:
    """Start or continue the run, and train it to its end."""
    if options.report_to != "none":  # only now: a tracker writes to the folder, which a refused run must not
        settings = {k: v for k, v in options.to_json().items() if isinstance(v, (int, float, str, bool))}
        accelerator.init_trackers("eagle", config=settings)
    size = sum(weight.numel() for weight in trainer.draft.trained_state().values())
    trainer.log.say(
        f"{len(trainer.train_set):,} training and {len(trainer.validation_set):,} validation records; a draft of "
        f"{size / 1e6:.1f} M weights; {trainer.total_steps:,} steps of "
        f"{trainer.global_size} sequences on {accelerator.num_processes} x {accelerator.device.type}, "
        f"mixed precision {accelerator.mixed_precision}, lr {trainer.scheduler.base_lrs[0]:.2e}"
    )
    for note in [*launch_notes(accelerator.device.type), *trainer.train_set.store.notes(), *trainer.notes]:
        trainer.log.say(f"note: {note}")
    if saved:
        trainer.resume(*saved)
    elif options.init in options.family.starts:
        trainer.initialise(options.family.starts[options.init])
    trainer.fit()
    best = checkpoint.resolve_pointer(options.run_folder / checkpoint.BEST)
    summary = f", τ {trainer.best_tau:.3f} at K = {DEPTH}" if trainer.best_tau else ""
    trainer.log.say(f"done: {options.run_folder / checkpoint.BEST} is {best.name}{summary}")
    if best.name == checkpoint.START:
        trainer.log.say(
            "note: no validation of the trained draft was better than its start, which is the best; a lower --lr, or "
            "more conversations, may help"
        )
    accelerator.wait_for_everyone()
    end_training(accelerator)
    return 0


def leave(code: int) -> None:
    """End this process. A backend's threads outlive their group: they can abort a process that is done, or hold it."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        with suppress(OSError):  # nobody may read it any more
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run_and_leave() -> None:
    """The whole process, however it ends."""
    try:
        code = run(main)
    except SystemExit as error:  # argparse's
        code = error.code if isinstance(error.code, int) else bool(error.code)
    except BaseException:  # a bug of ours, or of what we use
        traceback.print_exc()
        code = 1
    leave(code)


if __name__ == "__main__":
    run_and_leave()
