"""FSDP: the processes of a group share the draft's weights, gradients and optimizer state (configs/fsdp.yaml).

Sharded by torch's ``fully_shard`` (FSDP version 2) and not by accelerate's ``prepare``, which would shard the frozen
embedding too and gather its ``[V, H]`` for every batch. The embedding stays whole on every process, as the head does,
which is read outside of the module. What is saved is what one process would save: whole tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import accelerate
import torch
from accelerate import Accelerator

from eagle.device import compute_dtype
from eagle.drafts.network import DraftNetwork
from eagle.drafts.unroll import UnrolledDraft
from eagle.errors import RequestError


def is_sharded(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether accelerate's launcher was told to use FSDP."""
    return environment.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")


def check_sharding(environment: Mapping[str, str] = os.environ, *, loads_base: bool = False) -> None:
    """loads_base: whether every process loads the base model, for features without a store.

    Raises: RequestError for a kind of FSDP that is not supported, or a torch without it.
    """
    if not is_sharded(environment):
        return
    try:
        from torch.distributed.fsdp import fully_shard  # noqa: F401
    except ImportError as error:
        raise RequestError(
            f"FSDP needs torch 2.6 and accelerate 1.6 or newer; these are {torch.__version__} and "
            f"{accelerate.__version__}. Leave --config_file configs/fsdp.yaml out."
        ) from error
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise RequestError(
            f"fsdp_version {version} in accelerate's config: expected 2, which accelerate has from 1.6 on (this is "
            f"{accelerate.__version__}). Use --config_file configs/fsdp.yaml, or leave FSDP out."
        )
    if environment.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise RequestError("fsdp_offload_params true in accelerate's config: expected false; offloading is not there.")
    if loads_base and environment.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() in ("true", "1"):
        raise RequestError(
            "fsdp_cpu_ram_efficient_loading true in accelerate's config: transformers would read the base model in the "
            "first process alone, and the others would compute with empty weights. Set it to false, as in "
            "configs/fsdp.yaml."
        )


def shard(accelerator: Accelerator, model: UnrolledDraft, optimizer: torch.optim.Optimizer) -> UnrolledDraft:
    """Shard a draft, whole on every process, and its optimizer with what that holds, in place.

    The network's large units and the rest are each gathered only while they run.
    Weights are gathered in the dtype computed in; gradients are summed in float32, as without sharding.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import distribute_tensor

    draft = model.draft
    old = draft.trained_state()
    # As without sharding: of another's --init, or of a copy of it that is not the same, it would keep its own shards.
    for weight in old.values():
        torch.distributed.broadcast(weight.detach(), 0)
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype(accelerator.mixed_precision),
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # a batch comes in the dtypes it has to have
    )
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # Out of sight while the rest is sharded: torch before 2.7 cannot be told to leave a weight alone.
    embedding = draft.embed_tokens.weight
    del draft.embed_tokens.weight
    for unit in draft.units():
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # A head of the draft's own is read behind the forward pass: what is in no other unit stays whole until backward.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=not draft.has_own_head)
    draft.embed_tokens.weight = embedding

    new = {old[name]: parameter for name, parameter in draft.trained_state().items()}
    for group in optimizer.param_groups:
        group["params"] = [new[parameter] for parameter in group["params"]]
    for parameter in list(optimizer.state):
        sharded: Any = new[parameter]  # a DTensor
        optimizer.state[sharded] = {
            name: distribute_tensor(value, mesh, sharded.placements) if value.shape == sharded.shape else value
            for name, value in optimizer.state.pop(parameter).items()
        }
    return model


@contextmanager
def no_sync(accelerator: Accelerator, model: Any) -> Iterator[None]:
    """Gradients add up in every process and are exchanged at the next backward pass outside of this."""
    if not hasattr(model, "set_requires_gradient_sync"):
        with accelerator.no_sync(model):
            yield
        return
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def clip(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer, most: float
) -> torch.Tensor:
    """Scale the gradients down to a norm of at most `most`; the norm that they had, over all shares of them.

    Not accelerate's ``clip_grad_norm_``: it knows the models that it has sharded itself, and unscales the float16
    gradients of any other twice.
    """
    accelerator.unscale_gradients(optimizer)  # of float16; does nothing else
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), most), keep=True)
    return norm


def whole(tensor: Any, keep: bool) -> Any:
    """The tensor itself, or a DTensor's whole on the CPU; every process takes part, those that `keep` it get it."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    full = tensor.detach().full_tensor()
    return full.cpu() if keep else None


def whole_draft(draft: DraftNetwork, keep: bool) -> dict[str, torch.Tensor]:
    """Every weight of the draft by its public name, the embedding included; every process calls this."""
    return {name: whole(tensor, keep) for name, tensor in draft.state_dict().items()}


def whole_optimizer(optimizer: Any, keep: bool) -> dict[str, Any]:
    """``optimizer.state_dict()`` with whole tensors, as one process on a CPU would write it; every process calls this.

    A card's tensor is pickled as the card's plugin likes, torch_npu 2.7.1's and 2.8.0's by a function of their own, and
    would be read on such cards alone.
    """

    def kept(value: Any) -> Any:
        if not torch.is_tensor(value):
            return value
        value = whole(value, keep)
        return value.detach().cpu() if keep else None

    found = optimizer.state_dict()
    state = {number: {name: kept(value) for name, value in values.items()} for number, values in found["state"].items()}
    return {**found, "state": state}
