"""What a draft takes of memory while it is trained, from shapes alone: what every family's plan is made of.

`eagle.train.memory_plan` puts the plan of a run together; what depends on the network it asks the family.
"""

from __future__ import annotations

from dataclasses import dataclass

from eagle.drafts.chain_attention import ChainMask
from eagle.target.config import ModelConfig

#: Bytes of a float32, which weights, gradients and AdamW's two averages are kept in.
SINGLE = 4


@dataclass(frozen=True, slots=True)
class Setting:
    """What a plan depends on.

    config: the draft's. widths: of a record's features, by name; reads: the name of those the draft reads. base_dtype:
    bytes per value of the base model's weights and of the store. compute: bytes per value of what mixed precision
    computes in, 4 without. runtime: bytes before anything is loaded. processes: of the group; sharded: whether they
    share the draft's weights, gradients and optimizer state (FSDP). fused, fused_masked: whether attention without and
    with a mask keeps its ``[B, heads, T, T]`` scores out of memory. store: bytes of the store's files. trunk: bytes of
    the base model's layers, where it runs in this process. init_positions: that the closed-form start will look at, of
    all processes. prefetched: batches that wait in host memory while a step runs. stored: bytes per value of
    features in the store, where they are not stored as they are read. frozen_head: whether a head of the draft's own is
    not trained. averages: whether an average of every trained weight is kept beside it.
    """

    config: ModelConfig
    widths: dict[str, int]
    reads: str
    bs: int
    max_len: int
    kind: str = "cpu"
    ttt_steps: int = 1
    accumulation: int = 1
    token_loss: str = "soft_cross_entropy"
    init: str = "closed_form"
    init_positions: int = 1 << 20
    validates: bool = True
    base_dtype: int = 2
    compute: int = 4
    runtime: int = 0
    processes: int = 1
    sharded: bool = False
    fused: bool = True
    fused_masked: bool = True
    store: int = 0
    trunk: int = 0
    prefetched: int = 0
    stored: int | None = None
    frozen_head: bool = False
    averages: bool = False

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.config.shares_head

    @property
    def positions(self) -> int:
        """Of a micro-batch, ``B * T``; the shift takes one token of every record."""
        return self.bs * (self.max_len - 1)

    @property
    def shards(self) -> int:
        return self.processes if self.sharded else 1


@dataclass(slots=True)
class Phase:
    """What a part of the run holds at its fullest, beyond what the run holds throughout: bytes by name."""

    name: str
    items: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.items.values())


def attention_shapes(setting: Setting, step: int) -> list[tuple[int, int]]:
    """Queries and keys of step `step`'s attention, piece by piece."""
    length = setting.max_len - 1
    return [(length, length)] if step == 1 else ChainMask(length, step).shapes()


def attention_bytes(setting: Setting, step: int) -> int:
    """What step `step`'s attention keeps for the backward pass: the queries, every piece's keys and values (repeated
    where queries share them) and what it sees, one number a row, and all pieces' together for what comes behind."""
    config, length = setting.config, setting.max_len - 1
    queries = config.num_attention_heads * config.head_dim
    keys = sum(keys for _, keys in attention_shapes(setting, step))
    seen = length if step == 1 else 2 * length
    kept = (length + seen + 2 * keys) * queries * setting.compute + length * config.num_attention_heads * SINGLE
    return setting.bs * kept + attention_mask_bytes(setting, step) + score_bytes(setting, step, copies=2)


def attention_mask_bytes(setting: Setting, step: int) -> int:
    """Of step `step`'s masks: the kernel turns booleans into numbers, the same for all heads."""
    pairs = sum(rows * keys for rows, keys in attention_shapes(setting, step))
    return pairs * (setting.compute + 1) if step > 1 else 0


def score_bytes(setting: Setting, step: int, copies: int) -> int:
    """Of step `step`'s attention scores, where the kernel keeps them."""
    if setting.fused_masked if step > 1 else setting.fused:
        return 0
    pairs = sum(rows * keys for rows, keys in attention_shapes(setting, step))
    return copies * setting.bs * setting.config.num_attention_heads * pairs * setting.compute
