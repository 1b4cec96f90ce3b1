"""The ways of training that `benchmarks/recipes.py` compares: a table, whatever the base model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from eagle.drafts.eagle3.draft_config import default_aux_layers
from eagle.drafts.losses import TOKEN_LOSSES
from eagle.errors import RequestError
from eagle.target.config import ModelConfig

#: What all rows of a family begin with, beside the defaults of training: a row that says one of these again is the same
#: run under another name. classic: EAGLE-1 as it was published.
FAMILIES: dict[str, tuple[str, ...]] = {
    "classic": ("--draft", "eagle1", "--recipe", "eagle1", "--init", "random"),
    "eagle1": ("--draft", "eagle1"),
    "eagle3": ("--draft", "eagle3", "--draft_vocab_size", "8192"),
}

#: The layers whose inputs an EAGLE-3 draft reads, of a base model of so many: the default is near the beginning, in the
#: middle and near the end. two: without the first of it; four: with one more between the others.
LAYERS: dict[str, Callable[[int], tuple[int, ...]]] = {
    "default": default_aux_layers,
    "early": lambda layers: (2, layers // 4, layers // 2),
    "late": lambda layers: (layers // 2, 3 * layers // 4, layers - 3),
    "with-last": lambda layers: (2, layers // 2, layers - 1),
    "two": lambda layers: (layers // 2, layers - 3),
    "four": lambda layers: (2, layers // 2, 3 * layers // 4, layers - 3),
}

#: Sizes in which a draft's layer is not the base model's, of whose config they are made.
SIZES: dict[str, Callable[[ModelConfig], dict[str, int]]] = {
    "mlp-half": lambda config: {"intermediate_size": config.intermediate_size // 2},
    "mlp-double": lambda config: {"intermediate_size": 2 * config.intermediate_size},
    "all-keys": lambda config: {"num_key_value_heads": config.num_attention_heads},
}


class NotHere(RequestError):
    """A row that there is not for this base model."""


@dataclass(frozen=True, slots=True)
class Row:
    """One way of training. flags: beside the family's. tokens: supervised ones, of --tokens. epochs: passes over them.
    original: the replies. layers, sizes: one of `LAYERS`, of `SIZES`."""

    name: str
    family: str
    flags: tuple[str, ...] = ()
    tokens: float = 1.0
    epochs: int = 1
    original: bool = False
    layers: str | None = None
    sizes: str | None = None

    @property
    def costs_its_own(self) -> bool:
        """Whether a step with its draft costs another time than one with its family's: the draft is of other sizes."""
        return self.name.partition("/")[0] in ("family", "vocabulary", "layers", "sizes")

    @property
    def is_validated_alike(self) -> bool:
        """Whether it is validated on what the other rows are: on conversations of the whole store."""
        return self.epochs == 1 and not self.original

    def flags_for(self, target: ModelConfig) -> list[str]:
        """The family's and its own; the last of a flag counts. Raises: NotHere for a vocabulary that is too large."""
        family, size = list(FAMILIES[self.family]), "--draft_vocab_size"
        if size in self.flags and int(self.flags[self.flags.index(size) + 1]) > target.vocab_size:
            raise NotHere(f"{self.name}: the base model has {target.vocab_size:,} tokens.")
        if size in family:
            at = family.index(size) + 1
            family[at] = str(min(int(family[at]), target.vocab_size))
        return [*family, *self.flags]

    def aux_layers(self, target: ModelConfig) -> tuple[int, ...] | None:
        """The layers that it names; None where it names none. Raises: NotHere."""
        if self.layers is None:
            return None
        count = target.num_hidden_layers
        try:
            found = LAYERS[self.layers](count)
        except RequestError as error:
            raise NotHere(f"{self.name}: {error}") from error
        if list(found) != sorted(set(found)) or found[0] < 0:
            raise NotHere(f"{self.name}: of a base model of {count} layers it would read {found}; too few for it.")
        return found

    def draft_config(self, target: ModelConfig) -> dict[str, Any] | None:
        """The config.json of a draft of these sizes; None where they are the base model's. Raises: NotHere."""
        if self.sizes is None:
            return None
        changes, config = SIZES[self.sizes](target), target.draft().to_json()
        if changes.items() <= config.items():
            raise NotHere(f"{self.name}: {changes} is the base model's own size; this is family/{self.family}.")
        return config | changes


def _each(group: str, family: str, flag: str, values: Sequence[object]) -> list[Row]:
    named = flag.removeprefix("--")
    return [Row(f"{group}/{family}-{named}-{value}", family, (flag, str(value))) for value in values]


_BOTH = ("eagle1", "eagle3")

ROWS: tuple[Row, ...] = (
    *(Row(f"family/{name}", name) for name in FAMILIES),
    *(Row(f"data/{name}-{share:g}", name, tokens=share) for name in _BOTH for share in (0.25, 0.5, 1, 2, 4)),
    *(Row(f"epochs/{name}-2-of-0.5", name, tokens=0.5, epochs=2) for name in _BOTH),
    *(Row(f"replies/{name}-original", name, original=True) for name in _BOTH),
    *_each("steps", "eagle1", "--ttt_steps", (1, 2, 3, 5)),
    *_each("steps", "eagle3", "--ttt_steps", (1, 2, 3, 4, 5)),
    *_each("weights", "eagle3", "--ttt_decay", (0.6, 0.8, 1.0)),
    *(row for name in _BOTH for row in _each("token-loss", name, "--token_loss", tuple(TOKEN_LOSSES))),
    *_each("feature-loss", "eagle1", "--vloss_weight", (0, 0.1, 0.3, 1)),
    *(
        row
        for name in _BOTH
        for group, flag, values in (
            ("rate", "--lr", (5e-4, 1e-3, 2e-3, 4e-3)),
            ("rate", "--warmup_ratio", (0.02, 0.1, 0.3)),
            ("batch", "--bs", (2, 4, 8, 16)),
            ("average", "--ema", (0, 0.99, 0.999)),
        )
        for row in _each(group, name, flag, values)
    ),
    *_each("noise", "eagle1", "--noise", (0, 0.1, 0.2)),
    *(
        Row(f"vocabulary/eagle3-{size}", "eagle3", ("--draft_vocab_size", str(size)))
        for size in (2048, 4096, 8192, 16384, 32768)
    ),
    *(Row(f"layers/eagle3-{layers}", "eagle3", layers=layers) for layers in LAYERS),
    *(Row(f"sizes/eagle3-{sizes}", "eagle3", sizes=sizes) for sizes in SIZES),
    Row("head/eagle3-frozen", "eagle3", ("--freeze_head",)),
    *(Row(f"start/{name}-random", name, ("--init", "random")) for name in _BOTH),
)
