"""Choosing the device and giving workers their cards, on simulated accelerators."""

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState

from eagle import ascend, device, streams
from eagle.errors import RequestError
from eagle.files import ROOT
from eagle.releases import TORCH
from eagle.train.accelerator import make_accelerator
from eagle.train.options import TrainOptions
from tests.cards import HIDDEN, shown


@pytest.fixture(autouse=True)
def fresh():
    """Nothing is known yet of this machine's torch_npu."""
    cached = (ascend.failure, device.npu_trouble, device._say)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def npu(monkeypatch):
    """A machine with torch_npu and four cards, as far as torch can tell."""
    module = types.ModuleType("torch_npu")
    module.__spec__ = types.SimpleNamespace(name="torch_npu")
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    fake = types.SimpleNamespace(is_available=lambda: True, device_count=lambda: 4, current_device=lambda: 2)
    monkeypatch.setattr(torch, "npu", fake, raising=False)
    for variable in device.VISIBILITY_VARIABLE.values():
        monkeypatch.delenv(variable, raising=False)
    return fake


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_without_accelerators_it_is_the_cpu():
    assert device.choose_kind() == "cpu"
    assert device.torch_device("cpu", 3) == torch.device("cpu")


#: torch_npu on a machine whose cards can be hidden.
WITH_CARDS = """
import os, types, torch
cards = 0 if os.environ.get("ASCEND_RT_VISIBLE_DEVICES") == "" else 2
torch.npu = types.SimpleNamespace(is_available=lambda: cards > 0, device_count=lambda: cards)
"""


def test_the_tests_see_no_cards(tmp_path):
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu" / "__init__.py").write_text(WITH_CARDS)
    environment = shown() | {"PYTHONPATH": str(tmp_path)}
    choice = [sys.executable, "-c", "from eagle import device; print(device.choose_kind())"]
    options: dict = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
    assert subprocess.run(choice, env=environment, **options).stdout.strip() == "npu"
    assert subprocess.run(choice, env=environment | HIDDEN, **options).stdout.strip() == "cpu"
    one = f"{Path(__file__).relative_to(ROOT)}::test_without_accelerators_it_is_the_cpu"
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", one], env=environment, **options)


def test_npu_comes_before_cuda_and_cuda_before_cpu(cuda, npu, monkeypatch):
    assert device.choose_kind() == "npu"
    assert device.choose_kind("cuda") == "cuda"
    assert device.choose_kind("cpu") == "cpu"
    monkeypatch.setattr(npu, "is_available", lambda: False)
    assert device.choose_kind() == "cuda"


@pytest.mark.parametrize("kind", ["npu", "cuda"])
def test_absent_device_asked_for_by_name(kind):
    with pytest.raises(RequestError, match=f"--device {kind}: this process sees no such device"):
        device.choose_kind(kind)


@pytest.fixture
def broken_npu(tmp_path, monkeypatch):
    """torch_npu where CANN's set_env.sh was not sourced."""
    why = "libhccl.so: cannot open shared object file: No such file or directory"
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu" / "__init__.py").write_text(f"raise ImportError({why!r})")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    yield
    sys.modules.pop("torch_npu", None)


def test_an_npu_whose_libraries_are_not_found_is_a_note(broken_npu, capsys):
    assert device.choose_kind() == "cpu"
    said = capsys.readouterr().err
    assert (
        said.startswith("note: torch_npu is installed and cannot be used: libhccl.so: cannot open") and "source" in said
    )


def test_an_npu_whose_libraries_are_not_found_and_that_was_asked_for(broken_npu):
    with pytest.raises(RequestError, match=r"--device npu: torch_npu is installed and cannot.*set_env\.sh"):
        device.choose_kind("npu")


def test_libraries_are_kept_from_importing_what_cannot_be(broken_npu):
    assert ascend.is_installed()
    ascend.guard()
    assert not ascend.is_installed() and importlib.util.find_spec("torch_npu") is None
    assert "libhccl.so" in ascend.failure()


def test_a_driver_that_answers_with_an_error(npu, monkeypatch, capsys):
    def is_available():
        raise RuntimeError("aclrtGetDeviceCount, error code is 507899\n[Error]: driver")

    monkeypatch.setattr(npu, "is_available", is_available)
    with pytest.raises(RequestError, match=r"--device npu: torch_npu finds no card: aclrtGetDeviceCount.*npu-smi info"):
        device.choose_kind("npu")
    assert device.choose_kind() == "cpu"
    assert "note: torch_npu finds no card" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ("0,1,2,3", None),
        ("4", None),
        ("-1", None),
        ("3,1,2", "does not ascend at 1.*export ASCEND_RT_VISIBLE_DEVICES=1,2,3"),
        ("0,1,1", "repeats 1.*export ASCEND_RT_VISIBLE_DEVICES=0,1"),
        ("0, 1", "' 1' is no card number.*export ASCEND_RT_VISIBLE_DEVICES=0,1"),
        ("0-3", "'0-3' is no card number.*e.g. 0,1,2,3"),
    ],
)
def test_a_list_of_visible_cards_that_the_runtime_would_not_read_to_its_end(npu, monkeypatch, value, wrong):
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", value)
    monkeypatch.setattr(npu, "device_count", lambda: len(value.split(",")))
    assert device.choose_kind("cpu") == "cpu"
    if wrong is None:
        assert device.choose_kind() == "npu"
        return
    for requested in ("auto", "npu"):
        with pytest.raises(RequestError, match=wrong):
            device.choose_kind(requested)


