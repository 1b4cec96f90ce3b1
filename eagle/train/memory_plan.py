"""What a training run will take of one process's memory, from shapes alone: ``python -m eagle.train.main --dry_run``.

    held         what is there from the start to the end: runtime, frozen matrices, draft, optimizer
    phases       what comes on top while the draft is started, trained, validated and saved; the largest is the peak

On an accelerator the plan is about the card's memory, on a CPU about the process's resident set. Memory-mapped pages:
frozen matrices that are used in the dtype they are stored in are mapped on a CPU, not copied, and count in full, since
every step reads them. Pages of the store stay resident until somebody else needs the room, so they are listed and
count in `resident`, which is what ``ru_maxrss`` shows, but not in `peak`, which is what the run needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from eagle.drafts.eagle1.closed_form_start import CHUNK
from eagle.drafts.eagle1.network import DraftModel
from eagle.drafts.token_loss import FrozenHead
from eagle.target.config import ModelConfig
from eagle.train.validation import DEPTH

#: Bytes of a float32, which weights, gradients and AdamW's two averages are kept in, and of a float64.
SINGLE, DOUBLE = 4, 8
#: Parts of float32 logits that a token loss makes beyond the head's own three: the closed form of soft_cross_entropy
#: makes one product; the others are differentiated automatically.
LOSS_PARTS = {"soft_cross_entropy": 1, "top_k": 3, "lk": 4}
#: A CUDA or CANN context with its libraries; on a CPU the runtime is measured instead.
CONTEXT_BYTES = 600 << 20


@dataclass(frozen=True, slots=True)
class Setting:
    """What a plan depends on.

    base_dtype: bytes per value of the base model's weights and of the store. compute: bytes per value of what mixed
    precision computes in, 4 without. tied: the head is the embedding. runtime: bytes before anything is loaded.
    processes: of the group; sharded: whether they share the draft's weights, gradients and optimizer state (FSDP).
    fused, fused_masked: whether attention without and with a mask keeps its ``[B, heads, T, T]`` scores out of memory.
    store: bytes of the store's files. trunk: bytes of the base model's layers, where it runs in this process.
    """

    config: ModelConfig
    bs: int
    max_len: int
    kind: str = "cpu"
    ttt_steps: int = 1
    accumulation: int = 1
    token_loss: str = "soft_cross_entropy"
    closed_form: bool = True
    init_positions: int = CHUNK
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

    @property
    def tied(self) -> bool:
        return self.config.tie_word_embeddings

    @property
    def positions(self) -> int:
        """Of a micro-batch, ``B * T``; the shift takes one token of every record."""
        return self.bs * (self.max_len - 1)

    @property
    def shards(self) -> int:
        return self.processes if self.sharded else 1


@dataclass(slots=True)
class Phase:
    """What a part of the run holds at its fullest, beyond what the run holds throughout."""

    name: str
    items: dict[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(self.items.values())


@dataclass(slots=True)
class MemoryPlan:
    """held: bytes by name, throughout. phases: on top of it, one after another. store: mapped, given back freely."""

    held: dict[str, int]
    phases: list[Phase]
    store: int

    def total(self, phase: Phase) -> int:
        return sum(self.held.values()) + phase.bytes

    @property
    def fullest(self) -> Phase:
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes that the run needs."""
        return self.total(self.fullest)

    @property
    def resident(self) -> int:
        """Bytes that the system will show, the store's pages included."""
        return self.peak + self.store


