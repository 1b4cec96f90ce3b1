"""``python -m eagle.train.main --dry_run``: the memory plan of a run, printed; nothing is loaded, nothing written."""

from __future__ import annotations

import dataclasses
import functools
import sys
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from accelerate import Accelerator

from eagle import device
from eagle.drafts.coverage import Coverage, coverage
from eagle.drafts.layers import RotaryEmbedding
from eagle.drafts.memory import Setting
from eagle.dtypes import parse_dtype
from eagle.errors import RequestError
from eagle.files import existing_path
from eagle.store.reader import FeatureStore
from eagle.target.check import check_config, check_target
from eagle.target.config import ModelConfig, load_config
from eagle.target.quantization import Use
from eagle.target.trunk import trunk_values
from eagle.target.weights import first_weight_file
from eagle.text import visible
from eagle.train.draft_choice import draft_config, warn_of_coverage
from eagle.train.engine import check_engine, describe_engine
from eagle.train.loader import AHEAD
from eagle.train.memory_plan import CONTEXT_BYTES, MemoryPlan, make_plan
from eagle.train.options import TrainOptions
from eagle.train.sharding import is_sharded

MIB = 1 << 20
#: Of a base model that is known by its draft's config alone, which does not say: as many as any choice of them needs.
MANY_LAYERS = 1000


def dry_run(options: TrainOptions, accelerator: Accelerator) -> int:
    """Print the plan of this process (all are alike). Raises: FileNotFoundError, RequestError."""
    missing = options.tmpdir if options.tmpdir and not options.tmpdir.exists() else None
    if missing:
        options = dataclasses.replace(options, tmpdir=None)
    setting = setting_of(options, accelerator)
    engine = engine_lines(options, accelerator)
    plan = make_plan(setting, options.family)
    if accelerator.is_main_process:
        if missing:
            print(f"note: --tmpdir {missing} is not there yet; this is the plan for a store of the base model's dtype")
        print("\n".join([*lines(plan, options, accelerator), *engine, *start_lines(setting, options, accelerator)]))
        if covered := planned_coverage(setting, options):
            print(covered.describe())
            warn_of_coverage(covered, options)
    return 0


def engine_lines(options: TrainOptions, accelerator: Accelerator) -> list[str]:
    """The engine of ``--feature_source``, which is looked at and not started. Raises: RequestError."""
    if not options.is_engine:
        return []
    version = check_engine(options, planned_target(options), accelerator.device)
    said = describe_engine(options, version)
    return [f"{said}; what these take of memory is beside the plan (allocation.py --dry_run says how much)"]


def planned_coverage(setting: Setting, options: TrainOptions) -> Coverage | None:
    """Of a new draft over the records of ``--tmpdir``; None without these, and where a draft has no own vocabulary.

    Nor of one that goes on from another draft, of which nothing is read here but its config.
    """
    tmpdir, vocabulary = options.tmpdir, setting.config.vocab_size
    if tmpdir is None or options.init not in options.family.starts:
        return None

    @functools.cache
    def counts() -> np.ndarray:  # of a store that is opened for a draft that asks
        return FeatureStore(tmpdir, skip_damaged=options.skip_damaged).token_counts(vocabulary, options.max_len)

    ids = options.family.chosen(setting.config, counts)
    return None if ids is None else coverage(counts(), ids)


def setting_of(options: TrainOptions, accelerator: Accelerator) -> Setting:
    """What the run that was asked for would be."""
    target, family = planned_target(options), options.family
    kind = accelerator.device.type
    store = _store(options, target)
    compute = device.compute_dtype(accelerator.mixed_precision).itemsize
    fused, fused_masked = (attention_is_fused(accelerator.device, compute, masked) for masked in (False, True))
    trunk = 0
    if options.data_path and options.basepath and not options.is_engine:
        trunk = trunk_values(target) * parse_dtype(options.dtype).itemsize
    path = options.configpath
    if path and options.basepath is None and load_config(path, use=Use.SERVED).num_hidden_layers != 1:
        options = dataclasses.replace(options, configpath=None)  # it is the base model's
    draft = draft_config(options, target, store.widths)
    return Setting(
        config=draft,
        widths=family.features(draft),
        reads=family.reads(draft),
        bs=options.bs,
        max_len=options.max_len,
        kind=kind,
        ttt_steps=options.ttt_steps,
        accumulation=options.gradient_accumulation_steps,
        token_loss=options.token_loss,
        init=options.init,
        init_positions=options.init_positions if store.tokens is None else min(options.init_positions, store.tokens),
        validates=options.val_ratio > 0,
        base_dtype=store.value,
        stored=store.stored,
        compute=compute,
        runtime=runtime_bytes(target, kind),
        processes=accelerator.num_processes,
        sharded=is_sharded(),
        fused=fused,
        fused_masked=fused_masked,
        store=store.files if kind == "cpu" else 0,
        trunk=trunk,
        prefetched=AHEAD * options.loader_threads(kind),
        frozen_head=options.freeze_head,
        averages=options.ema > 0,
    )


def planned_target(options: TrainOptions) -> ModelConfig:
    """The base model's config, or with ``--configpath`` alone the draft's, which has its sizes.

    Raises: FileNotFoundError, RequestError.
    """
    if options.basepath is not None:
        existing_path(options.basepath, "--basepath", "folder")
        if first_weight_file(options.basepath):
            return check_target(options.basepath, "--basepath", use=options.use).config
        return check_config(options.basepath, "--basepath", options.use)
    if options.configpath is None:
        raise RequestError(
            "--dry_run without --basepath or --configpath: expected one of them, for the shapes. --basepath may be a "
            "folder that holds nothing but config.json; --configpath one of configs/."
        )
    return dataclasses.replace(load_config(options.configpath, use=Use.SERVED), num_hidden_layers=MANY_LAYERS)


