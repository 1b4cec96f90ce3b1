"""accelerate's part of a run: the device of each process, the precision, and where the run is reported to."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version

from accelerate import Accelerator, PartialState
from accelerate.utils import GradientAccumulationPlugin

from eagle import device
from eagle.errors import RequestError
from eagle.train.launch_check import check_launch, check_mode, check_precision
from eagle.train.options import TrainOptions
from eagle.train.sharding import check_sharding


def make_accelerator(options: TrainOptions) -> Accelerator:
    """Raises: RequestError for fewer processes than asked for, a tracker that is not installed, or a precision, FSDP of
    a kind or another way to share the work that is not there."""
    check_mode()
    kind = device.choose_kind()
    check_launch(kind)
    check_sharding(loads_base=options.data_path is not None and not options.is_engine)
    if not options.dry_run:  # which may plan for another machine's card
        check_precision(kind)
    tracker = None if options.report_to == "none" else options.report_to
    if tracker and importlib.util.find_spec(tracker) is None:
        raise RequestError(f"--report_to {tracker}: it is not installed here; pip install {tracker}, or leave it out.")
    on_cpu = kind == "cpu"
    try:
        accelerator = Accelerator(
            cpu=on_cpu, log_with=tracker, project_dir=str(options.run_folder) if tracker else None,
            # Micro-batches are added up by the loop; a number in the environment would divide their losses once more.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )  # fmt: skip
    except ValueError as error:
        raise RequestError(f"accelerate cannot run as it was asked to: {error}") from error
    scaler = accelerator.scaler
    if scaler is not None and not scaler.is_enabled():  # accelerate 1.6's with FSDP, which knows CUDA alone
        raise RequestError(
            f"--mixed_precision=fp16: accelerate {version('accelerate')} does not scale the loss on {kind} devices "
            "with FSDP, without which small gradients vanish. Update accelerate, or train with --mixed_precision=bf16."
        )
    for state in (PartialState(), accelerator.state):  # the second is made anew from the first, whoever asks for it
        state.device = device.with_index(accelerator.device)
    return accelerator


def end_training(accelerator: Accelerator) -> None:
    """What is to be done once every process is; each then ends by itself (`eagle.train.main.leave`).

    A gloo group is not destroyed: torch 2.1 joins its threads while it holds the interpreter, for which such a thread
    may wait to let go of a tensor. Now and then a process would hang for ever.
    """
    if accelerator.device.type != "cpu":
        accelerator.end_training()
        return
    for tracker in accelerator.trackers:
        tracker.finish()
