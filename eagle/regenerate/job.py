"""The whole: what is asked for, what is there already, which engine answers, what is written.

OUTPUT               the records, put in place whole at the end
OUTPUT.journal       every reply as it comes, until then, and longer where requests failed
OUTPUT.report.json   what was counted, and what the records are of
"""

from __future__ import annotations

import contextlib
import datetime
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from eagle.data.cleaning import Dropped
from eagle.data.loss_mask import Encoder, load_encoder
from eagle.data.prompts import stop_tokens
from eagle.data.reader import open_records
from eagle.data.record_file import Records, notes_of
from eagle.data.regenerated import made_with, report_path
from eagle.data.sharegpt.convert import ShareGPTWriter
from eagle.data.token_source import refuse_other_formats
from eagle.device import choose_kind, torch_device
from eagle.dtypes import DTYPES, parse_dtype
from eagle.errors import RequestError, WorkError
from eagle.files import output_folder, read_json, write_json
from eagle.provenance import provenance
from eagle.regenerate.address import Address, key_headers, normal_url, proxy_to
from eagle.regenerate.asking import Asking, Counts
from eagle.regenerate.conversations import Conversations, choose
from eagle.regenerate.dialogue import FAILED, Walk, to_record, walk_through
from eagle.regenerate.engine_args import deciding
from eagle.regenerate.journal import LENGTH, Journal, check_same, differences, journal_path, read_header
from eagle.regenerate.own import OwnTarget
from eagle.regenerate.own_server import own_server, vllm_python
from eagle.regenerate.probing import connect
from eagle.regenerate.report import chosen_lines, missing, result_lines, to_json
from eagle.regenerate.request import AUTO, RegenerateRequest
from eagle.regenerate.served import Engine, ServedTarget
from eagle.regenerate.transport import Servers
from eagle.target.check import check_target
from eagle.target.config import ModelConfig, load_config
from eagle.target.quantization import Use
from eagle.target.weights import Weights, read_embedding
from eagle.text import visible

#: Prompts that our own decoding takes at once, at most, and how many wait for each, so that a batch is of like lengths.
OWN_BATCH, OWN_WAITING = 32, 3
END_FAILED = f"end_{FAILED}"


