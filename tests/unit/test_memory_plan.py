"""The memory plan: what autograd really keeps, and what each part grows with."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from eagle.drafts import chain_attention
from eagle.drafts.choices import DraftChoices
from eagle.drafts.eagle1.memory import saved_bytes
from eagle.drafts.eagle1.network import Eagle1Network
from eagle.drafts.families import DRAFT_FAMILIES
from eagle.drafts.interface import DraftFamily
from eagle.drafts.memory import Setting
from eagle.drafts.network import DraftNetwork
from eagle.drafts.objective import LossOptions
from eagle.drafts.saved import without_values
from eagle.drafts.token_loss import TokenLossHead
from eagle.drafts.unroll import UnrolledDraft
from eagle.target.config import ModelConfig, parse_config
from eagle.train.dry_run import attention_is_fused
from eagle.train.memory_plan import MemoryPlan, head_of, make_plan, workspace_bytes
from eagle.train.validation import DEPTH

EAGLE1, EAGLE3 = DRAFT_FAMILIES["eagle1"], DRAFT_FAMILIES["eagle3"]
#: Of the tokens, how many an EAGLE-3 draft chooses among.
DRAFTED = 100
DTYPES = [torch.float32, torch.bfloat16]


def config(*, kv_heads: int = 4, vocab: int = 300, tied: bool = False, hidden: int = 64) -> ModelConfig:
    return parse_config(
        {
            "model_type": "llama", "hidden_size": hidden, "intermediate_size": 3 * hidden, "vocab_size": vocab,
            "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": kv_heads,
            "tie_word_embeddings": tied,
        }
    ).draft()  # fmt: skip


def eagle3(shape: ModelConfig, drafted: int = DRAFTED) -> ModelConfig:
    """The draft's config for a base model of these sizes and eight layers."""
    base = dataclasses.replace(shape, num_hidden_layers=8)
    return EAGLE3.config(base, None, DraftChoices(draft_vocab_size=drafted))


def setting_of(shape: ModelConfig, family: DraftFamily = EAGLE1, **more: object) -> Setting:
    return Setting(shape, family.features(shape), family.reads(shape), **more)


def of(family: DraftFamily, shape: ModelConfig) -> ModelConfig:
    return eagle3(shape) if family is EAGLE3 else shape


def draft_weights(shape: ModelConfig) -> dict[str, int]:
    return {name: tensor.numel() for name, tensor in without_values(EAGLE1, shape).trained_state().items()}


def workspace(setting: Setting, steps: int, family: DraftFamily = EAGLE1) -> int:
    return workspace_bytes(setting, head_of(without_values(family, setting.config), setting, family), steps)


def kept_by_autograd(
    family: DraftFamily, shape: ModelConfig, batch: int, length: int, steps: int, dtype: torch.dtype
) -> int:
    """Bytes of every storage that the backward pass of the unrolled draft will read, weights and inputs left out."""
    draft = family.build(shape, torch.randn(shape.vocab_size, shape.hidden_size).to(dtype))
    features = torch.randn(batch, length, family.features(shape)[family.reads(shape)]).to(dtype)
    tokens = torch.zeros(batch, length, dtype=torch.long)
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    mixed = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), mixed:
        output = UnrolledDraft(draft)(tokens, features, steps)
    keep(output)
    for given in (features, *draft.parameters()):
        kept.pop(given.untyped_storage().data_ptr(), None)
    sizes = {tuple(weight.shape) for weight in draft.parameters()}
    # Autocast's narrow copies of the weights have a line of their own in the plan.
    own = [
        t
        for t in kept.values()
        if tuple(t.shape) not in sizes and tuple(t.T.shape if t.dim() == 2 else ()) not in sizes
    ]
    return sum(tensor.untyped_storage().nbytes() for tensor in own)


def skip_unless_fused(dtype: torch.dtype) -> None:
    if not all(attention_is_fused(torch.device("cpu"), dtype.itemsize, masked) for masked in (False, True)):
        pytest.skip("this torch keeps attention's scores on a CPU")