def test_a_visible_card_that_is_not_there(npu, monkeypatch):
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,1,2,3,9")
    with pytest.raises(RequestError, match="names 5 cards, and Ascend's runtime sees 4"):
        device.choose_kind()


def test_no_card_at_all(npu, monkeypatch, capsys):
    monkeypatch.setattr(npu, "is_available", lambda: False)
    with pytest.raises(RequestError, match=r"--device npu: torch_npu finds no card\. See that npu-smi info.*davinci"):
        device.choose_kind("npu")
    assert device.choose_kind() == "cpu" and "note: torch_npu finds no card. See" in capsys.readouterr().err
    device.npu_trouble.cache_clear()
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "4,5")
    with pytest.raises(RequestError, match=r"VISIBLE_DEVICES=4,5 names 2 cards, and .* sees 0.*unset ASCEND"):
        device.choose_kind()
    for hidden in ("", "-1"):  # by the user's own wish, of which there is nothing to say
        device.npu_trouble.cache_clear()
        monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", hidden)
        assert device.choose_kind() == "cpu" and not capsys.readouterr().err


def test_npus_without_infinity_are_warned_of_once(npu, monkeypatch, capsys):
    monkeypatch.setenv("INF_NAN_MODE_ENABLE", "0")
    device.choose_kind("cpu")
    assert not capsys.readouterr().err
    assert [device.choose_kind(kind) for kind in ("auto", "npu")] == ["npu", "npu"]
    said = capsys.readouterr().err
    assert said.startswith("warning: INF_NAN_MODE_ENABLE=0 ") and said.count("unset INF_NAN_MODE_ENABLE") == 1
    monkeypatch.setenv("INF_NAN_MODE_ENABLE", "1")
    assert ascend.hidden_overflow() is None


def test_notes_are_of_one_process_of_a_machine(npu, monkeypatch, capsys):
    monkeypatch.setenv("INF_NAN_MODE_ENABLE", "0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device.choose_kind() == "npu" and not capsys.readouterr().err


def test_unknown_device():
    with pytest.raises(RequestError, match="--device tpu"):
        device.choose_kind("tpu")


def test_cards_that_do_not_exist(npu):
    device.check_indices("npu", [0, 3])
    with pytest.raises(RequestError, match=r"names card 4, 9, but this machine has 4 npu card"):
        device.check_indices("npu", [0, 4, 9])


def test_cards_that_the_shell_hides(npu, monkeypatch):
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "4,5")
    device.check_indices("npu", [5])
    with pytest.raises(RequestError, match="ASCEND_RT_VISIBLE_DEVICES=4,5"):
        device.check_indices("npu", [0])


def test_indices_number_workers_on_a_cpu():
    device.check_indices("cpu", [0, 99])


@pytest.mark.parametrize("kind", ["cpu", "npu"])
def test_uuids_are_cudas(npu, kind):
    with pytest.raises(RequestError, match=f"GPU-a, which is the UUID of a CUDA card, but the job runs on the {kind}"):
        device.check_indices(kind, [0, "GPU-a"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77", True),
        ("GPU-5d5b", True),
        ("MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f", True),
        ("MIG-GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77/1/0", True),
        ("GPU-", False),
        ("gpu-5d5b", False),
        ("GPU-5d5b;rm", False),
        ("0", False),
    ],
)
def test_what_a_uuid_looks_like(name, expected):
    assert device.is_uuid(name) is expected


