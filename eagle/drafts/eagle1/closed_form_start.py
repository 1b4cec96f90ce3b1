"""The best linear draft, in one pass: ridge regression from ``[embed(x[t+1]), f[t]]`` to ``f[t+1]``.

Its weights become ``fc``; ``o_proj`` and ``down_proj`` start at zero, so that the untrained layer passes ``fc``'s
output through and training starts from that linear draft instead of from noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from eagle.device import free_memory, synchronize
from eagle.drafts.eagle1.network import Eagle1Network
from eagle.drafts.eagle1.normal_equations import NormalEquations, products_dtype, solve
from eagle.drafts.memory import Setting
from eagle.drafts.network import DraftNetwork
from eagle.drafts.starts import StartData
from eagle.errors import FailedElsewhere, RequestError

#: Rows of the matrices that are multiplied and solved to see how quick this machine is.
PROBE = 1024
#: Share of different tokens among the positions that are gathered, about as in text.
DIFFERENT = 0.3


def closed_form(network: DraftNetwork, data: StartData) -> str:
    """Make `network` the best linear draft of all processes' examples, each taking its share of them.

    Solved on the main process, which all others wait for. What fails on one process ends all of them.

    Raises: RequestError where no position is supervised; WorkError for features that are not finite or equations
    without a solution; FailedElsewhere where another process failed.
    """
    assert isinstance(network, Eagle1Network)
    started = time.monotonic()
    equations, failure = None, None
    try:
        equations = own_sums(network, data)
    except Exception as error:  # told to the others, who would wait for this process, and raised again
        failure = error
    positions, failed = data.count(equations.positions if equations else 0, int(failure is not None))
    if equations is None:
        assert failure is not None
        raise failure
    if failed:
        raise FailedElsewhere(
            f"{failed} other process(es) failed in the closed-form start; their own messages say why."
        )
    if not positions:
        raise RequestError(
            f"No position of the training records is supervised within --max_len {data.max_len} tokens: every reply "
            "comes later. Raise --max_len."
        )
    summed = time.monotonic()
    start_from(network)
    sums = equations.collect(data.reduce)
    weight = network.fc.weight.detach()
    if sums is not None:
        try:
            weight.copy_(solve(*sums).to(weight.dtype))  # on the CPU: an NPU may take no float64
        except Exception as error:
            failure = error
            weight.fill_(float("nan"))  # by which the others know
    del sums
    data.broadcast(weight)
    if failure is not None:
        raise failure
    if not bool(weight.isfinite().all()):
        raise FailedElsewhere("The main process found no solution for the closed-form start; its own message says why.")
    ended = time.monotonic()
    return (
        f"closed-form start from {positions:,} positions in {ended - started:.1f} s (sums {summed - started:.1f} s, "
        f"solution {ended - summed:.1f} s)"
    )


def own_sums(network: Eagle1Network, data: StartData) -> NormalEquations:
    """This process's share of the sums. Raises: WorkError for features that are not finite."""
    equations = NormalEquations(network, data.device)
    for example in data.examples:
        equations.add(example)
        if equations.positions >= data.positions:
            break
    equations.flush()
    return equations


def expected_seconds(setting: Setting, device: torch.device) -> dict[str, float]:
    """What the start's parts will take here besides reading the records, by a short probe of the products and of a
    small solution; empty where the draft starts otherwise, or where the card has no room for the probe."""
    if setting.init != "closed_form":
        return {}
    size, side = setting.config.hidden_size, PROBE if device.type == "cpu" else 4 * PROBE
    # On and above the diagonal of XᵀX, and XᵀY. A CPU multiplies the different tokens' embeddings only.
    squares = 1.5 + 2.5 * DIFFERENT if device.type == "cpu" else 4
    operations = 2 * squares * size**2 * setting.init_positions / setting.processes
    # The matrix, its product, and as much again for what a product takes.
    if device.type != "cpu" and free_memory(device) < 4 * side**2 * products_dtype(device).itemsize:
        return {}
    one = torch.zeros(side, side, dtype=products_dtype(device), device=device)
    sums = operations * least_seconds(lambda: one @ one, device) / (2 * side**3)
    host = torch.device("cpu")

    def solve_small() -> None:
        solve(torch.eye(PROBE, dtype=torch.float64), torch.zeros(PROBE, PROBE // 2, dtype=torch.float64))

    solution = least_seconds(solve_small, host) * (2 * size / PROBE) ** 3
    return {"sums": sums, "solution": solution}


def least_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes: the quickest of three times, after one to warm up."""
    found = []
    for _ in range(4):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found[1:])


@torch.no_grad()
def start_from(model: Eagle1Network, fc_weight: torch.Tensor | None = None) -> None:
    """Make `model` the linear draft of `fc_weight`: its layer changes nothing until it is trained."""
    if fc_weight is not None:
        model.fc.weight.copy_(fc_weight)
    layer = model.layer
    for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
        nn.init.zeros_(linear.weight)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
