"""Which FSDP is taken, by what accelerate's launcher left in the environment."""

import pytest

from eagle.errors import RequestError
from eagle.train.sharding import check_sharding, is_sharded


@pytest.mark.parametrize("environment", [{}, {"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "1"}])
def test_not_asked_for(environment):
    assert not is_sharded(environment)
    check_sharding(environment)


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