def test_worker_environment(monkeypatch):
    monkeypatch.setattr("eagle.device.cores", lambda: 8)
    assert device.worker_environment("npu", [4, 5], 2) == {"ASCEND_RT_VISIBLE_DEVICES": "4,5"}
    assert device.worker_environment("npu", [5, 4], 2) == {"ASCEND_RT_VISIBLE_DEVICES": "4,5"}, "in ascending order"
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert device.worker_environment("cuda", [1], 2) == order | {"CUDA_VISIBLE_DEVICES": "1"}
    assert device.worker_environment("cuda", ["GPU-b", 0], 1) == order | {"CUDA_VISIBLE_DEVICES": "GPU-b,0"}
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    pages = {"THP_MEM_ALLOC_ENABLE": "1"}
    assert device.worker_environment("cpu", [0], 1) == pages
    assert device.worker_environment("cpu", [0], 4) == pages | {"OMP_NUM_THREADS": "2"}
    assert device.worker_environment("cpu", [0], 99) == pages | {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")  # somebody's own wish
    assert device.worker_environment("cpu", [0], 1) == {"THP_MEM_ALLOC_ENABLE": "0"}


def test_what_reports_say_about_the_machine():
    cpu = torch.device("cpu")
    assert device.describe(cpu).startswith("cpu ") and "thread" in device.describe(cpu)
    assert 1e7 < device.peak_memory(cpu) <= device.process_peak()  # bytes; it grows while it is read
    assert device.process_peak(1 << 30) == 0  # no such process
    device.synchronize(cpu)


FAULTS = """
import resource, torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.empty(16 << 20).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
#: The same of memory that asks for large pages by itself: whether the kernel has any to give now.
ASKED = """
import mmap, resource
memory = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for page in range(0, len(memory), mmap.PAGESIZE):
    memory[page] = 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(TORCH < (2, 2), reason="torch takes large pages from 2.2 on")
@pytest.mark.skipif(not PAGES.is_file() or "[madvise]" not in PAGES.read_text(), reason="all pages are of one size")
def test_a_worker_on_a_cpu_takes_large_pages():
    def faults(code: str, variables: dict[str, str]) -> int:
        words, environment = [sys.executable, "-c", code], os.environ | variables
        return int(subprocess.run(words, env=environment, capture_output=True, check=True, text=True).stdout)

    small = faults(FAULTS, {device.HUGE_PAGES: "0"})
    if faults(ASKED, {}) > small / 8:
        pytest.skip("the kernel has too few large pages to give: its page cache is full of files")
    assert faults(FAULTS, device.worker_environment("cpu", [0], 1)) < small / 4


@pytest.fixture
def asked(monkeypatch):
    """What a backend was asked about: devices, which have a number."""
    given = []

    def ask(name, answer=None):
        def function(place):
            if place.index is None:
                raise ValueError("Expected a torch.device with a specified index")
            given.append((name, place.index))
            return answer

        return function

    fake = types.SimpleNamespace(
        current_device=lambda: 2,
        set_device=ask("set_device"),
        mem_get_info=ask("mem_get_info", (5, 9)),
        synchronize=ask("synchronize"),
        max_memory_allocated=ask("max_memory_allocated", 7),
        get_device_name=ask("get_device_name", "Card"),
        Stream=ask("Stream", "stream"),
        current_stream=ask("current_stream"),
        Event=lambda enable_timing: types.SimpleNamespace(record=lambda stream: None),
    )
    for module in (device, streams):
        monkeypatch.setattr(module, "backend_of", lambda kind: fake)
    return given


def test_a_device_without_a_number_is_the_threads_own(asked):
    """accelerate's is without one where it was not launched for several cards."""
    bare, third, cpu = torch.device("cuda"), torch.device("cuda:3"), torch.device("cpu")
    assert [device.with_index(place).index for place in (bare, third, cpu)] == [2, 3, None]
    for place in (bare, third, cpu):
        streams.make_current(place)
        device.synchronize(place)
        streams.new_stream(place)
        streams.Clock(place)
    assert device.free_memory(bare) == 5 and device.peak_memory(bare) == 7 and device.describe(bare) == "cuda Card"
    each = ("set_device", "synchronize", "Stream", "current_stream")
    assert asked == [
        *((name, number) for number in (2, 3) for name in each),
        *((name, 2) for name in ("mem_get_info", "max_memory_allocated", "get_device_name")),
    ]


def test_a_trainings_device_has_a_number(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "with_index", lambda place: torch.device(place.type, 0))
    try:
        accelerator = make_accelerator(TrainOptions(cpdir=tmp_path, basepath=tmp_path, tmpdir=tmp_path))
        for _ in range(2):
            assert accelerator.device.index == AcceleratorState().device.index == PartialState().device.index == 0
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_float16_whose_loss_nobody_scales_is_refused(monkeypatch, tmp_path):
    """accelerate 1.6's scaler with FSDP switches itself off where there is no CUDA."""
    monkeypatch.setattr(Accelerator, "scaler", types.SimpleNamespace(is_enabled=lambda: False), raising=False)
    monkeypatch.setattr(Accelerator, "__init__", lambda self, **_: None)
    with pytest.raises(RequestError, match="does not scale the loss on cpu devices with FSDP"):
        make_accelerator(TrainOptions(cpdir=tmp_path, basepath=tmp_path, tmpdir=tmp_path))