@pytest.mark.parametrize("family", DRAFT_FAMILIES.values(), ids=DRAFT_FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [1, 3, 7])
@pytest.mark.parametrize(("kv_heads", "piece"), [(4, 128), (2, 40)], ids=["one piece", "grouped, several pieces"])
def test_activations_are_what_autograd_keeps(family, dtype, steps, kv_heads, piece, monkeypatch):
    skip_unless_fused(dtype)
    monkeypatch.setattr(chain_attention, "LEAST", piece)
    shape, batch, length = of(family, config(kv_heads=kv_heads)), 3, 90
    setting = setting_of(shape, family, bs=batch, max_len=length + 1, compute=dtype.itemsize)
    planned = sum(family.saved_bytes(setting, step) for step in range(1, steps + 1))
    assert planned == pytest.approx(kept_by_autograd(family, shape, batch, length, steps, dtype), rel=0.05)


class Alive(TorchDispatchMode):
    """Counts the storages that the operators inside of it have made and that are still there. peak: most bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self._alive = {place: one for place, one in self._alive.items() if not one[0].expired()}
        for tensor in tree_flatten(found)[0]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return found


def peaks(draft: DraftNetwork, family: DraftFamily, setting: Setting, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that a micro-batch takes at most beyond weights, gradients and batch, by the plan's names of the phases."""
    shape, batch, length = setting.config, setting.bs, setting.max_len - 1
    objective = family.objective(draft, torch.randn(shape.vocab_size, shape.hidden_size).to(dtype), LossOptions())
    tokens = torch.zeros(batch, length, dtype=torch.long)
    features = torch.randn(batch, length, setting.widths[setting.reads]).to(dtype)
    targets = torch.randn(batch * length, shape.hidden_size).to(dtype)
    every = torch.arange(batch * length)  # places

    def states(steps: int) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = UnrolledDraft(draft)(tokens, features, steps)
        return found.float().flatten(1, 2)[:, every]

    def valid(steps: int) -> torch.Tensor:
        return torch.ones(steps, batch * length, dtype=torch.bool)

    steps = setting.ttt_steps
    counts = torch.full((steps,), float(batch * length))
    with Alive() as forward:
        sums = objective.sums(states(steps), targets, valid(steps), counts)
        loss = objective.total(*objective.means(sums, counts))
    found, forward.peak = {"forward and head loss": forward.peak}, 0
    with forward:
        loss.backward()
    with torch.no_grad(), Alive() as checking:
        for _ in range(2):  # the second beside the buffers of the first
            objective.judge(states(DEPTH), targets, valid(DEPTH))
    return found | {"backward": forward.peak, "validation": checking.peak}