@dataclass(frozen=True, slots=True)
class StoreSizes:
    """files: bytes of the store's files. value: bytes of a value as it is read; stored: as it lies there, where that
    differs. widths: of the features, by name. tokens: within ``--max_len``; None where it is not known how many there
    will be.
    """

    files: int
    value: int
    widths: dict[str, int]
    stored: int | None = None
    tokens: int | None = None


def _store(options: TrainOptions, target: ModelConfig) -> StoreSizes:
    """Of a store; without one, by the base model's dtype. Of a damaged file only what is in its head is found here."""
    tmpdir, max_len = options.tmpdir, options.max_len
    if tmpdir is None:
        named = {"float32": 4, "float16": 2, "bfloat16": 2}
        return StoreSizes(0, named.get((target.dtype or "bfloat16").removeprefix("torch."), 2), {})
    store = FeatureStore(tmpdir, skip_damaged=options.skip_damaged)
    for message in store.damage.messages:
        print(visible(f"warning: left out: {message}"), file=sys.stderr)
    if store.hidden_size != target.hidden_size:
        raise RequestError(
            f"--tmpdir {tmpdir} holds features of size {store.hidden_size}, but the base model has hidden_size "
            f"{target.hidden_size}. They are of different models."
        )
    files = {source.path for source in store.sources}
    size = sum(file.stat().st_size for path in files for file in ([path] if path.is_file() else path.iterdir()))
    one_byte = any(source.stored_code != source.dtype_code for source in store.sources)
    tokens = int(np.minimum(store.lengths, max_len).sum())
    return StoreSizes(size, store[0].hidden_state.element_size(), store.widths, 1 if one_byte else None, tokens)


def runtime_bytes(config: ModelConfig, kind: str) -> int:
    """What a process holds before it loads anything: measured here on a CPU, by importing what training imports."""
    if kind != "cpu":
        return CONTEXT_BYTES
    RotaryEmbedding(config.draft())
    # Optimizers import torch's compiler when the first one is made.
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    return psutil.Process().memory_info().rss


def attention_is_fused(where: torch.device, compute: int, masked: bool) -> bool:
    """Whether this torch has a kernel here that keeps no scores; asked with tensors of a few values.

    An NPU's own kernels are taken to be fused.
    """
    choice = getattr(torch, "_fused_sdp_choice", None)
    if choice is None or where.type == "npu":
        return where.type != "cpu"
    dtype = torch.float32 if compute == 4 else torch.bfloat16
    query = torch.zeros(1, 2, 16, 64, dtype=dtype, device=where, requires_grad=True)
    mask = torch.ones(16, 16, dtype=torch.bool, device=where) if masked else None
    return choice(query, query, query, mask, 0.0, not masked) != 0  # 0 is the one that multiplies out


def lines(plan: MemoryPlan, options: TrainOptions, accelerator: Accelerator) -> list[str]:
    """The plan as a table in MiB, and what it means."""
    place = accelerator.device
    shared = " sharing weights, gradients and optimizer state (FSDP)" if is_sharded() else ""
    head = (
        f"memory plan of {'a' if accelerator.num_processes > 1 else 'the'} process, in MiB: "
        f"{options.bs} x {options.max_len} tokens, {options.ttt_steps} draft step(s), {accelerator.num_processes} "
        f"process(es){shared}, mixed precision {accelerator.mixed_precision}, on {device.describe(place)}"
    )
    found = [head, "", "throughout"]
    found += [_line(name, size) for name, size in plan.held.items()]
    for phase in plan.phases:
        found += ["", f"{phase.name}: {plan.total(phase) / MIB:,.0f} in all"]
        found += [_line(name, size) for name, size in phase.items.items()]
    found += ["", f"peak {plan.peak / MIB:,.0f} MiB, in {plan.fullest.name}"]
    if plan.store:
        found.append(
            f"the store's pages may show as {plan.store / MIB:,.0f} MiB more; the system takes them back when it needs "
            "the room"
        )
    for name, size in plan.host.items():
        each = " in each process" if accelerator.num_processes > 1 else ""
        found.append(f"host memory, beside the card's: {size / MIB:,.0f} MiB{each}, {name}")
    free = device.free_memory(place)
    share = free // accelerator.num_processes if place.type == "cpu" else free
    each = f", {share / MIB:,.0f} for each of the processes" if share != free else ""
    verdict = "it fits" if plan.peak <= share else "it does NOT fit; lower --bs, --max_len or --ttt_steps"
    found.append(f"free on this {place.type}: {free / MIB:,.0f} MiB{each}: {verdict}")
    return found


def start_lines(setting: Setting, options: TrainOptions, accelerator: Accelerator) -> list[str]:
    """How long the start will take here."""
    parts = options.family.start_seconds(setting, accelerator.device)
    if not parts:
        return []
    each = ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in parts.items())
    return [
        f"{options.init.replace('_', '-')} start: about {_seconds(sum(parts.values()))} besides reading at most "
        f"{setting.init_positions:,} positions ({each})"
    ]


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:,.0f} s"


def _line(name: str, size: int) -> str:
    return f"  {name:<46} {size / MIB:>10,.1f}"
