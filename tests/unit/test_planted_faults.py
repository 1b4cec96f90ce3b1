"""The list of planted faults fits the code: `python -m tests.npu.planted_faults` plants them, which takes longer."""

from tests.npu.planted_faults import FAULTS, problems


def test_every_fault_can_be_planted() -> None:
    assert not problems()


def test_a_fault_changes_something() -> None:
    assert all(fault.text != fault.instead for fault in FAULTS)
    assert len(FAULTS) > 25
