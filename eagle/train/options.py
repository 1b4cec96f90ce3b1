"""The options of a training run, resolved and checked once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from eagle.cli import RequestError

INITS = ("closed_form", "random")

#: Learning rate that trains a draft of hidden size 576 well from 0.1 to 100 million tokens. Larger drafts need less,
#: in inverse proportion to their width.
REFERENCE_LR, REFERENCE_WIDTH = 1e-3, 576


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """What `eagle.train.main` was asked for. Sizes are per process unless they say otherwise."""

    tmpdir: Path
    cpdir: Path
    basepath: Path
    configpath: Path | None = None
    bs: int = 4
    gradient_accumulation_steps: int = 1
    num_epochs: int = 5
    max_len: int = 2048
    lr: float | None = None
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
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
    keep: int = 3
    num_workers: int = 0
    seed: int = 42

    def __post_init__(self) -> None:
        for name in (
            "bs", "gradient_accumulation_steps", "num_epochs", "eval_freq", "save_freq", "keep", "init_positions"
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise RequestError(f"--{name} {getattr(self, name)}: expected 1 or more.")
        for name in ("weight_decay", "vloss_weight", "ploss_weight", "noise", "num_workers", "grad_clip"):
            if getattr(self, name) < 0:
                raise RequestError(f"--{name} {getattr(self, name)}: expected 0 or more.")
        for name in ("warmup_ratio", "val_ratio", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise RequestError(f"--{name} {getattr(self, name)}: expected a share from 0 to below 1.")
        if self.lr is not None and self.lr <= 0:
            raise RequestError(f"--lr {self.lr}: expected more than 0.")
        if self.max_len < 3:
            raise RequestError(f"--max_len {self.max_len}: expected 3 tokens or more.")
        if self.vloss_weight == self.ploss_weight == 0:
            raise RequestError("--vloss_weight 0 --ploss_weight 0: nothing would be trained; set one above 0.")
        if self.init not in INITS:
            raise RequestError(f"--init {self.init}: expected one of {', '.join(INITS)}.")

    def learning_rate(self, hidden_size: int) -> float:
        """``--lr``, or the default for a draft of that width."""
        return self.lr if self.lr is not None else REFERENCE_LR * REFERENCE_WIDTH / hidden_size

    def to_json(self) -> dict:
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


#: Options that may change when a run is resumed: they do not touch what is computed.
FREE_ON_RESUME = ("tmpdir", "cpdir", "basepath", "configpath", "num_workers", "keep", "save_freq", "eval_freq")