def make_plan(setting: Setting) -> MemoryPlan:
    """The plan of one process of a run."""
    on_cpu = setting.kind == "cpu"
    weights = draft_weights(setting.config)
    trained, largest = sum(weights.values()), max(weights.values())
    own = SINGLE * trained // setting.shards
    matrix = setting.config.vocab_size * setting.config.hidden_size * setting.compute

    held = {"runtime (python, torch and their libraries)": setting.runtime, "frozen embedding": matrix}
    held["frozen head (the embedding)" if setting.tied else "frozen head"] = 0 if setting.tied else matrix
    held["draft weights"] = own
    if setting.trunk:
        held["base model, for --data_path"] = setting.trunk

    adam, gradients = {"AdamW state": 2 * own}, {"gradients": own}
    if setting.processes > 1 and not setting.sharded:
        adam["DDP gradient buckets"] = own  # buffers of its own, together as large as the gradients
    # FSDP puts a layer together where it is needed, in the dtype it computes in, and its gradient in full.
    whole = {"gathered weights": setting.compute * trained} if setting.shards > 1 else {}
    whole_gradient = {"gradient before it is shared out": SINGLE * trained} if setting.shards > 1 else {}
    # Autocast keeps a copy of every weight for the backward pass.
    casts = {"weights in the dtype computed in": setting.compute * trained} if setting.compute < SINGLE else {}
    batch = {"batch": batch_bytes(setting)}
    workspace = {"head-loss workspace": workspace_bytes(setting, setting.ttt_steps)}
    saved = [saved_bytes(setting, step) for step in range(1, setting.ttt_steps + 1)]
    steps = {f"activations, draft step {step}": size for step, size in enumerate(saved, 1)}
    chosen = {"predicted and target features": prediction_bytes(setting, setting.ttt_steps)}
    forward = {**adam, **batch, **whole, **casts, **steps, **chosen}
    if setting.accumulation > 1:
        forward |= gradients

    phases = []
    # A draft is shared out once it has its first weights, or those it is resumed from, with AdamW's state.
    unshared = {"draft before it is shared out": SINGLE * trained - own} if setting.shards > 1 else {}
    if setting.closed_form:
        phases.append(Phase("start: normal equations", unshared | equations_bytes(setting)))
        phases.append(Phase("start: their solution", unshared | solution_bytes(setting)))
    if setting.shards > 1:
        phases.append(Phase("resuming", {**unshared, "AdamW state before it is shared out": 2 * SINGLE * trained}))
    phases.append(Phase("training: forward and head loss", {**forward, **workspace}))
    # Every weight's gradient is there once the last step is through; the steps before it are still to come.
    early = {**forward, **workspace, "gradients on their way": flowing_bytes(setting), **whole_gradient}
    late = {**early, **gradients, "one weight's new gradient": SINGLE * largest}
    late.pop(f"activations, draft step {setting.ttt_steps}")
    phases += [Phase("training: backward", max((early, late), key=lambda items: sum(items.values())))]
    # Accelerators update all weights in one call, which keeps a temporary of every one; a CPU goes weight by weight.
    temporary = SINGLE * 2 * largest // setting.shards if on_cpu else own
    step_items = {**adam, **gradients, **batch, **workspace, "AdamW's temporaries": temporary}
    phases.append(Phase("training: optimizer step", step_items))
    if setting.validates:
        phases.append(Phase("validation", {**adam, **batch, **whole, **validation_items(setting)}))
    # The main process gathers the shards on the CPU to write them; a card holds one weight at a time.
    gathered = {"gathered draft and AdamW state": SINGLE * (3 * trained if on_cpu else largest)}
    gathered = gathered if setting.shards > 1 else {}
    phases.append(Phase("saving", {**adam, **workspace, **gathered}))
    return MemoryPlan(held, phases, setting.store)


def draft_weights(config: ModelConfig) -> dict[str, int]:
    """Numbers of values of the draft's trained weights, by name; nothing is allocated."""
    with torch.device("meta"):
        draft = DraftModel(config.draft(), torch.empty(config.vocab_size, config.hidden_size))
    return {name: value.numel() for name, value in draft.named_parameters() if value.requires_grad}


def trunk_values(target: ModelConfig) -> int:
    """Numbers of values of the base model without its head: its layers are the draft's, and one norm more."""
    layer = sum(count for name, count in draft_weights(target).items() if not name.startswith("fc."))
    return (layer + target.hidden_size) * target.num_hidden_layers + (target.vocab_size + 1) * target.hidden_size


def batch_bytes(setting: Setting) -> int:
    """A global batch's share of this process: tokens, features and targets, and the features in the dtype computed in.

    A CPU holds the micro-batches of a whole step at once, a card the one it works on.
    """
    features = setting.positions * setting.config.hidden_size
    waiting = setting.accumulation if setting.kind == "cpu" else 1
    copied = 0 if setting.kind == "cpu" and setting.base_dtype == setting.compute else features * setting.compute
    return waiting * (2 * features * setting.base_dtype + 9 * setting.positions) + copied


def attention_mask_bytes(setting: Setting, step: int) -> int:
    """Of step `step`'s mask ``[T, step * T]``: the kernel turns booleans into numbers, the same for all heads."""
    length = setting.max_len - 1
    return length * length * step * (setting.compute + 1) if step > 1 else 0


def saved_bytes(setting: Setting, step: int) -> int:
    """Activations that draft step `step` keeps for the backward pass; see `eagle.drafts.unroll`.

    Of the attention: queries, the keys and values of all steps so far (repeated where queries share them), the output
    and one number per row; the scores too where the kernel is not a fused one.
    """
    config, compute = setting.config, setting.compute
    hidden, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    values = 2 * hidden + hidden + queries + queries + 2 * step * queries + 4 * config.intermediate_size
    # The norm runs in float32: its input, the normed value and its product with the weight, the last two narrow again
    # in mixed precision, which casts the product for each of its two readers.
    norm = 3 * hidden * SINGLE if compute == SINGLE else hidden * SINGLE + 3 * hidden * compute
    output = hidden * compute  # in the stack of all steps' predictions
    per_position = values * compute + norm + output + config.num_attention_heads * SINGLE + SINGLE
    mask = attention_mask_bytes(setting, step)
    return setting.positions * per_position + mask + _score_bytes(setting, step, copies=2)


