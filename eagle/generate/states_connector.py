"""What vLLM loads into its engine (``kv_connector_module_path``): hands over the hidden states of whole prompts.

vLLM's method ``extract_hidden_states`` keeps the states of every position in a cache layer beside the keys and values.
The connector that vLLM ships copies them once a request has ended, on streams that only CUDA has. Here the states of a
prompt are copied in the step that computes its last position, behind the forward pass on its stream, while its blocks
are its own: it takes no further step, holds no block back, and needs nothing of the device but indexing.

Only vLLM imports this module: in its scheduler, which knows whose the blocks are, and in its workers, which hold them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    extract_from_kv_cache,
)

from eagle.generate.handover import Handover

#: In the connector's own options: the folder for files, absent within one process. In a request's: its key.
FOLDER, KEY = "eagle_folder", "eagle_key"


@dataclass(slots=True)
class Prompt:
    """A request that is computed. length: of its prompt; blocks: those that hold its states so far, in order."""

    key: str
    length: int
    blocks: list[int]


@dataclass
class Ready(KVConnectorMetadata):
    """From the scheduler to the workers: the prompts whose last positions the step computes."""

    prompts: list[Prompt] = field(default_factory=list)


class StatesConnector(ExampleHiddenStatesConnector):
    """Of vLLM's own it keeps how the cache layer is found and laid out."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        folder = self._kv_transfer_config.get_from_extra_config(FOLDER, None)
        self._handover = Handover(Path(folder) if folder else None)
        self._prompts: dict[str, Prompt] = {}

    # The scheduler's side.

    def build_connector_meta(self, scheduler_output: Any) -> Ready:
        ready, scheduled = Ready(), scheduler_output.num_scheduled_tokens
        computed: dict[str, int] = {}
        for new in scheduler_output.scheduled_new_reqs:
            key = _key_of(new.sampling_params)
            if key is not None:  # vLLM warms up with requests of its own
                blocks = list(new.block_ids[self._cache_kv_group_id])
                self._prompts[new.req_id] = Prompt(key, len(new.prompt_token_ids), blocks)
                computed[new.req_id] = new.num_computed_tokens
        going_on = scheduler_output.scheduled_cached_reqs
        for req_id, blocks, before in zip(
            going_on.req_ids, going_on.new_block_ids, going_on.num_computed_tokens, strict=True
        ):
            prompt = self._prompts.get(req_id)
            if prompt is None:
                continue
            more = blocks[self._cache_kv_group_id] if blocks is not None else []
            # One that had to give way to others begins again, in other blocks.
            prompt.blocks = list(more) if req_id in going_on.resumed_req_ids else [*prompt.blocks, *more]
            computed[req_id] = before
        for req_id, before in computed.items():
            if before + scheduled[req_id] >= self._prompts[req_id].length:
                ready.prompts.append(self._prompts.pop(req_id))
        return ready

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._prompts.pop(request.request_id, None)
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])

    # The workers' side.

    def wait_for_save(self) -> None:
        """After a step's forward pass. Every tensor-parallel rank has the same states; the first hands them over."""
        if self._kv_cache is None or not self._is_tp_rank_zero or not self.has_connector_metadata():
            return
        for prompt in self._get_connector_metadata().prompts:
            slots = self._slots(prompt).to(self._kv_cache.device)
            self._handover.put(prompt.key, extract_from_kv_cache(self._kv_cache, slots, prompt.length))
            # Where vLLM leaves a position out, its zeros show it; another prompt's states would pass for its own.
            self._kv_cache[slots // self._block_size, :, slots % self._block_size] = 0

    def _slots(self, prompt: Prompt) -> torch.Tensor:
        """Where its positions are in the cache, ``[T]``."""
        blocks = torch.tensor(prompt.blocks, dtype=torch.long)
        slots = blocks[:, None] * self._block_size + torch.arange(self._block_size)
        return slots.flatten()[: prompt.length]

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, None]:
        return None, None


def _key_of(sampling: Any) -> str | None:
    extra = (sampling.extra_args or {}) if sampling is not None else {}
    return (extra.get("kv_transfer_params") or {}).get(KEY)