def regenerate(request: RegenerateRequest, kind: str, python: Path | None) -> int:
    """kind, python: what answers, as `engine_kind` found it. Raises: FileNotFoundError, RequestError, WorkError."""
    config = load_config(request.model_name, use=Use.SERVED)
    journal, report = journal_path(request.output), report_path(request.output)
    begun = read_header(journal)
    date = datetime.date.fromisoformat(begun["date"]) if begun and "date" in begun else None
    encoder = load_encoder(request.model_name, config, request.chat_template, date, request.chat_template_kwargs)
    records = open_records(request.data_path, allow_truncated=request.allow_truncated)
    options = options_of(request, config, encoder, records) | {"engine": kind}
    if kind == "vllm":
        options["engine_args"] = deciding(request.engine_args)
    if kind != "server":  # a server says itself which model it has
        checked = check_target(request.model_name, "--model_name", use=Use.SERVED if python else Use.REPLIES)
        options["model"] = checked.identity.current
    if is_complete(request, options, begun):
        journal.unlink(missing_ok=True)
        by = read_json(report, "a report of regenerated replies")["options"].get("model")
        print(visible(f"{request.output}: complete already, by the same options and {by}; nothing was asked"))
        return 0
    output_folder(request.output.parent, "--output")
    conversations = choose(records, request.end_num, request.seed)
    refuse_other_formats(records, conversations.indices or range(len(records)), request.data_path)
    if not conversations.indices:
        raise WorkError("\n".join(["No conversation can be asked:", *chosen_lines(conversations)]))
    print(f"{len(conversations.indices):,} conversations, {conversations.questions:,} questions")
    notes = notes_of(records, request.end_num)
    for note in [*notes, *encoder.notes()]:
        print(visible(f"  note: {note}"))
    stop = stop_tokens(request.model_name, config, encoder)
    with engine_for(request, config, encoder, conversations, stop, python) as engine:
        print(visible(f"  {engine.describe()}"))
        if isinstance(engine, ServedTarget):
            options.setdefault("model", engine.model)
        options["tokens_from"] = engine.tokens_from
        with Journal(journal, options, overwrite=request.overwrite) as kept:
            if len(kept) or kept.damaged:
                again = f"; {kept.damaged:,} lines of it are damaged and asked again" if kept.damaged else ""
                print(f"  going on: {len(kept):,} replies are in {journal}{again}")
            asking = Asking(engine, encoder, kept, request.max_new_tokens, request.seed, stop)
            is_own = isinstance(engine, OwnTarget)
            threads = min(request.concurrency, OWN_BATCH) * OWN_WAITING if is_own else request.concurrency
            asking.run(conversations.indices, conversations.dialogue, conversations.questions, threads)
            engine.stop()
            counted = write_output(request, conversations, kept, encoder, asking.counts)
            lines = [*chosen_lines(conversations), *result_lines(counted, asking.counts)]
            made = {"made_with": made_with(request.model_name, encoder), "notes": notes, "made_by": provenance()}
            write_json(report, {"options": kept.options, **to_json(conversations, counted), **made})
            if not counted[END_FAILED]:
                kept.remove()
    print(f"{request.output}: {counted['records']:,} conversations, {counted['replies']:,} replies")
    print(visible("\n".join(f"  {line}" for line in lines)))
    if counted[END_FAILED]:
        raise WorkError(
            f"{counted[END_FAILED]:,} of {len(conversations.indices):,} conversations lack replies, because requests "
            f"failed. {request.output} has what came. The same command asks for these again and for nothing else; what "
            f"came is kept in {journal}."
        )
    return 0


def options_of(request: RegenerateRequest, config: ModelConfig, encoder: Encoder, records: Records) -> dict[str, Any]:
    """What decides the replies and which there are, before any engine is asked."""
    return {
        "config_digest": config.digest(),
        "tokenizer_digest": encoder.digest(),
        "data_digest": records.digest(),
        "conversations": min(len(records), request.end_num or len(records)),
        "seed": request.seed,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "max_new_tokens": request.max_new_tokens,
        "dtype": request.dtype,
        **({"date": encoder.date.isoformat()} if encoder.is_dated else {}),
    }


def engine_kind(request: RegenerateRequest) -> tuple[str, Path | None]:
    """What answers: "server", "vllm" (and the interpreter that has it) or "own". Raises: RequestError."""
    if request.server:
        return "server", None
    python = None if request.engine == "own" else vllm_python(request)
    return ("own" if python is None else "vllm"), python


def is_complete(request: RegenerateRequest, options: dict[str, Any], begun: dict[str, Any] | None) -> bool:
    """Whether the output is there already, whole, and this job's; one that is not makes way for --overwrite alone.

    Where there is a journal, a job has begun that is to be gone on with, whatever output of another one is there.
    Raises: RequestError.
    """
    report, is_there = report_path(request.output), request.output.exists()
    content = read_json(report, "a report of regenerated replies") if is_there and report.is_file() else {}
    made, lacking = content.get("options"), missing(content.get("counts"))
    if begun is not None:
        if not request.overwrite:
            check_same(journal_path(request.output), begun, options)
        # One that was ended between its report and the end of its journal.
        return made == begun and "job" in begun and not lacking and not differences(begun, options)
    if not is_there:
        return False
    # A template that writes the date writes that of the day on which the job began.
    same = {name: value for name, value in options.items() if name != "date"}
    if request.served_model is not None:
        same["model"] = request.served_model
    if isinstance(made, dict) and not differences(made, same) and not lacking:
        return not request.overwrite
    if request.overwrite:
        return False
    changed = differences(made, same) if isinstance(made, dict) else []
    why = f" It was made otherwise: {'; '.join(changed)}." if changed else ""
    if lacking:
        why += f" {lacking:,} of its conversations lack replies, and its journal is gone."
    raise RequestError(f"--output {request.output} exists.{why} Name another file, or pass --overwrite to replace it.")


