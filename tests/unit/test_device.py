"""Choosing the device and giving workers their cards, on simulated accelerators."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from eagle import device, streams
from eagle.errors import RequestError
from eagle.releases import TORCH


@pytest.fixture
def npu(monkeypatch):
    """A machine with torch_npu and four cards, as far as torch can tell."""
    module = types.ModuleType("torch_npu")
    module.__spec__ = types.SimpleNamespace(name="torch_npu")
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    fake = types.SimpleNamespace(is_available=lambda: True, device_count=lambda: 4)
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
    for cached in (device.npu_failure, device._say):
        cached.cache_clear()
    yield
    device.npu_failure.cache_clear()


def test_an_npu_whose_libraries_are_not_found_is_a_note(broken_npu, capsys):
    assert device.choose_kind() == "cpu"
    said = capsys.readouterr().err
    assert (
        said.startswith("note: torch_npu is installed and cannot be used: libhccl.so: cannot open") and "source" in said
    )


def test_an_npu_whose_libraries_are_not_found_and_that_was_asked_for(broken_npu):
    with pytest.raises(RequestError, match=r"--device npu: torch_npu is installed and cannot.*set_env\.sh"):
        device.choose_kind("npu")


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
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(TORCH < (2, 2), reason="torch takes large pages from 2.2 on")
@pytest.mark.skipif(not PAGES.is_file() or "[madvise]" not in PAGES.read_text(), reason="all pages are of one size")
def test_a_worker_on_a_cpu_takes_large_pages():
    faults = [
        int(subprocess.run([sys.executable, "-c", FAULTS], env=env, capture_output=True, check=True, text=True).stdout)
        for env in (os.environ | device.worker_environment("cpu", [0], 1), os.environ | {device.HUGE_PAGES: "0"})
    ]
    assert faults[0] < faults[1] / 4


def test_a_thread_is_given_the_card_that_has_a_number(monkeypatch):
    """accelerate's device is without one where it was not launched for several cards."""
    given = []
    monkeypatch.setattr(streams, "backend_of", lambda kind: types.SimpleNamespace(set_device=given.append))
    for name in ("cpu", "cuda", "cuda:1", "npu:3" if hasattr(torch, "npu") else "cuda:3"):
        streams.make_current(torch.device(name))
    assert [place.index for place in given] == [1, 3]
