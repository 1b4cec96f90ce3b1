"""The options of a training run, resolved and checked once."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eagle.data.mixture import DataPath, read_weights
from eagle.device import Card
from eagle.drafts.choices import DraftChoices
from eagle.drafts.families import DEFAULT_DRAFT, DRAFT_FAMILIES
from eagle.drafts.interface import DraftFamily
from eagle.drafts.losses import TOKEN_LOSSES
from eagle.drafts.objective import LossOptions
from eagle.dtypes import parse_dtype
from eagle.errors import RequestError
from eagle.generate.engine_check import check_engine_args
from eagle.generate.source_options import EngineOptions
from eagle.generate.sources import DEFAULT_SOURCE, ENGINES, FEATURE_SOURCES
from eagle.seeds import check_seed
from eagle.target.quantization import Use
from eagle.train.checkpoint import states

#: What ``--init`` takes beside a folder, whatever the draft family.
INITS = tuple(dict.fromkeys(name for family in DRAFT_FAMILIES.values() for name in family.starts))
TRACKERS = ("none", "tensorboard", "wandb", "swanlab")

#: Named sets of defaults; a flag given beside ``--recipe`` wins over it.
RECIPES = {name: recipe for family in DRAFT_FAMILIES.values() for name, recipe in family.recipes.items()}

#: A family's learning rate belongs to this width. Larger drafts need less,
#: in inverse proportion to their width.
REFERENCE_WIDTH = 576


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """What `eagle.train.main` was asked for. Sizes are per process unless they say otherwise."""

    cpdir: Path | None
    basepath: Path | None
    tmpdir: Path | None = None
    data_path: DataPath | None = None
    end_num: int | None = None
    data_seed: int = 42
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    allow_truncated: bool = False
    dtype: str = "bfloat16"
    feature_source: str = DEFAULT_SOURCE
    engine_python: Path | None = None
    engine_cards: tuple[Card, ...] | None = None
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int = 1
    engine_args: dict[str, Any] | None = None
    configpath: Path | None = None
    draft: str = DEFAULT_DRAFT
    aux_layers: tuple[int, ...] | None = None
    draft_vocab_size: int | None = None
    freeze_head: bool = False
    bs: int = 4
    gradient_accumulation_steps: int = 1
    num_epochs: int = 5
    max_steps: int | None = None
    ttt_steps: int = 1
    ttt_decay: float = 1.0
    token_loss: str = "soft_cross_entropy"
    max_len: int = 2048
    lr: float | None = None
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    ema: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 0.5
    vloss_weight: float = 1.0
    ploss_weight: float = 1.0
    noise: float = 0.1
    init: str = "closed_form"
    init_positions: int = 1_000_000
    val_ratio: float = 0.05
    eval_freq: int = 1
    save_freq: int = 1
    save_every: str | None = None
    patience: int = 0
    report_to: str = "none"
    keep: int = 3
    num_workers: int | None = None
    seed: int = 42
    skip_damaged: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        for name in (
            "bs", "gradient_accumulation_steps", "num_epochs", "eval_freq", "save_freq", "keep", "init_positions",
            "ttt_steps",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise RequestError(f"--{name} {getattr(self, name)}: expected 1 or more.")
        # A dry run plans from shapes; it needs no records.
        if (self.tmpdir is None) == (self.data_path is None) and (self.tmpdir or not self.dry_run):
            raise RequestError(
                "--tmpdir and --data_path: expected one of them, the store of step 3 or, to train without one, the "
                "conversations themselves."
            )
        if self.end_num is not None and self.end_num < 1:
            raise RequestError(f"--end_num {self.end_num}: expected how many conversations to use, 1 or more.")
        if self.num_workers is not None and self.num_workers < 0:
            raise RequestError(f"--num_workers {self.num_workers}: expected 0 or more.")
        if self.data_path and self.num_workers and not self.is_engine:
            raise RequestError(
                f"--num_workers {self.num_workers}: with --data_path the base model computes the features in the "
                "training process; leave --num_workers at 0."
            )
        if self.data_path:
            read_weights(self.data_path)
        parse_dtype(self.dtype)
        if self.feature_source not in FEATURE_SOURCES:
            raise RequestError(f"--feature_source {self.feature_source}: expected one of {', '.join(FEATURE_SOURCES)}.")
        if self.is_engine:
            self._check_engine()
        if self.max_steps is not None and self.max_steps < 1:
            raise RequestError(f"--max_steps {self.max_steps}: expected 1 or more.")
        if self.token_loss not in TOKEN_LOSSES:
            raise RequestError(f"--token_loss {self.token_loss}: expected one of {', '.join(TOKEN_LOSSES)}.")
        if self.report_to not in TRACKERS:
            raise RequestError(f"--report_to {self.report_to}: expected one of {', '.join(TRACKERS)}.")
        self.save_interval()
        for name, value in asdict(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise RequestError(f"--{name} {value}: expected a number.")
        check_seed(self.seed)
        check_seed(self.data_seed, "--data_seed")
        for name in ("weight_decay", "vloss_weight", "ploss_weight", "noise", "grad_clip", "patience"):
            if getattr(self, name) < 0:
                raise RequestError(f"--{name} {getattr(self, name)}: expected 0 or more.")
        for name in ("warmup_ratio", "val_ratio", "beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise RequestError(f"--{name} {getattr(self, name)}: expected a share from 0 to below 1.")
        if not 0 < self.ttt_decay <= 1:
            raise RequestError(f"--ttt_decay {self.ttt_decay}: expected more than 0, at most 1.")
        if self.lr is not None and self.lr <= 0:
            raise RequestError(f"--lr {self.lr}: expected more than 0.")
        if self.max_len < 3:
            raise RequestError(f"--max_len {self.max_len}: expected 3 tokens or more.")
        if self.vloss_weight == self.ploss_weight == 0:
            weights = ["vloss_weight", "ploss_weight"]
            named = " ".join(f"--{name} 0" for name in weights if name not in self.family.idle)
            raise RequestError(f"{named}: nothing would be trained; set one above 0.")
        is_there = self.init in self.family.starts or Path(self.init).exists()
        if not is_there and self.last_state is None:  # a run that goes on reads its own checkpoint only
            raise RequestError(
                f"--init {self.init}: expected {' or '.join(self.family.starts)}, or the folder of a draft to start "
                "from; there is no such folder."
            )

    def _check_engine(self) -> None:
        check_engine_args(self.engine.arguments)
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"--{name} {value}: expected how many, 1 or more.")
        if self.engine_cards and self.engine.cards != len(self.engine_cards):
            raise RequestError(
                f"--tensor_parallel_size {self.engine.tensor_parallel_size} x --pipeline_parallel_size "
                f"{self.engine.pipeline_parallel_size} take {self.engine.cards} cards, and --engine_cards "
                f"{','.join(map(str, self.engine_cards))} are {len(self.engine_cards)}. Name as many, or use other "
                "sizes."
            )

    @property
    def is_engine(self) -> bool:
        """Whether the features are computed as training goes, by an engine."""
        return self.data_path is not None and self.feature_source in ENGINES

    @property
    def use(self) -> Use:
        """What training does with the base model: a store, or an engine, has computed with it."""
        return Use.FEATURES if self.data_path is not None and not self.is_engine else Use.SERVED

    @property
    def engine(self) -> EngineOptions:
        """Of each machine: all its cards share every layer, where nothing else is said."""
        tensor = self.tensor_parallel_size or max(1, len(self.engine_cards or ()) // self.pipeline_parallel_size)
        return EngineOptions(tensor, self.pipeline_parallel_size, self.engine_args or {})

    @property
    def family(self) -> DraftFamily:
        return DRAFT_FAMILIES[self.draft]

    @property
    def choices(self) -> DraftChoices:
        return DraftChoices(self.aux_layers, self.draft_vocab_size)

    @property
    def run_folder(self) -> Path:
        """``--cpdir``, which only a dry run can do without."""
        assert self.cpdir is not None
        return self.cpdir

    @property
    def last_state(self) -> Path | None:
        """The checkpoint in ``--cpdir`` that the run goes on from; None where it begins."""
        found = states(self.cpdir) if self.cpdir else []
        return found[-1] if found else None

    @property
    def base(self) -> Path:
        """``--basepath``, which only a dry run can do without."""
        assert self.basepath is not None
        return self.basepath

    def loader_threads(self, kind: str) -> int:
        """Threads that read ahead for this kind of device: a card must not wait, a CPU has no cores to spare.

        The base model of ``--data_path`` is in the training process, but for an engine: that is not to wait either.
        """
        if self.num_workers is not None:
            return self.num_workers
        if self.is_engine:
            return 2
        return 0 if kind == "cpu" or self.data_path else 2

    def save_interval(self) -> tuple[int, float] | None:
        """``--save_every`` as (steps, seconds), one of them 0: '500' is steps, '30m' minutes.

        Raises: RequestError.
        """
        if self.save_every is None:
            return None
        number, minutes = self.save_every.removesuffix("m"), self.save_every.endswith("m")
        if not (number.isascii() and number.isdigit() and int(number)):
            raise RequestError(f"--save_every {self.save_every}: expected steps ('500') or minutes ('30m').")
        return (0, 60.0 * int(number)) if minutes else (int(number), 0.0)

    def learning_rate(self, hidden_size: int) -> float:
        """``--lr``, or its family's for a draft of that width."""
        return self.family.learning_rate * REFERENCE_WIDTH / hidden_size if self.lr is None else self.lr

    def losses(self) -> LossOptions:
        return LossOptions(self.token_loss, self.vloss_weight, self.ploss_weight, self.ttt_decay)

    def to_json(self) -> dict:
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