@contextlib.contextmanager
def engine_for(
    request: RegenerateRequest,
    config: ModelConfig,
    encoder: Encoder,
    conversations: Conversations,
    stop: list[int],
    python: Path | None,
) -> Iterator[Engine]:
    """What answers: the servers that are named, else the vLLM that python has, else we.

    Raises: RequestError, WorkError.
    """
    dialogues = (conversations.dialogue(index) for index in conversations.indices)
    context = config.max_position_embeddings

    def connected(addresses: list[Address], served: str | None) -> ServedTarget:
        servers = Servers(addresses, request.timeout, request.retries, request.max_outage, tell=say)
        engine, notes = connect(
            servers, encoder, dialogues, request.model_name, served, context, request.sampling, stop
        )  # fmt: skip
        for note in notes:
            print(visible(f"  note: {note}"))
        return engine

    if request.server:
        headers, urls = key_headers(), map(normal_url, request.server)
        addresses = [Address(url, headers=headers, proxy=proxy_to(url)) for url in urls]
        yield connected(addresses, request.served_model)
        return
    dtype = engine_dtype(request, config)
    if python is not None:
        print(f"  starting vLLM with {python}", flush=True)
        with own_server(request, encoder, python, dtype) as address:
            yield connected([address], None)
        return
    device = torch_device(choose_kind(request.device))
    own = OwnTarget(
        request.model_name, dtype, device, min(request.concurrency, OWN_BATCH), context, request.sampling, stop
    )  # fmt: skip
    yield own


def engine_dtype(request: RegenerateRequest, config: ModelConfig) -> torch.dtype:
    """What an engine that is started here computes in; by itself what the base model is saved in."""
    if request.dtype != AUTO:
        return parse_dtype(request.dtype)
    named = DTYPES.get(config.dtype or "")
    return (
        named if named is not None else read_embedding(Weights(request.model_name, flag="--model_name"), config).dtype
    )


def say(line: str) -> None:
    """A line above the progress view."""
    tqdm.write(visible(f"  note: {line}"), file=sys.stderr)


def write_output(
    request: RegenerateRequest, conversations: Conversations, journal: Journal, encoder: Encoder, counts: Counts
) -> Counter[str]:
    """Every conversation that has a reply, in the order of the data file. Returns what there is of each kind.

    Raises: WorkError where there is none, or the disk refuses.
    """
    found: Counter[str] = Counter()

    def answers(walk: Walk):
        return journal.get(walk.key())

    with ShareGPTWriter(request.output) as writer:
        for index in conversations.indices:
            walk = walk_through(conversations.dialogue(index), answers)
            found[f"end_{walk.end}"] += bool(walk.end)
            if not walk.finishes:
                found["without_reply"] += 1
                continue
            try:
                record = to_record(walk, conversations.name(index, request.data_path.stem), encoder)
            except Dropped as dropped:
                conversations.tally.dropped[dropped.reason] += 1
                conversations.tally.first.setdefault(dropped.reason, (index, dropped.detail))
                continue
            writer.write(record)
            found["records"] += 1
            found["replies"] += len(walk.finishes)
            found["truncated"] += walk.finishes.count(LENGTH)
            found["refusals"] += walk.refusals
            masks = record["loss_mask"] if isinstance(record["loss_mask"][0], list) else [record["loss_mask"]]
            found["rows"] += len(masks)
            found["supervised"] += sum(map(sum, masks))
        if not writer.count:
            said = next(iter(counts.failures.values()), "")
            lines = [*chosen_lines(conversations), *result_lines(found, counts), *([said] if said else [])]
            raise WorkError("\n".join(["Not one conversation has a reply, so nothing was written:", *lines]))
    return found
