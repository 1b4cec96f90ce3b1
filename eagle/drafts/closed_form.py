"""What the closed-form starts of all families share: sums over every process's examples, one solution, for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from eagle.device import free_memory, synchronize
from eagle.drafts.memory import Phase, Setting
from eagle.drafts.normal_equations import (
    EXCHANGED,
    GATHERED,
    NormalEquations,
    Sizes,
    products_bytes,
    products_dtype,
    solve,
    sums_bytes,
)
from eagle.drafts.starts import StartData
from eagle.errors import FailedElsewhere, RequestError

#: Rows of the matrices that are multiplied and solved to see how quick this machine is.
PROBE = 1024
#: Share of different tokens among the positions that are gathered, about as in text.
DIFFERENT = 0.3

#: Both sums, which it may overwrite -> the values of the weights that are fitted, in their order.
Solution = Callable[[torch.Tensor, torch.Tensor], Sequence[torch.Tensor]]


def fit(
    weights: Sequence[torch.Tensor], data: StartData, equations: Callable[[], NormalEquations], solution: Solution
) -> str:
    """Give `weights`, the same on every process, the values that `solution` finds for all processes' examples, each
    summing its share of them. What it did, for people.

    Solved on the main process, which all others wait for. What fails on one process ends all of them.

    Raises: RequestError where no position is supervised; WorkError for features that are not finite or equations
    without a solution; FailedElsewhere where another process failed.
    """
    started = time.monotonic()
    found, failure = None, None
    try:
        found = own_sums(equations(), data)
    except Exception as error:  # told to the others, who would wait for this process, and raised again
        failure = error
    positions, failed = data.count(found.positions if found else 0, int(failure is not None))
    if found is None:
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
    sums = found.collect(data.reduce)
    weights = [weight.detach() for weight in weights]
    if sums is not None:
        try:
            for weight, value in zip(weights, solution(*sums), strict=True):
                weight.copy_(value.to(weight.dtype))  # on the CPU: an NPU may take no float64
        except Exception as error:
            failure = error
            weights[0].fill_(float("nan"))  # by which the others know
    del sums
    for weight in weights:
        data.broadcast(weight)
    if failure is not None:
        raise failure
    if not all(bool(weight.isfinite().all()) for weight in weights):
        raise FailedElsewhere("The main process found no solution for the closed-form start; its own message says why.")
    ended = time.monotonic()
    return (
        f"closed-form start from {positions:,} positions in {ended - started:.1f} s (sums {summed - started:.1f} s, "
        f"solution {ended - summed:.1f} s)"
    )


def own_sums(equations: NormalEquations, data: StartData) -> NormalEquations:
    """This process's share of the sums. Raises: WorkError for features that are not finite."""
    for example in data.examples:
        equations.add(example)
        if equations.positions >= data.positions:
            break
    equations.flush()
    return equations


def expected_seconds(setting: Setting, sizes: Sizes, device: torch.device) -> dict[str, float]:
    """What the start's parts will take here besides reading the records, by a short probe of the products and of a
    small solution; empty where the draft starts otherwise, or where the card has no room for the probe."""
    if setting.init != "closed_form":
        return {}
    side = PROBE if device.type == "cpu" else 4 * PROBE
    # The matrix, its product, and as much again for what a product takes.
    if device.type != "cpu" and free_memory(device) < 4 * side**2 * products_dtype(device).itemsize:
        return {}
    one = torch.zeros(side, side, dtype=products_dtype(device), device=device)
    operations = products(sizes, by_token=device.type == "cpu") * setting.init_positions / setting.processes
    sums = operations * least_seconds(lambda: one @ one, device) / (2 * side**3)
    host = torch.device("cpu")

    def solve_small() -> None:
        solve(torch.eye(PROBE, dtype=torch.float64), torch.zeros(PROBE, PROBE // 2, dtype=torch.float64))

    solution = least_seconds(solve_small, host) * (sizes.inputs / PROBE) ** 3
    return {"sums": sums, "solution": solution}


def products(sizes: Sizes, *, by_token: bool) -> float:
    """Operations a position: on and above the diagonal of ``XᵀX``, and ``XᵀY``; the token's rows only for different
    tokens where that is how they are multiplied."""
    read = sizes.read * (sizes.read / 2 + sizes.target)
    token = sizes.token * (sizes.token / 2 + sizes.read + sizes.target)
    return 2 * (read + (DIFFERENT if by_token else 1) * token)


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


def start_phases(setting: Setting, sizes: Sizes, workspace: int) -> list[Phase]:
    """What the start holds on the device; the last phase on the main process alone. workspace: of the solution, beside
    the sums."""
    if setting.init != "closed_form":
        return []
    on_cpu = setting.kind == "cpu"
    positions = min(GATHERED, setting.init_positions) + setting.max_len
    products = products_bytes(sizes, positions, setting.config.vocab_size, setting.base_dtype, on_cpu=on_cpu)
    sums, exchanged = {"sums": sums_bytes(sizes)}, {}
    if setting.processes > 1:  # NPUs receive what all have, having no float64 to add it in
        parts = setting.processes + 1 if setting.kind == "npu" else 2
        exchanged = {"parts of other processes' sums": parts * min(EXCHANGED, sums_bytes(sizes))}
    phases = [
        Phase("start: normal equations", {**sums, "products": products}),
        Phase("start: their exchange", {**sums, **exchanged}),
    ]
    if on_cpu:
        phases.append(Phase("start: their solution", {**sums, "solver's workspace": workspace}))
    return phases


def start_host_bytes(setting: Setting, sizes: Sizes, workspace: int) -> dict[str, int]:
    """Where the device is not the host: the sums on the main process, and gathered positions on every one."""
    if setting.init != "closed_form":
        return {}
    positions = min(GATHERED, setting.init_positions) + setting.max_len
    return {
        "closed-form start, on the main process": sums_bytes(sizes) + workspace,
        "positions gathered for it": 2 * positions * (sizes.read + sizes.target) * setting.base_dtype,
    }
