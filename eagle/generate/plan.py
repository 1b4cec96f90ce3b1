"""What a data-generation job takes, said before it starts: bytes by worker, whether they fit, how long it may last."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from eagle import engines
from eagle.child import die_with_parent
from eagle.data.tokens import TOKENS, Tokens, key_of, save_tokens
from eagle.dtypes import parse_dtype
from eagle.entry import child_environment
from eagle.errors import WorkError
from eagle.files import write_json
from eagle.generate.dealing import left_by_worker
from eagle.generate.job import Job
from eagle.generate.launch import worker_command, worker_variables
from eagle.store.dtypes import STORE_DTYPES, bytes_per_value
from eagle.store.manifest import MANIFEST
from eagle.store.writer import SHARD_BYTES, shard_bytes_for
from eagle.target.features import states_in
from eagle.target.trunk import trunk_values

#: Seconds of computing that a dry run judges the speed by.
PROBE_SECONDS = 10
#: What a shard's header takes, at most.
_HEADER_BYTES = 2048


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """What one worker has left to do."""

    records: int
    tokens: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What is left of this node's part of the job.

    tokens: of all of it. token_bytes: what one takes, a record's index aside. free: bytes that the disk of the store
    has. nodes: that share the job. shard_mb: size of a store file.
    """

    workers: list[WorkerPlan]
    tokens: int
    token_bytes: int
    free: int
    shrinkable: dict[str, int]
    nodes: int = 1
    shard_mb: int = SHARD_BYTES >> 20

    @property
    def bytes(self) -> int:
        return sum(worker.bytes for worker in self.workers)

    def lines(self) -> list[str]:
        each = ", ".join(_size(worker.bytes) for worker in self.workers)
        by_worker = f" (by worker: {each})" if len(self.workers) > 1 else ""
        shared = f"; {self.nodes} nodes on one disk need about as much each" if self.nodes > 1 else ""
        return [
            f"{sum(worker.records for worker in self.workers):,} records, "
            f"{sum(worker.tokens for worker in self.workers):,} tokens to compute",
            f"{_size(self.bytes)} to write{by_worker}, {self.token_bytes:,} bytes a token, in files of "
            f"{self.shard_mb:,} MB; {_size(self.free)} free{shared}",
        ]

    def check_space(self, folder: Path) -> None:
        """Raises: WorkError where the disk cannot hold the store."""
        if self.bytes <= self.free:
            return
        smaller = [f"--store_dtype {name} needs {_size(size)}" for name, size in self.shrinkable.items()]
        raise WorkError(
            f"{folder} needs {_size(self.bytes)} more, but its disk has {_size(self.free)} free. Nothing was computed. "
            f"Make room or name another --outdir and run again; {'; '.join([*smaller, ''])}--end_num uses fewer "
            "conversations."
        )


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def store_bytes(tokens: int, records: int, widths: Mapping[str, int], dtype: str, store_dtype: str) -> int:
    """What shards of that many tokens and records hold: features of these widths, by name, scales, ids, mask, index."""
    scale = 0 if store_dtype == STORE_DTYPES[0] else 4
    size = bytes_per_value(store_dtype, parse_dtype(dtype))
    per_token = sum(width * size + states_in(name) * scale for name, width in widths.items()) + 4 + 1
    return tokens * per_token + records * 3 * 8


