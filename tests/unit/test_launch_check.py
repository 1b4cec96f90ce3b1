"""One process where several were asked for is refused; one thread where there are cores is remarked on."""

import re

import pytest

from eagle.errors import RequestError
from eagle.train.group import meet
from eagle.train.launch_check import check_launch, check_mode, check_precision, launch_notes

#: What ``accelerate launch --cpu --num_processes 2`` gives to the one process it starts.
ALONE = {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no"}

BY_ACCELERATE = {"ACCELERATE_DYNAMO_BACKEND": "NO", "OMP_NUM_THREADS": "1"}
BY_TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "OMP_NUM_THREADS": "1"}


def test_one_process_for_several_is_refused():
    with pytest.raises(RequestError, match="started this one only") as refusal:
        check_launch("cpu", ALONE, ["--tmpdir", "a b", "--bs", "2"])
    last = str(refusal.value).splitlines()[-1]
    assert last == "torchrun --standalone --nproc_per_node N -m eagle.train.main --tmpdir 'a b' --bs 2"


def test_the_line_to_type_keeps_the_precision():
    with pytest.raises(RequestError, match="\nACCELERATE_MIXED_PRECISION=bf16 torchrun "):
        check_launch("cpu", {**ALONE, "ACCELERATE_MIXED_PRECISION": "bf16"}, [])


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"ACCELERATE_USE_CPU": "True"},  # one process was asked for
        {"MASTER_ADDR": "127.0.0.1"},  # somebody's shell
        {**ALONE, "WORLD_SIZE": "2"},  # of torchrun's group
        {**ALONE, "OMPI_COMM_WORLD_SIZE": "2"},  # of mpirun's
    ],
)
def test_what_was_asked_for_is_let_through(environment):
    check_launch("cpu", environment, [])


def test_the_address_in_the_shell_of_one_card_is_let_be():
    """accelerate's launcher says of every process whether it is to be on a CPU."""
    for kind in ("cuda", "npu"):
        check_launch(kind, {**ALONE, "ACCELERATE_USE_CPU": "False"}, [])
        with pytest.raises(RequestError, match="started this one only"):  # as --cpu asks for
            check_launch(kind, ALONE, [])
    with pytest.raises(RequestError, match="started this one only"):
        check_launch("cpu", {**ALONE, "ACCELERATE_USE_CPU": "False"}, [])


@pytest.mark.parametrize(
    ("name", "mode"),
    [("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM"), ("PARALLELISM_CONFIG", "a parallelism config")],
)
def test_other_ways_to_share_the_work_are_refused(name, mode, monkeypatch):
    """Before a group is made, which may need what is not installed."""
    variable = f"ACCELERATE_USE_{name}"
    check_mode({})
    check_mode({variable: "false"})
    with pytest.raises(RequestError, match=rf"told to use {mode} \({variable}=true\).*configs/fsdp\.yaml"):
        check_mode({variable: "true"})
    monkeypatch.setenv(variable, "true")
    with pytest.raises(RequestError, match=mode), meet({"WORLD_SIZE": "2"}):
        pass


def test_a_precision_that_is_not_there():
    for kind, precision in (("cpu", "bf16"), ("cpu", "no"), ("cuda", "fp16"), ("npu", "fp16")):
        check_precision(kind, {"ACCELERATE_MIXED_PRECISION": precision})
    check_precision("cpu", {})
    on_cpu = {"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_CPU": "True"}
    for kind, environment in (("cpu", {"ACCELERATE_MIXED_PRECISION": "FP16"}), ("cuda", on_cpu)):
        with pytest.raises(RequestError, match="fp16: expected bf16 or no on a CPU"):
            check_precision(kind, environment)
    with pytest.raises(RequestError, match=r"fp8: .*expected bf16, fp16 or no"):
        check_precision("cuda", {"ACCELERATE_MIXED_PRECISION": "fp8"})


@pytest.mark.parametrize(
    ("environment", "change"),
    [
        (BY_ACCELERATE, "accelerate launch gives .* --num_cpu_threads_per_process 8 "),
        (BY_TORCHRUN, "torchrun gives .* OMP_NUM_THREADS=8 "),
        ({**BY_TORCHRUN, "LOCAL_WORLD_SIZE": "2"}, "OMP_NUM_THREADS=4 "),
        ({**BY_TORCHRUN, "ACCELERATE_MIXED_PRECISION": "bf16"}, "OMP_NUM_THREADS=8 "),  # the precision set by hand
        ({**BY_TORCHRUN, **BY_ACCELERATE}, "--num_cpu_threads_per_process 8 "),  # which starts FSDP through torchrun
    ],
)
def test_one_thread_is_remarked_on(environment, change):
    (note,) = launch_notes("cpu", environment, available=8)
    assert re.search(change, note)


@pytest.mark.parametrize(
    ("kind", "environment"),
    [
        ("cuda", BY_ACCELERATE),
        ("cpu", {"OMP_NUM_THREADS": "1"}),  # started by hand
        ("cpu", {**BY_ACCELERATE, "OMP_NUM_THREADS": "4"}),
        ("cpu", {"ACCELERATE_DYNAMO_BACKEND": "NO"}),
        ("cpu", {**BY_TORCHRUN, "LOCAL_WORLD_SIZE": "8"}),  # there is no core to spare
    ],
)
def test_nothing_to_remark_on(kind, environment):
    assert launch_notes(kind, environment, available=8) == []
