"""The memory plan: what autograd really keeps, and what each part grows with."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from eagle.drafts.eagle1.memory import saved_bytes
from eagle.drafts.eagle1.network import Eagle1Network
from eagle.drafts.families import DRAFT_FAMILIES
from eagle.drafts.memory import Setting
from eagle.drafts.saved import without_values
from eagle.drafts.token_loss import TokenLossHead
from eagle.drafts.unroll import UnrolledDraft
from eagle.target.config import ModelConfig, parse_config
from eagle.train.dry_run import attention_is_fused
from eagle.train.memory_plan import MemoryPlan, make_plan, workspace_bytes

EAGLE1 = DRAFT_FAMILIES["eagle1"]


def config(*, kv_heads: int = 4, vocab: int = 300, tied: bool = False, hidden: int = 64) -> ModelConfig:
    return parse_config(
        {
            "model_type": "llama", "hidden_size": hidden, "intermediate_size": 3 * hidden, "vocab_size": vocab,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": kv_heads,
            "tie_word_embeddings": tied,
        }
    )  # fmt: skip


def setting_of(shape: ModelConfig, **more: object) -> Setting:
    return Setting(shape, EAGLE1.features(shape), EAGLE1.reads(shape), **more)


def draft_weights(shape: ModelConfig) -> dict[str, int]:
    return {name: tensor.numel() for name, tensor in without_values(EAGLE1, shape).trained_state().items()}


def kept_by_autograd(shape: ModelConfig, batch: int, length: int, steps: int, dtype: torch.dtype) -> int:
    """Bytes of every storage that the backward pass of the unrolled draft will read, weights and inputs left out."""
    draft = Eagle1Network(shape, torch.randn(shape.vocab_size, shape.hidden_size).to(dtype))
    features = torch.randn(batch, length, shape.hidden_size).to(dtype)
    tokens = torch.zeros(batch, length, dtype=torch.long)
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    mixed = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), mixed:
        output = UnrolledDraft(draft)(tokens, features, steps)
    keep(output)
    for weight in draft.parameters():
        kept.pop(weight.untyped_storage().data_ptr(), None)
    sizes = {tuple(weight.shape) for weight in draft.parameters()}
    # Autocast's narrow copies of the weights have a line of their own in the plan.
    own = [
        t
        for t in kept.values()
        if tuple(t.shape) not in sizes and tuple(t.T.shape if t.dim() == 2 else ()) not in sizes
    ]
    return sum(tensor.untyped_storage().nbytes() for tensor in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_activations_are_what_autograd_keeps(dtype, steps, kv_heads):
    if not all(attention_is_fused(torch.device("cpu"), dtype.itemsize, masked) for masked in (False, True)):
        pytest.skip("this torch keeps attention's scores on a CPU")
    shape, batch, length = config(kv_heads=kv_heads), 3, 90
    setting = setting_of(shape, bs=batch, max_len=length + 1, compute=dtype.itemsize)
    planned = sum(saved_bytes(setting, step) for step in range(1, steps + 1))
    assert planned == pytest.approx(kept_by_autograd(shape, batch, length, steps, dtype), rel=0.05)


def test_scores_count_where_the_kernel_keeps_them():
    fused = setting_of(config(), bs=2, max_len=101)
    plain = dataclasses.replace(fused, fused=False)
    assert saved_bytes(plain, 1) - saved_bytes(fused, 1) == 2 * (2 * 4 * 100 * 100) * 4
    assert saved_bytes(plain, 2) == saved_bytes(fused, 2)  # the second step is masked, which is another question


def test_the_workspace_depends_on_the_block_alone():
    """Not on the batch, and not on the vocabulary either, while a block holds more than the fewest positions."""
    sizes = {bs: workspace_bytes(setting_of(config(vocab=50_000), bs=bs, max_len=2048), 1) for bs in (1, 64)}
    assert sizes[1] == sizes[64]
    small, large = (
        workspace_bytes(setting_of(config(vocab=vocab), bs=1, max_len=2048), 1) for vocab in (30_000, 240_000)
    )
    assert large < 1.1 * small
    deep = workspace_bytes(setting_of(config(vocab=50_000), bs=1, max_len=2048), 5)
    assert deep == pytest.approx(sizes[1], rel=0.1)
    rows = TokenLossHead(torch.empty(50_000, 1).expand(50_000, 64)).block_positions(1)
    assert sizes[1] >= 2 * rows * 50_000 * 4


@pytest.mark.parametrize(
    ("change", "grows", "stays"),
    [
        ({"bs": 8}, ["activations, draft step 1", "batch"], ["frozen head", "AdamW state", "head-loss workspace"]),
        ({"max_len": 512}, ["activations, draft step 1", "batch"], ["draft weights", "head-loss workspace"]),
        ({"ttt_steps": 3}, ["activations, draft step 3"], ["batch", "AdamW state"]),
        ({"accumulation": 4}, ["batch", "gradients"], ["activations, draft step 1", "AdamW state"]),
        ({"token_loss": "lk"}, ["head-loss workspace"], ["activations, draft step 1", "batch"]),
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
    assert plan.host.get("closed-form start, on the main process") == (None if kind == "cpu" else sums)
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
