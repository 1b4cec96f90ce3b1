"""A card whose memory is full is told of with what to do; errors with words of their own keep them."""

import pytest

from eagle.errors import FailedElsewhere, WorkError
from eagle.train.main import room_named


def test_a_full_card():
    says = r"too little memory for this run: NPU out of memory\. .*--bs and raise"
    with pytest.raises(WorkError, match=says) as said, room_named():
        raise RuntimeError("NPU out of memory.\nTried to allocate 2 GiB")
    assert "--gradient_accumulation_steps" in str(said.value) and "--cpdir" in str(said.value)


@pytest.mark.parametrize("error", [WorkError("vLLM: CUDA out of memory"), FailedElsewhere("rank 1: out of memory")])
def test_what_says_itself_whose_memory_was_full_is_let_through(error):
    with pytest.raises(WorkError) as said, room_named():
        raise error
    assert said.value is error


def test_other_errors_are_let_through():
    with pytest.raises(RuntimeError, match="a matrix of the wrong shape") as said, room_named():
        raise RuntimeError("a matrix of the wrong shape")
    assert not isinstance(said.value, WorkError)
