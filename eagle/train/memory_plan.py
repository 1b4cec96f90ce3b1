"""What a training run will take of one process's memory, from shapes alone: ``python -m eagle.train.main --dry_run``.

    held         what is there from the start to the end: runtime, frozen matrices, draft, optimizer
    phases       what comes on top while the draft is started, trained, validated and saved; the largest is the peak

On an accelerator the plan is about the card's memory, on a CPU about the process's resident set. Memory-mapped pages:
frozen matrices that are used in the dtype they are stored in are mapped on a CPU, not copied, and count in full, since
every step reads them. Pages of the store stay resident until somebody else needs the room, so they are listed and
count in `resident`, which is what ``ru_maxrss`` shows, but not in `peak`, which is what the run needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eagle.drafts.interface import DraftFamily
from eagle.drafts.losses import LOSS_PARTS
from eagle.drafts.memory import SINGLE, Phase, Setting
from eagle.drafts.network import DraftNetwork
from eagle.drafts.objective import LossOptions
from eagle.drafts.saved import without_values
from eagle.drafts.token_loss import TokenLossHead
from eagle.target.features import HIDDEN_STATE, states_in
from eagle.train.validation import DEPTH

#: A CUDA or CANN context with its libraries; on a CPU the runtime is measured instead.
CONTEXT_BYTES = 600 << 20


@dataclass(slots=True)
class MemoryPlan:
    """held: bytes by name, throughout. phases: on top of it, one after another. store: mapped, given back freely.
    host: what else the process holds in host memory where the plan is a card's, by name; not all at once."""

    held: dict[str, int]
    phases: list[Phase]
    store: int
    host: dict[str, int]

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


def make_plan(setting: Setting, family: DraftFamily) -> MemoryPlan:
    """The plan of one process of a run."""
    on_cpu = setting.kind == "cpu"
    draft = without_values(family, setting.config)
    if setting.frozen_head:
        draft.freeze_head()
    weights = {name: tensor.numel() for name, tensor in draft.trained_state().items()}
    trained, largest = sum(weights.values()), max(weights.values())
    fixed = sum(tensor.nbytes for name, tensor in draft.own_state().items() if name not in weights)
    own = SINGLE * trained // setting.shards
    head = head_of(draft, setting, family)
    matrix = setting.config.vocab_size * setting.config.hidden_size * setting.compute

    held = {"runtime (python, torch and their libraries)": setting.runtime, "frozen embedding": matrix}
    held["frozen head (the embedding)" if setting.tied else "frozen head"] = 0 if setting.tied else matrix
    held["draft weights"] = own + fixed
    if setting.trunk:
        held["base model, for --data_path"] = setting.trunk

    adam, gradients = {"AdamW state": 2 * own}, {"gradients": own}
    if setting.averages:
        adam["averages of the weights"] = own
    if setting.processes > 1 and not setting.sharded:
        adam["DDP gradient buckets"] = own  # buffers of its own, together as large as the gradients
    # FSDP puts a layer together where it is needed, in the dtype it computes in, and its gradient in full.
    whole = {"gathered weights": setting.compute * trained} if setting.shards > 1 else {}
    whole_gradient = {"gradient before it is shared out": SINGLE * trained} if setting.shards > 1 else {}
    # Autocast keeps a copy of every weight for the backward pass.
    narrow = setting.compute * (
        trained - (head.own.weight.numel() if head.own and head.own.weight.requires_grad else 0)
    )
    casts = {"weights in the dtype computed in": narrow} if setting.compute < SINGLE else {}
    first, then, judging = own_head_items(setting, head)
    batch = {"batch": batch_bytes(setting)}
    if on_cpu and setting.prefetched:
        batch[f"{setting.prefetched} batches waiting"] = setting.prefetched * stored_batch_bytes(setting)
    workspace = {"head-loss workspace": workspace_bytes(setting, head, setting.ttt_steps)}
    saved = [family.saved_bytes(setting, step) for step in range(1, setting.ttt_steps + 1)]
    steps = {f"activations, draft step {step}": size for step, size in enumerate(saved, 1)}
    chosen = {"predicted and target features": prediction_bytes(setting, setting.ttt_steps)}
    forward = {**adam, **batch, **whole, **casts, **steps, **chosen}
    if setting.accumulation > 1:
        forward |= gradients

    phases = []
    # A draft is shared out once it has its first weights, or those it is resumed from, with AdamW's state.
    unshared = {"draft before it is shared out": SINGLE * trained - own} if setting.shards > 1 else {}
    phases += [Phase(phase.name, unshared | phase.items) for phase in family.start_phases(setting)]
    if setting.shards > 1:
        phases.append(Phase("resuming", {**unshared, "AdamW state before it is shared out": 2 * SINGLE * trained}))
    phases.append(Phase("training: forward and head loss", {**forward, **workspace, **first}))
    # Every weight's gradient is there once the last step is through; the steps before it are still to come.
    early = {**forward, **workspace, "gradients on their way": family.flowing_bytes(setting), **whole_gradient, **then}
    late = {**early, **gradients, "one weight's new gradient": SINGLE * largest}
    for name in (f"activations, draft step {setting.ttt_steps}", *then):
        late.pop(name)
    phases += [Phase("training: backward", max((early, late), key=lambda items: sum(items.values())))]
    # Accelerators update all weights in one call, which keeps a temporary of every one; a CPU goes weight by weight.
    temporary = SINGLE * 2 * largest // setting.shards if on_cpu else own
    step_items = {**adam, **gradients, **batch, **workspace, "AdamW's temporaries": temporary}
    phases.append(Phase("training: optimizer step", step_items))
    if setting.validates:
        checked = {
            "activations": family.validation_bytes(setting, DEPTH),
            "predicted and target features": prediction_bytes(setting, DEPTH, slope=False),
            "head-loss workspace": workspace_bytes(setting, head, DEPTH, extra_parts=2),
            **judging,
        }
        phases.append(Phase("validation", {**adam, **batch, **whole, **checked}))
    # The main process gathers the shards on the CPU to write them; a card holds one weight at a time.
    gathered = {"gathered draft and AdamW state": SINGLE * (3 * trained if on_cpu else largest)}
    gathered = gathered if setting.shards > 1 else {}
    phases.append(Phase("saving", {**adam, **workspace, **gathered}))
    host = {} if on_cpu else family.start_host_bytes(setting) | loader_bytes(setting)
    return MemoryPlan(held, phases, setting.store, host)