def rate_as_in(saved: dict[str, Any] | None, rate: float, hidden_size: int) -> float | None:
    """A run's learning rate as the run that it goes on from says it, if any: the two are compared.

    Version 0.1 said None where none was given, and meant 5e-4 at `REFERENCE_WIDTH`. To six digits, so that one that
    was computed is the same as one that was typed.
    """
    said_none = saved is not None and saved.get("lr") is None
    is_old_default = said_none and math.isclose(rate, 5e-4 * REFERENCE_WIDTH / hidden_size)
    return None if is_old_default else float(f"{rate:.6g}")


#: Options that may change when a run is resumed: they do not touch what is computed.
FREE_ON_RESUME = (
    "tmpdir",
    # Where the records come from is free, which they are is not: their number and tokens are compared.
    "data_path",
    "end_num",
    "data_seed",
    "chat_template",
    "chat_template_kwargs",  # they are compared with the features
    "allow_truncated",
    "dtype",
    "engine_python",
    "engine_cards",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "engine_args",
    "cpdir",
    "basepath",
    "configpath",
    # What they come to is said by the draft's config.
    "aux_layers",
    "draft_vocab_size",
    "skip_damaged",
    "num_workers",
    "keep",
    "save_freq",
    "save_every",
    "eval_freq",
    "report_to",
    "dry_run",
)