def sized(job: Job, tokens: Tokens) -> Job:
    """The job with its ``--shard_mb`` decided where it was not given: by what a worker has to write in all, done or
    not, so that a job that goes on decides alike.
    """
    if job.request.shard_mb is not None:
        return job
    count = len(tokens.lengths)
    total = store_bytes(int(tokens.lengths.sum()), count, job.widths, job.manifest["dtype"], job.request.store_dtype)
    shard_mb = shard_bytes_for(-(-total // len(job.groups))) >> 20
    return dataclasses.replace(job, request=dataclasses.replace(job.request, shard_mb=shard_mb))


def make_plan(job: Job, tokens: Tokens) -> Plan:
    """What every worker has left to do."""
    folder, lengths, widths = job.request.folder, tokens.lengths, job.widths
    shard_mb = sized(job, tokens).request.shard_mb
    assert shard_mb
    shares = left_by_worker(tokens, job.manifest, folder, len(job.groups))
    counts = [int(lengths[share].sum()) for share in shares]

    def sizes(store_dtype: str) -> list[int]:
        found = []
        for share, count in zip(shares, counts, strict=True):
            whole = store_bytes(count, len(share), widths, job.manifest["dtype"], store_dtype)
            found.append(whole + _HEADER_BYTES * (1 + whole // (shard_mb << 20)) if share else 0)
        return found

    chosen = sizes(job.request.store_dtype)
    workers = [WorkerPlan(len(share), *rest) for share, *rest in zip(shares, counts, chosen, strict=True)]
    smaller = {name: sum(sizes(name)) for name in STORE_DTYPES[1:]}
    shrinkable = {name: total for name, total in smaller.items() if total < 0.9 * sum(chosen)}
    place = next(path for path in (folder, *folder.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    token_bytes = store_bytes(1, 0, widths, job.manifest["dtype"], job.request.store_dtype)
    return Plan(workers, int(lengths.sum()), token_bytes, free, shrinkable, job.request.num_nodes, shard_mb)


def dry_run_lines(job: Job, plan: Plan, tokens: Tokens) -> list[str]:
    """The per-worker commands, the base model's size, and the expected time.

    It is judged by a short probe of the worker that has most left to do.
    """
    lines = [f"worker {number}: {_shown(job, number)}" for number in range(len(job.groups))]
    lines.append(f"base model: {_model_size(job)}")
    left = [worker.tokens for worker in plan.workers]
    if any(left) and job.identity is None:
        lines.append(f"no probe, and so no time: {job.request.model_name} holds no weights")
    elif any(left):
        rate = probe(job, tokens, left.index(max(left)))
        several = f" by each of {len(job.groups)} workers" if len(job.groups) > 1 else ""
        lines.append(
            f"probe: {rate:,.0f} tokens/s{several}, so about {_duration(max(left) / rate)} without starting up"
        )
    else:
        lines += ["nothing is left to compute", *tokens.tally().lines()]
    return [*lines, "dry run: nothing was written"]


def _model_size(job: Job) -> str:
    """Of the tensors that every worker holds; those of a quantized model are as large as they are in its files."""
    cards, place = len(job.groups[0]), "" if job.kind == "cpu" else f" on {len(job.groups[0])} card(s)"
    quantization = job.target.quantization
    if quantization and job.identity is None:
        return (
            f"quantized ({quantization.describe()}), as large as the weight files that {job.request.model_name} lacks"
        )
    if quantization and job.identity:
        size = job.identity.weights.bytes()
        shown = f"quantized ({quantization.describe()}), {_size(size)} as in its weight files"
    else:
        values, dtype = trunk_values(job.target), parse_dtype(job.manifest["dtype"])
        size = values * dtype.itemsize
        shown = f"{values:,} values without its lm_head, {_size(size)} in {job.manifest['dtype']}"
    each = f", {_size(size // cards)} on each" if cards > 1 else ""
    return f"{shown} for every worker{place}{each}"


def _shown(job: Job, number: int) -> str:
    variables = [f"{name}={value}" for name, value in worker_variables(job, number).items()]
    return " ".join([*variables, shlex.join(worker_command(job, number))])


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:,.0f} s"
    return f"{minutes:,.0f} min" if minutes < 120 else f"{minutes / 60:,.1f} h"


def probe(job: Job, tokens: Tokens, number: int) -> float:
    """Tokens per second of worker `number`, the loading of the model not counted.

    Raises: WorkError with the worker's last words.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_json(folder / MANIFEST, job.manifest)
        save_tokens(folder / TOKENS, tokens, key_of(job.manifest))
        result = subprocess.run(
            [*worker_command(job, number, folder), "--probe", str(PROBE_SECONDS)],
            env={**child_environment(), **worker_variables(job, number)},
            capture_output=True,
            text=True,
            errors="replace",
            preexec_fn=die_with_parent,
            check=False,
        )
    if result.returncode:
        said = result.stderr.strip()
        words = engines.last_words(said) if job.request.is_engine else said[-2000:]
        raise WorkError(f"the probe of worker {number} failed. Its last words:\n{words}")
    measured = json.loads(result.stdout.splitlines()[-1])
    return measured["tokens"] / measured["seconds"]
