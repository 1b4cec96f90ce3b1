"""What ``allocation.py`` was asked for, checked as far as that can be by itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle.data.mixture import DataPath, read_weights
from eagle.device import Card, is_mig, is_uuid
from eagle.drafts.choices import DraftChoices
from eagle.drafts.families import DEFAULT_DRAFT
from eagle.dtypes import parse_dtype
from eagle.errors import RequestError
from eagle.generate.engine_check import check_engine_args
from eagle.generate.source_options import EngineOptions
from eagle.generate.sources import DEFAULT_SOURCE, ENGINES, FEATURE_SOURCES
from eagle.seeds import check_seed
from eagle.store.dtypes import SAME, check_store_dtype
from eagle.target.families import TARGET_FAMILIES

COMPILE_MODES = ("auto", "on", "off")
#: The options that an engine has, and what they are where none is started.
_OF_AN_ENGINE = {
    "engine_python": None,
    "tensor_parallel_size": None,
    "pipeline_parallel_size": 1,
    "engine_args": None,
}


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """The options of ``allocation.py``, checked as far as they can be on their own."""

    outdir: Path
    model_name: str
    data_path: DataPath
    model_type: str | None = None
    end_num: int | None = None
    npu_indices: tuple[Card, ...] = (0,)
    used_npus: int = 1
    seed: int = 42
    max_length: int = 2048
    dtype: str = "bfloat16"
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    device: str = "auto"
    batch_tokens: int = 4096
    shard_mb: int | None = None
    allow_truncated: bool = False
    store_dtype: str = SAME
    num_nodes: int = 1
    node_rank: int = 0
    compile: str = "auto"
    draft: str = DEFAULT_DRAFT
    aux_layers: tuple[int, ...] | None = None
    feature_source: str = DEFAULT_SOURCE
    engine_python: Path | None = None
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int = 1
    engine_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.end_num is not None and self.end_num < 1:
            raise RequestError(f"--end_num {self.end_num}: expected how many conversations to use, 1 or more.")
        if self.max_length < 3:
            raise RequestError(f"--max_length {self.max_length}: expected 3 tokens or more.")
        for name in ("batch_tokens", "shard_mb"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"--{name} {value}: expected 1 or more.")
        if self.model_type not in (None, *TARGET_FAMILIES):
            raise RequestError(f"--model_type {self.model_type}: expected one of {', '.join(TARGET_FAMILIES)}.")
        check_seed(self.seed)
        parse_dtype(self.dtype)
        check_store_dtype(self.store_dtype)
        if self.num_nodes < 1:
            raise RequestError(f"--num_nodes {self.num_nodes}: expected 1 or more.")
        if not 0 <= self.node_rank < self.num_nodes:
            raise RequestError(f"--node_rank {self.node_rank}: expected 0 to {self.num_nodes - 1}, one for every node.")
        if self.compile not in COMPILE_MODES:
            raise RequestError(f"--compile {self.compile}: expected one of {', '.join(COMPILE_MODES)}.")
        if self.compile == "on" and self.used_npus > 1:
            raise RequestError(
                f"--compile on would do nothing with --used_npus {self.used_npus}: a model that is spread over several "
                "cards is not compiled. Leave --compile out, or give each worker one card."
            )
        read_weights(self.data_path)
        if self.feature_source not in FEATURE_SOURCES:
            raise RequestError(f"--feature_source {self.feature_source}: expected one of {', '.join(FEATURE_SOURCES)}.")
        self.card_groups()
        if self.is_engine:
            self._check_engine()
        else:
            for name, default in _OF_AN_ENGINE.items():
                if getattr(self, name) != default:
                    raise RequestError(
                        f"--{name} is about an engine, and --feature_source {self.feature_source} starts none. Add "
                        "--feature_source vllm, or leave it out."
                    )

    def _check_engine(self) -> None:
        if self.compile == "on":
            raise RequestError(
                "--compile on: with --feature_source vllm the engine decides what is compiled. Leave it out; "
                """--engine_args '{"enforce_eager": false}' has vLLM compile."""
            )
        check_engine_args(self.engine_args or {})
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"--{name} {value}: expected how many, 1 or more.")
        if self.engine.cards != self.used_npus:
            raise RequestError(
                f"--tensor_parallel_size {self.engine.tensor_parallel_size} x --pipeline_parallel_size "
                f"{self.engine.pipeline_parallel_size} take {self.engine.cards} cards, and --used_npus "
                f"{self.used_npus} gives each worker's engine {self.used_npus}. Use --used_npus {self.engine.cards}, "
                "or other sizes."
            )

    @property
    def is_engine(self) -> bool:
        return self.feature_source in ENGINES

    @property
    def engine(self) -> EngineOptions:
        """Of each worker: all its cards share every layer, where nothing else is said."""
        tensor = self.tensor_parallel_size or max(1, self.used_npus // self.pipeline_parallel_size)
        return EngineOptions(tensor, self.pipeline_parallel_size, self.engine_args or {})

    @property
    def choices(self) -> DraftChoices:
        return DraftChoices(aux_layers=self.aux_layers)

    @property
    def folder(self) -> Path:
        """The store of this job: with several nodes each has its own, so that they may share a disk."""
        return self.outdir / f"node-{self.node_rank}" if self.num_nodes > 1 else self.outdir

    def card_groups(self) -> list[tuple[Card, ...]]:
        """The cards of each worker process, `used_npus` to a worker."""
        cards, per_worker = self.npu_indices, self.used_npus
        if per_worker < 1 or len(cards) % per_worker:
            raise RequestError(
                f"--used_npus {per_worker} is how many cards each worker process gets; it does not divide the "
                f"{len(cards)} cards of --npu_indices {','.join(map(str, cards))}. Use a divisor of {len(cards)}."
            )
        if per_worker > 1 and any(map(is_mig, cards)):
            raise RequestError(
                f"--used_npus {per_worker}: a process sees one MIG instance only, so a model cannot be spread over "
                "several. Use --used_npus 1."
            )
        return [tuple(cards[at : at + per_worker]) for at in range(0, len(cards), per_worker)]


def parse_indices(text: str, flag: str = "--npu_indices") -> tuple[Card, ...]:
    """'0,1,2' -> (0, 1, 2); UUIDs of CUDA cards stay as they are.

    Raises: RequestError for anything that is not distinct cards.
    """
    entries = [entry.strip() for entry in text.split(",")]
    wrong = [entry for entry in entries if not (entry.isascii() and (entry.isdigit() or is_uuid(entry)))]
    if wrong:
        raise RequestError(
            f'{flag} "{text}": {wrong[0]!r} is not a card number; expected e.g. "0,1,2,3", or with CUDA the UUIDs that '
            "nvidia-smi -L shows."
        )
    indices = tuple(int(entry) if entry.isdigit() else entry for entry in entries)
    repeated = dict.fromkeys(index for index in indices if indices.count(index) > 1)
    if repeated:
        raise RequestError(f'{flag} "{text}" repeats {", ".join(map(str, repeated))}; name each card once.')
    return indices


def parse_engine_args(text: str | None) -> dict[str, Any] | None:
    """Options of an engine by name, from JSON. Raises: RequestError."""
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        found = error
    if not isinstance(found, dict):
        raise RequestError(
            f"--engine_args {text!r} is no JSON object ({found}); expected e.g. "
            """'{"gpu_memory_utilization": 0.8}', in single quotes."""
        )
    return found