@pytest.mark.parametrize("family", DRAFT_FAMILIES.values(), ids=DRAFT_FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plan_bounds_what_every_phase_takes_at_any_number_of_steps(family, dtype):
    """Tensor by tensor: the peak grows with the steps as planned, and no step takes more."""
    skip_unless_fused(dtype)
    shape = of(family, config(kv_heads=2, vocab=1000, hidden=128))
    for steps in (1, 3, 7):
        setting = setting_of(
            shape, family, bs=2, max_len=257, ttt_steps=steps, compute=dtype.itemsize, base_dtype=dtype.itemsize
        )
        draft = family.build(shape, torch.randn(shape.vocab_size, shape.hidden_size).to(dtype))
        found = peaks(draft, family, setting, dtype)
        apart = ("AdamW state", "batch", "gradients")
        planned = {
            phase.name.removeprefix("training: "): sum(s for name, s in phase.items.items() if name not in apart)
            for phase in make_plan(setting, family).phases
        }
        assert planned["forward and head loss"] == pytest.approx(found["forward and head loss"], rel=0.12), steps
        assert found["backward"] <= planned["backward"] < 1.25 * max(found.values()), steps
        assert found["validation"] <= planned["validation"], steps


def test_scores_count_where_the_kernel_keeps_them():
    fused = setting_of(config(), bs=2, max_len=101)
    plain = dataclasses.replace(fused, fused=False)
    assert saved_bytes(plain, 1) - saved_bytes(fused, 1) == 2 * (2 * 4 * 100 * 100) * 4
    assert saved_bytes(plain, 2) == saved_bytes(fused, 2)  # the second step is masked, which is another question


def test_the_workspace_depends_on_the_block_alone():
    """Not on the batch, and not on the vocabulary either, while a block holds more than the fewest positions."""
    sizes = {bs: workspace(setting_of(config(vocab=50_000), bs=bs, max_len=2048), 1) for bs in (1, 64)}
    assert sizes[1] == sizes[64]
    small, large = (workspace(setting_of(config(vocab=vocab), bs=1, max_len=2048), 1) for vocab in (30_000, 240_000))
    assert large < 1.1 * small
    deep = workspace(setting_of(config(vocab=50_000), bs=1, max_len=2048), 5)
    assert deep == pytest.approx(sizes[1], rel=0.1)
    less = workspace(setting_of(config(vocab=50_000), bs=1, max_len=2048, token_loss="top_k"), 1)
    assert less == sizes[1] - TokenLossHead(torch.empty(50_000, 1)).part_positions() * 50_000 * 4, "it makes no product"
    rows = TokenLossHead(torch.empty(50_000, 1).expand(50_000, 64)).block_positions(1)
    assert sizes[1] >= 2 * rows * 50_000 * 4


def test_a_head_of_the_drafts_own_counts():
    """As a weight that is trained; its logits and its gradient beside the target's logits."""

    def setting(vocab: int, drafted: int, **more: object) -> Setting:
        return setting_of(eagle3(config(vocab=vocab), drafted), EAGLE3, bs=1, max_len=9, ttt_steps=3, **more)

    before, wider, larger = setting(50_000, 8_000), setting(50_000, 9_000), setting(60_000, 8_000)
    head, rows, more = 1_000 * 64, 8, 1_000  # of the wider one
    first, second = (make_plan(one, EAGLE3) for one in (before, wider))
    assert second.held["draft weights"] - first.held["draft weights"] == 4 * head + 8 * more  # d2t is of eight bytes
    assert second.held["frozen head"] == first.held["frozen head"]
    first, second = (
        {phase.name.split(": ")[-1]: phase.items for phase in plan.phases}["forward and head loss"]
        for plan in (first, second)
    )
    assert second["AdamW state"] - first["AdamW state"] == 2 * 4 * head
    assert second["gradient of the draft's head"] == 9 * (4 + 4) * head  # with a block's share of it
    assert workspace(wider, 3, EAGLE3) - workspace(before, 3, EAGLE3) == rows * more * 4 * (3 + 4)
    assert workspace(larger, 3, EAGLE3) - workspace(before, 3, EAGLE3) == rows * 10_000 * 4 * (1 + 1)
    mixed = make_plan(setting(50_000, 8_000, compute=2), EAGLE3)
    (checked,) = (phase.items for phase in mixed.phases if phase.name == "validation")
    assert checked["draft's head in the dtype computed in"] == 2 * 8 * head
    features = 8 * (4 * 64 * 2 + 13)  # the target's and those of three layers, a byte of mask, token and place
    assert make_plan(setting(50_000, 8_000, kind="npu", init="random"), EAGLE3).host == {
        "2 batches, read and waiting or in use": 2 * (1 << (features - 1).bit_length())
    }
    frozen = make_plan(setting(50_000, 8_000, frozen_head=True), EAGLE3)
    assert first["AdamW state"] - frozen.phases[-1].items["AdamW state"] == 2 * 4 * 8 * head, "it has none"
    assert not any("gradient of the draft's head" in phase.items for phase in frozen.phases)


@pytest.mark.parametrize(
    ("change", "grows", "stays"),
    [
        ({"bs": 8}, ["activations, draft step 1", "batch"], ["frozen head", "AdamW state", "head-loss workspace"]),
        ({"max_len": 512}, ["activations, draft step 1", "batch"], ["draft weights", "head-loss workspace"]),
        ({"ttt_steps": 3}, ["activations, draft step 3"], ["batch", "AdamW state"]),
        ({"accumulation": 4}, ["batch", "gradients"], ["activations, draft step 1", "AdamW state"]),
        ({"processes": 2}, ["DDP gradient buckets"], ["draft weights", "AdamW state"]),
        ({"compute": 2}, ["weights in the dtype computed in"], ["draft weights", "AdamW state"]),
        ({"fused": False}, ["activations, draft step 1"], ["batch", "head-loss workspace"]),
    ],
)  # fmt: skip
def test_each_part_grows_with_what_it_should(change, grows, stays):
    before = setting_of(config(vocab=300_000), bs=2, max_len=128)

    def parts(setting: Setting) -> dict[str, int]:
        plan = make_plan(setting, EAGLE1)
        return plan.held | next(p.items for p in plan.phases if p.name == "training: forward and head loss")

    first, second = parts(before), parts(dataclasses.replace(before, **change))
    assert all(second[name] > first.get(name, 0) for name in grows)
    assert all(second[name] == first[name] for name in stays)


def test_shards_are_divided_and_put_together_again():
    alone = make_plan(setting_of(config(hidden=256), bs=1, max_len=16), EAGLE1)
    shared = make_plan(setting_of(config(hidden=256), bs=1, max_len=16, processes=4, sharded=True), EAGLE1)
    trained = 4 * sum(draft_weights(config(hidden=256)).values())
    assert alone.held["draft weights"] == trained
    assert shared.held["draft weights"] == trained // 4
    assert shared.held["frozen embedding"] == alone.held["frozen embedding"]
    phases = {phase.name: phase.items for phase in shared.phases}
    assert phases["training: optimizer step"]["AdamW state"] == 2 * (trained // 4)
    assert phases["training: forward and head loss"]["gathered weights"] == trained
    assert phases["saving"]["gathered draft and AdamW state"] == 3 * trained


@pytest.mark.parametrize("kind", ["cpu", "npu"])
def test_what_the_start_holds(kind):
    shape = config(hidden=512)
    plan = make_plan(setting_of(shape, bs=1, max_len=16, kind=kind, init_positions=100), EAGLE1)
    sums = 6 * 512 * 512 * 8
    starting = {phase.name: phase.items for phase in plan.phases if phase.name.startswith("start")}
    assert all(items["sums"] == sums for items in starting.values())
    assert ("start: their solution" in starting) == (kind == "cpu")
    assert plan.host.get("closed-form start, on the main process") == (None if kind == "cpu" else sums + sums // 8)
    shared = make_plan(setting_of(shape, bs=1, max_len=16, kind=kind, init_positions=100, processes=8), EAGLE1)
    exchange = next(phase.items for phase in shared.phases if phase.name == "start: their exchange")
    assert exchange["parts of other processes' sums"] == (2 if kind == "cpu" else 9) * sums
    random = make_plan(setting_of(shape, bs=1, max_len=16, kind=kind, init="random"), EAGLE1)
    assert not any("start" in name for name in random.host)
    assert not any(phase.name.startswith("start") for phase in random.phases)


def test_batches_that_wait():
    """As they are stored: once, tokens, mask and places beside them; on a card in host memory only."""
    shape = config()

    def plan(**more: object) -> MemoryPlan:
        return make_plan(setting_of(shape, bs=2, max_len=128, init="random", **more), EAGLE1)

    batch = 2 * 127 * (64 * 2 + 13)  # 35,814 bytes, which take 65,536 of page-locked memory
    assert plan(kind="npu", prefetched=3).host == {"5 batches, read and waiting or in use": 5 * 65536}
    assert plan(kind="npu", accumulation=4).host == {"8 batches, read and waiting or in use": 8 * 65536}
    assert plan(kind="npu", prefetched=3).peak == plan(kind="npu").peak
    assert list(plan(kind="npu", prefetched=1, stored=1).host.values()) == [3 * 32768]  # 20,574
    assert plan(prefetched=3).peak == plan().peak + 3 * batch and not plan(prefetched=3).host


def test_the_draft_is_counted_as_it_is():
    shape = config(kv_heads=2)
    draft = Eagle1Network(shape, torch.zeros(shape.vocab_size, shape.hidden_size))
    assert draft_weights(shape) == {n: p.numel() for n, p in draft.named_parameters() if p.requires_grad}


def test_the_peak_is_the_fullest_phase():
    plan = make_plan(setting_of(config(), bs=2, max_len=128, runtime=1000, store=7), EAGLE1)
    assert plan.peak == max(plan.total(phase) for phase in plan.phases)
    assert plan.resident == plan.peak + 7
    tied = make_plan(setting_of(config(tied=True), bs=2, max_len=128, runtime=1000), EAGLE1)
    assert plan.held["frozen head"] == plan.held["frozen embedding"] == plan.peak - tied.peak