def _score_bytes(setting: Setting, step: int, copies: int) -> int:
    if setting.fused_masked if step > 1 else setting.fused:
        return 0
    length = setting.max_len - 1
    return copies * setting.bs * setting.config.num_attention_heads * length * length * step * setting.compute


def flowing_bytes(setting: Setting) -> int:
    """Gradients of activations at the widest place, the feed-forward block; and those of all steps' predictions."""
    config = setting.config
    predictions = 2 * setting.ttt_steps * config.hidden_size
    return setting.positions * (3 * config.intermediate_size + predictions) * setting.compute


def prediction_bytes(setting: Setting, steps: int, *, slope: bool = True) -> int:
    """Predicted features at the supervised positions (at most all), their slopes, and the targets."""
    size = setting.positions * setting.config.hidden_size
    return size * (steps * SINGLE * (2 if slope else 1) + setting.base_dtype + 2 * SINGLE)


def workspace_bytes(setting: Setting, steps: int, extra_parts: int | None = None) -> int:
    """The head's buffers for so many draft steps: a block of logits and parts of it in float32, whatever the batch."""
    vocab, hidden = setting.config.vocab_size, setting.config.hidden_size
    dtype = {2: torch.bfloat16, 4: torch.float32}[setting.compute]
    # A head of the right shape that takes no memory.
    device = "meta" if setting.kind == "npu" else setting.kind
    head = FrozenHead(torch.empty(1, 1, dtype=dtype, device=device).expand(vocab, hidden))
    rows = min(head.block_positions(steps), setting.positions)
    parts = 3 + (LOSS_PARTS[setting.token_loss] if extra_parts is None else extra_parts)
    block = (1 + steps) * rows * (vocab + 2 * hidden) * setting.compute
    return block + parts * min(head.part_positions(), rows) * vocab * SINGLE


def equations_bytes(setting: Setting) -> dict[str, int]:
    """The closed-form start: sums in float64 on the CPU, one chunk's products in float32 on the device."""
    size = setting.config.hidden_size
    # Gathered one by one, then put together: twice.
    rows = 2 * (min(CHUNK, setting.init_positions) + setting.max_len) * 3 * size * SINGLE
    items = {"chunk of positions": rows, "its products": 4 * size * size * SINGLE}
    if setting.kind == "cpu":
        items |= {
            "normal equations, float64": 6 * size * size * DOUBLE,
            "products in float64": 4 * size * size * DOUBLE,
        }
    return items


def solution_bytes(setting: Setting) -> dict[str, int]:
    """Solving them: the matrix with its ridge, and its Cholesky factor; on the CPU, whatever the device."""
    if setting.kind != "cpu":
        return {}
    square = 4 * setting.config.hidden_size**2 * DOUBLE
    shared = {"sums over processes": square} if setting.processes > 1 else {}
    return {"normal equations, float64": square * 3 // 2, "ridge and factor": 3 * square, **shared}


def validation_items(setting: Setting) -> dict[str, int]:
    """`DEPTH` steps without a backward pass: keys and values of all steps, one step's layer, all predictions."""
    config = setting.config
    queries, hidden = config.num_attention_heads * config.head_dim, config.hidden_size
    pairs = 2 * DEPTH * config.num_key_value_heads * config.head_dim
    repeated = 2 * DEPTH * queries if queries > config.num_key_value_heads * config.head_dim else 0
    # The keys and values of all steps stay, a copy of them is for one attention; the feed-forward block follows it.
    layer = pairs + max(pairs + repeated + 2 * queries, 3 * config.intermediate_size) + 4 * hidden
    # In mixed precision accelerate makes a float32 copy of what a model gives.
    outputs = DEPTH * hidden * (2 * setting.compute + (SINGLE if setting.compute < SINGLE else 0))
    activations = setting.positions * (setting.compute * layer + outputs)
    scores = attention_mask_bytes(setting, DEPTH) + _score_bytes(setting, DEPTH, copies=1)
    return {
        "activations": activations + scores,
        "predicted and target features": prediction_bytes(setting, DEPTH, slope=False),
        "head-loss workspace": workspace_bytes(setting, DEPTH, extra_parts=2),
    }