def idle_flags(options: TrainOptions) -> dict[str, str]:
    """Flags that do nothing beside these options, by name: why, and what to do instead."""
    idle: dict[str, str] = {}
    if options.data_path is None:
        leave = "Leave it out, or give it to allocation.py and make another store."
        idle |= {
            "end_num": f"it is for --data_path, and of a store (--tmpdir) every record is used. {leave}",
            "data_seed": f"it is for --data_path, and a store (--tmpdir) says which conversations it holds. {leave}",
            "chat_template": f"it is for --data_path, and a store (--tmpdir) holds tokens already. {leave}",
            "chat_template_kwargs": f"it is for --data_path, and a store (--tmpdir) holds tokens already. {leave}",
            "allow_truncated": "it is for --data_path, and a store (--tmpdir) says which records it holds. Leave it "
            "out; --skip_damaged goes on without what is damaged in a store.",
            "dtype": "it is for --data_path, and the features of a store (--tmpdir) were computed before. Leave it "
            "out; what training computes in is accelerate's --mixed_precision, in front of eagle.train.main.",
            "feature_source": "it is for --data_path, and the features of a store (--tmpdir) were computed before. "
            "Leave it out; allocation.py has it, too.",
        }
    else:
        idle["skip_damaged"] = "it is for a store (--tmpdir), and with --data_path there is none. Leave it out; "
        idle["skip_damaged"] += "--allow_truncated uses the whole records of a file cut short."
        if options.end_num is None and read_weights(options.data_path)[0].weight is None:
            idle["data_seed"] = "it chooses conversations for --end_num, and without it all are used. Add --end_num, "
            idle["data_seed"] += "or leave it out; --seed is that of split, order, noise and random initialisation."
    if not options.is_engine:
        why = "it is about an engine, and none is started. Leave it out, or add --data_path and --feature_source vllm."
        names = ("engine_python", "engine_cards", "tensor_parallel_size", "pipeline_parallel_size", "engine_args")
        idle |= dict.fromkeys(names, why)
    if options.ttt_steps == 1:
        idle["ttt_decay"] = (
            "it weighs draft steps against each other, and with --ttt_steps 1 there is one. Leave it out."
        )
    idle |= options.family.idle
    if options.init != "closed_form":
        idle["init_positions"] = f"it is for --init closed_form, and this is --init {options.init}. Leave one out."
    if not options.val_ratio:
        why = "with --val_ratio 0 there is no validation. Leave it out, or hold some conversations out."
        idle |= {"eval_freq": why} | ({"patience": why} if options.patience else {})
    if not options.ploss_weight:
        why = "with --ploss_weight 0 the token loss is not trained on"
        idle["token_loss"] = f"{why}. Leave it out, or give that loss a weight."
        if options.ttt_steps > 1:
            idle["ttt_steps"] = f"{why}, and steps after the first have no other. Leave it out, or give it a weight."
    return idle
