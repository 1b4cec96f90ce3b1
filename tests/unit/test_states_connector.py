"""The connector that vLLM loads, on what its scheduler and cache would show it. `tests/vllm` has it in a real one."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from eagle.generate.handover import Handover

V1 = "vllm.distributed.kv_transfer.kv_connector.v1"
GROUP, BLOCK, LAYERS, HIDDEN = 1, 4, 2, 3


@pytest.fixture
def connector(monkeypatch):
    """Over a cache of eight blocks, ``[blocks, layers, positions, H]``, whose states say where they are."""

    class Example:
        def has_connector_metadata(self):
            return self.bound is not None

        def _get_connector_metadata(self):
            return self.bound

    def extract(cache, slots, count):
        return cache[slots // BLOCK, :, slots % BLOCK][:count]

    name = "eagle.generate.states_connector"
    for module, content in {
        **{".".join(V1.split(".")[:depth]): {} for depth in range(1, 6)},
        f"{V1}.base": {"KVConnectorMetadata": object},
        f"{V1}.example_hidden_states_connector": {
            "ExampleHiddenStatesConnector": Example,
            "extract_from_kv_cache": extract,
        },
    }.items():
        made = ModuleType(module)
        made.__dict__.update(content)
        monkeypatch.setitem(sys.modules, module, made)
    monkeypatch.delitem(sys.modules, name, raising=False)
    connector = object.__new__(importlib.import_module(name).StatesConnector)
    monkeypatch.delitem(sys.modules, name)
    connector._cache_kv_group_id, connector._block_size = GROUP, BLOCK
    connector._prompts, connector._handover, connector.bound = {}, Handover(), None
    connector._is_tp_rank_zero = True
    connector._kv_cache = 1.0 + torch.arange(8 * LAYERS * BLOCK * HIDDEN).view(8, LAYERS, BLOCK, HIDDEN)
    return connector


def new(req_id, key, length, blocks, computed=0):
    extra = {"kv_transfer_params": {"eagle_key": key}} if key else None
    sampling = SimpleNamespace(extra_args=extra)
    return SimpleNamespace(
        req_id=req_id,
        sampling_params=sampling,
        prompt_token_ids=[0] * length,
        block_ids=([99], blocks),
        num_computed_tokens=computed,
    )


def step(connector, scheduled, fresh=(), going_on=(), resumed=()):
    """going_on: request, its new blocks or None, positions before. Returns the prompts that are ready."""
    cached = SimpleNamespace(
        req_ids=[one[0] for one in going_on],
        new_block_ids=[([98], one[1]) if one[1] is not None else None for one in going_on],
        num_computed_tokens=[one[2] for one in going_on],
        resumed_req_ids=set(resumed),
    )
    output = SimpleNamespace(
        num_scheduled_tokens=scheduled, scheduled_new_reqs=list(fresh), scheduled_cached_reqs=cached
    )
    connector.bound = connector.build_connector_meta(output)
    connector.wait_for_save()
    return {prompt.key: prompt.blocks for prompt in connector.bound.prompts}


def test_prompts_are_handed_over_with_their_last_position(connector):
    cache = connector._kv_cache.clone()
    assert step(connector, {"a": 4, "b": 3}, [new("a", "0", 9, [2, 5]), new("b", "1", 3, [7])]) == {"1": [7]}
    assert step(connector, {"a": 4}, going_on=[("a", None, 4)]) == {}
    assert step(connector, {"a": 1}, going_on=[("a", [1], 8)]) == {"0": [2, 5, 1]}
    expected = torch.cat([cache[2], cache[5], cache[1, :, :1]], dim=1).transpose(0, 1)
    assert torch.equal(connector._handover.take("0"), expected)
    assert torch.equal(connector._handover.take("1"), cache[7, :, :3].transpose(0, 1))
    # What was handed over is gone from the cache, and nothing else.
    gone = connector._kv_cache == 0
    assert gone[2].all() and gone[5].all() and gone[1, :, 0].all() and gone[7, :, :3].all()
    assert torch.equal(connector._kv_cache[~gone], cache[~gone])
    assert gone.sum() == 12 * LAYERS * HIDDEN


def test_one_that_had_to_give_way_begins_again(connector):
    assert step(connector, {"a": 4}, [new("a", "0", 6, [2])]) == {}
    assert step(connector, {"a": 6}, going_on=[("a", [3, 4], 0)], resumed=["a"]) == {"0": [3, 4]}


def test_others_are_none_of_ours(connector):
    assert step(connector, {"w": 4}, [new("w", None, 4, [1])]) == {}
    assert step(connector, {"w": 1}, going_on=[("w", None, 4)]) == {}
    assert step(connector, {"a": 4}, [new("a", "0", 6, [2])]) == {}
    assert connector.request_finished_all_groups(SimpleNamespace(request_id="a"), ([1], [2])) == (False, None)
    assert not connector._prompts


def test_only_the_first_rank_hands_over(connector):
    connector._is_tp_rank_zero = False
    before = connector._kv_cache.clone()
    assert step(connector, {"a": 4}, [new("a", "0", 4, [2])]) == {"0": [2]}
    assert torch.equal(connector._kv_cache, before)
