"""The engine of a run whose features come from one (``--feature_source vllm``).

A machine has one, on cards of its own, which the machine's processes share: the first of them starts it, and the others
are told where it is. It ends with the process that started it.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator

from eagle import device
from eagle.errors import RequestError
from eagle.generate.engine_check import check_engine as check_request
from eagle.generate.engine_check import vllm_of
from eagle.generate.engine_process import Address, EngineProcess, RemoteEngine
from eagle.generate.source_options import SourceOptions
from eagle.target.config import ModelConfig
from eagle.train.group import Group
from eagle.train.live_features import LiveFeatures
from eagle.train.options import TrainOptions

#: In ``--engine_args``: the share of a card that vLLM takes, nine tenths where nobody says.
_SHARE = "gpu_memory_utilization"


def check_engine(options: TrainOptions, target: ModelConfig, where: torch.device) -> str:
    """The release of the engine that is to compute this target's features. where: this process trains.

    Raises: RequestError for a target, an interpreter or cards that will not do.
    """
    check_request(target, options.engine.arguments, options.max_len, "--max_len")
    cards, kind = options.engine_cards, where.type
    if kind == "cpu":
        if cards:
            raise RequestError(
                "--engine_cards: this is a CPU, whose cores the engine shares with training. Leave it out; "
                "--tensor_parallel_size says how many processes the engine has."
            )
    elif cards is None:
        raise RequestError(
            "--feature_source vllm needs --engine_cards: the cards of the engine, which training does not use, e.g. "
            '--engine_cards "4,5,6,7" where training has four processes on cards 0 to 3.'
        )
    else:
        _check_shown(kind, cards)
        device.check_indices(kind, cards, "--engine_cards")
        own = _card_of(where)
        if own in map(str, cards) and _SHARE not in options.engine.arguments:
            raise RequestError(
                f"--engine_cards {','.join(map(str, cards))}: card {own} is one that trains here. Name others, or say "
                f"""how much of it the engine may take: --engine_args '{{"{_SHARE}": 0.4}}'."""
            )
    return vllm_of(_python(options), options.engine, kind)


def _check_shown(kind: str, cards: Sequence[device.Card]) -> None:
    """Raises: RequestError for cards that only this process does not see: others than those it trains on are wanted."""
    variable = device.VISIBILITY_VARIABLE[kind]
    shown = [entry.strip() for entry in os.environ.get(variable, "").split(",") if entry.strip()]
    if hidden := [str(card) for card in cards if shown and str(card) not in shown]:
        raise RequestError(
            f"--engine_cards {','.join(map(str, cards))}: {variable}={','.join(shown)} hides {','.join(hidden)}. Show "
            "training the engine's cards too (without --gpu_ids, for example): --num_processes says how many it uses, "
            "the first ones."
        )


def _python(options: TrainOptions) -> Path:
    return options.engine_python or Path(sys.executable)


def _card_of(where: torch.device) -> str:
    """The name of a card of this process for everybody."""
    index = device.with_index(where).index
    shown = [entry.strip() for entry in os.environ.get(device.VISIBILITY_VARIABLE[where.type], "").split(",")]
    return shown[index] if any(shown) and index < len(shown) else str(index)


def describe_engine(options: TrainOptions, version: str) -> str:
    """What will compute the features."""
    engine = options.engine
    place = f"cards {','.join(map(str, options.engine_cards))}" if options.engine_cards else "this CPU"
    return (
        f"features from vLLM {version} ({_python(options)}) on {place}, --tensor_parallel_size "
        f"{engine.tensor_parallel_size}, --pipeline_parallel_size {engine.pipeline_parallel_size}"
    )


@contextmanager
def shared_engine(
    options: TrainOptions, accelerator: Accelerator, live: LiveFeatures, group: Group
) -> Iterator[RemoteEngine]:
    """The engine of this machine, ready to be asked. Every process of the group has to call.

    Raises: WorkError with its last words where it does not start.
    """
    starts, rank = accelerator.is_local_main_process, accelerator.process_index
    with ExitStack() as held:

        def start() -> EngineProcess | None:
            if not starts:
                return None
            engine = _start(options, accelerator, live)
            held.callback(engine.close)
            return engine

        own = group.ready(start)
        told = group.gather(dataclasses.asdict(own.address) if own else None)
        # Of those on this machine the nearest before this process, should two machines have one name.
        where = next(Address(**at) for host, at in reversed(told[: rank + 1]) if at and host == told[rank][0])
        group.ready(lambda: own.wait_until_ready() if own else None)
        yield own.source if own else RemoteEngine(where)


def _start(options: TrainOptions, accelerator: Accelerator, live: LiveFeatures) -> EngineProcess:
    kind, rank = accelerator.device.type, accelerator.process_index
    longest = int(live.lengths.max())
    asked = SourceOptions(
        options.base,
        live.dtype,
        device.torch_device(kind),
        tuple(live.widths),
        longest=longest,
        engine=options.engine,
    )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    batch = options.bs * longest * sum(live.widths.values()) * live.dtype.itemsize
    return EngineProcess(
        asked,
        options.feature_source,
        _python(options),
        device.worker_environment(kind, options.engine_cards or (0,), 1),
        log_of(options, rank),
        room=batch * max(1, options.loader_threads(kind)) * here,
    )


def log_of(options: TrainOptions, rank: int) -> Path:
    """What the engine says that this rank starts."""
    return options.run_folder / (f"engine-{rank}.log" if rank else "engine.log")