def loader_bytes(setting: Setting) -> dict[str, int]:
    """Page-locked host memory of a card's loader: batches that wait, and those of the step at hand and the one before.

    torch takes such memory in powers of two.
    """
    count = setting.prefetched + 2 * setting.accumulation
    each = 1 << (stored_batch_bytes(setting) - 1).bit_length()
    return {f"{count} batches, read and waiting or in use": count * each}


def stored_batch_bytes(setting: Setting) -> int:
    """A micro-batch as it is read and sent: features as they are stored, tokens, what is supervised and where.

    Stores with a byte a value keep a scale for every token and layer.
    """
    names = {HIDDEN_STATE, setting.reads}
    scale = SINGLE * sum(map(states_in, names)) if setting.stored else 0
    features = sum(setting.widths[name] for name in names) * (setting.stored or setting.base_dtype)
    return setting.positions * (features + scale + 13)


def batch_bytes(setting: Setting) -> int:
    """Batches as they are sent, and what the draft reads of one, with its noise and in the dtype computed in.

    A CPU holds the micro-batches of a whole step at once, a card the one it works on and the next.
    """
    read = setting.positions * setting.widths[setting.reads]
    sent = setting.accumulation if setting.kind == "cpu" else 2
    prepared = read * (setting.base_dtype + (setting.compute if setting.compute != setting.base_dtype else 0))
    return sent * stored_batch_bytes(setting) + prepared


def prediction_bytes(setting: Setting, steps: int, *, slope: bool = True) -> int:
    """Predicted features at the supervised positions (at most all), their slopes, and the targets."""
    size = setting.positions * setting.config.hidden_size
    return size * (steps * SINGLE * (2 if slope else 1) + setting.base_dtype + 2 * SINGLE)


def head_of(draft: DraftNetwork, setting: Setting, family: DraftFamily) -> TokenLossHead:
    """What the family's losses are taken with, the right shape without memory. draft: on the meta device."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[setting.compute]
    device = "meta" if setting.kind == "npu" else setting.kind
    weight = torch.empty(1, 1, dtype=dtype, device=device).expand(setting.config.vocab_size, setting.config.hidden_size)
    return family.objective(draft, weight, LossOptions()).head


def workspace_bytes(setting: Setting, head: TokenLossHead, steps: int, extra_parts: int | None = None) -> int:
    """The head's buffers for so many draft steps: a block of logits and parts of it in float32, whatever the batch.

    The target's logits are over its vocabulary, the draft's over the tokens that it chooses among.
    """
    vocab, drafted, hidden = setting.config.vocab_size, head.drafted, setting.config.hidden_size
    rows = min(head.block_positions(steps), setting.positions)
    parts = 3 + (LOSS_PARTS[setting.token_loss] if extra_parts is None else extra_parts)
    block = rows * (vocab + 2 * hidden + steps * (drafted + 2 * hidden)) * setting.compute
    wide = parts * drafted
    if head.own is not None:
        wide += vocab  # before those that are drafted are taken out of it
        if head.own.weight.requires_grad:  # features by what their step weighs
            block += 2 * steps * rows * hidden * SINGLE
    return block + min(head.part_positions(), rows) * wide * SINGLE


def own_head_items(setting: Setting, head: TokenLossHead) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """What a draft's own head takes beside the workspace: in the forward pass, at the backward pass's beginning, in
    validation. Empty where the head is the target's."""
    if head.own is None:
        return {}, {}, {}
    size = head.own.weight.numel()
    copy = {"draft's head in the dtype computed in": setting.compute * size} if setting.compute < SINGLE else {}
    if not head.own.weight.requires_grad:
        return copy, {}, copy
    name = "gradient of the draft's head"  # with a block's share of it; then with what becomes the weight's
    return {**copy, name: (SINGLE + setting.compute) * size}, {name: 2 * SINGLE * size}, copy
