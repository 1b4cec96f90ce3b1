"""Which FSDP is taken, by what accelerate's launcher left in the environment; how gradients are clipped."""

from types import SimpleNamespace

import pytest
import torch

from eagle.errors import RequestError
from eagle.releases import TORCH
from eagle.train.sharding import check_sharding, clip, is_sharded


@pytest.mark.parametrize("environment", [{}, {"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "1"}])
def test_not_asked_for(environment):
    assert not is_sharded(environment)
    check_sharding(environment)


@pytest.mark.skipif(TORCH < (2, 6), reason="FSDP version 2 came with torch 2.6")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "fsdp_version 1"),
        ({"FSDP_VERSION": "1"}, "configs/fsdp.yaml"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
    ],
)
def test_what_is_not_there_is_refused(more, message):
    environment = {"ACCELERATE_USE_FSDP": "true", **more}
    assert is_sharded(environment)
    with pytest.raises(RequestError, match=message):
        check_sharding(environment)


@pytest.mark.skipif(TORCH < (2, 6), reason="FSDP version 2 came with torch 2.6")
def test_a_base_model_is_loaded_by_every_process():
    """transformers leaves it empty in all but the first where accelerate's config has its default."""
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    check_sharding(environment)  # a store's features are whole in every process
    with pytest.raises(RequestError, match=r"fsdp_cpu_ram_efficient_loading true .* Set it to false"):
        check_sharding(environment, loads_base=True)
    check_sharding(environment | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}, loads_base=True)


def test_an_old_torch_is_refused_with_what_is_needed_whatever_an_old_accelerate_passes_on(monkeypatch):
    """accelerate before 1.6 knows no version, and would be told to use the very file that it was given."""
    monkeypatch.delattr("torch.distributed.fsdp.fully_shard", raising=False)
    with pytest.raises(RequestError, match=r"FSDP needs torch 2\.6 and accelerate 1\.6 or newer; these are "):
        check_sharding({"ACCELERATE_USE_FSDP": "true"})


@pytest.mark.skipif(TORCH < (2, 3), reason="a CPU's gradient scaler came with torch 2.3")
@pytest.mark.parametrize(("most", "left"), [(1.0, 1.0), (10.0, 5.0), (float("inf"), 5.0)])
def test_gradients_are_clipped_as_they_are_without_their_scale(most, left):
    """With a scaler as float16 has one, which refuses to unscale twice."""
    model = torch.nn.Linear(2, 1, bias=False)
    frozen = torch.nn.Linear(2, 1).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    accelerator = SimpleNamespace(unscale_gradients=scaler.unscale_)
    scaler.scale(model(torch.tensor([[3.0, 4.0]])).sum()).backward()
    before = model.weight.detach().clone()
    norm = clip(accelerator, torch.nn.ModuleList([model, frozen]), optimizer, most)
    assert norm.item() == pytest.approx(5.0)
    scaler.step(optimizer)
    assert (before - model.weight).norm().item() == pytest.approx(left, rel=1e-5)
