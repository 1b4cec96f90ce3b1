"""The whole: what is asked for, what is there already, which engine answers, what is written.

OUTPUT               the records, put in place whole at the end
OUTPUT.journal       every reply as it comes, until then
OUTPUT.report.json   what was counted, and what the records are of
"""

from __future__ import annotations

import contextlib
import datetime
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eagle.data.cleaning import Dropped
from eagle.data.loss_mask import Encoder, load_encoder
from eagle.data.prompts import stop_tokens
from eagle.data.reader import open_records
from eagle.data.record_file import Records
from eagle.data.sharegpt.convert import ShareGPTWriter
from eagle.data.token_source import refuse_other_formats
from eagle.device import choose_kind, torch_device
from eagle.dtypes import DTYPES, parse_dtype
from eagle.errors import RequestError, WorkError
from eagle.files import output_folder, read_json, write_json
from eagle.provenance import provenance
from eagle.regenerate.asking import Asking, Counts
from eagle.regenerate.conversations import Conversations, choose
from eagle.regenerate.dialogue import Walk, to_record, walk_through
from eagle.regenerate.journal import LENGTH, Journal, differences, journal_path, read_header
from eagle.regenerate.own import OwnTarget
from eagle.regenerate.own_server import own_server, vllm_python
from eagle.regenerate.probing import connect
from eagle.regenerate.report import chosen_lines, result_lines, to_json
from eagle.regenerate.request import AUTO, RegenerateRequest
from eagle.regenerate.served import Engine, ServedTarget
from eagle.regenerate.transport import Address, Servers
from eagle.target.check import check_target
from eagle.target.config import ModelConfig, load_config
from eagle.target.quantization import Use
from eagle.target.weights import Weights, read_embedding
from eagle.text import visible

#: Prompts that our own decoding takes at once, at most, and how many wait for each, so that a batch is of like lengths.
OWN_BATCH, OWN_WAITING = 32, 3


def regenerate(request: RegenerateRequest) -> int:
    """Raises: FileNotFoundError, RequestError, WorkError."""
    config = load_config(request.model_name, use=Use.SERVED)
    journal, report = journal_path(request.output), report_path(request.output)
    begun = read_header(journal)
    date = datetime.date.fromisoformat(begun["date"]) if begun and "date" in begun else None
    encoder = load_encoder(request.model_name, config, request.chat_template, date, request.chat_template_kwargs)
    records = open_records(request.data_path, allow_truncated=request.allow_truncated)
    options = options_of(request, config, encoder, records)
    if is_complete(request, options, begun):
        journal.unlink(missing_ok=True)
        print(f"{request.output}: complete already, by the same options; nothing was asked")
        return 0
    output_folder(request.output.parent, "--output")
    conversations = choose(records, request.end_num, request.seed)
    refuse_other_formats(records, conversations.indices or range(len(records)), request.data_path)
    if not conversations.indices:
        raise WorkError("\n".join(["No conversation can be asked:", *chosen_lines(conversations)]))
    print(f"{len(conversations.indices):,} conversations, {conversations.questions:,} questions")
    for note in encoder.notes():
        print(visible(f"  note: {note}"))
    stop = stop_tokens(request.model_name, config, encoder)
    with engine_for(request, config, encoder, conversations, stop) as (engine, name):
        print(visible(f"  {engine.describe()}"))
        options |= {"model": name, "tokens_from": engine.tokens_from}
        check_journal(request, options, read_header(journal))
        with Journal(journal, options) as kept:
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
    write_json(report, {"options": options, **to_json(conversations, counted), "made_by": provenance()})
    journal.unlink()
    print(f"{request.output}: {counted['records']:,} conversations, {counted['replies']:,} replies")
    print(visible("\n".join(f"  {line}" for line in lines)))
    return 0


def report_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.report.json")


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


def is_complete(request: RegenerateRequest, options: dict[str, Any], begun: dict[str, Any] | None) -> bool:
    """Whether the output is there already, and is this job's; one that is not makes way for --overwrite alone.

    Raises: RequestError.
    """
    report = report_path(request.output)
    if begun is not None and not request.overwrite:
        check_journal(request, options, begun)
    if not request.output.exists():
        return False
    made = read_json(report, "a report of regenerated replies").get("options") if report.is_file() else None
    # A template that writes the date writes that of the day on which the job began.
    same = {name: value for name, value in options.items() if name != "date"}
    if isinstance(made, dict) and not differences(made, same):
        return not request.overwrite
    if request.overwrite or begun is not None:
        return False
    why = f" It was made otherwise: {'; '.join(differences(made, same))}." if isinstance(made, dict) else ""
    raise RequestError(f"--output {request.output} exists.{why} Name another file, or pass --overwrite to replace it.")


def check_journal(request: RegenerateRequest, options: dict[str, Any], begun: dict[str, Any] | None) -> None:
    """Raises: RequestError where the journal's replies are of other options; with --overwrite it goes instead."""
    changed = differences(begun, options) if begun is not None else []
    if not changed:
        return
    path = journal_path(request.output)
    if not request.overwrite:
        raise RequestError(
            f"{path} holds replies that were asked for otherwise: {'; '.join(changed)}. Repeat that command to go on "
            "with it, name another --output, or pass --overwrite to begin anew."
        )
    path.unlink()


@contextlib.contextmanager
def engine_for(
    request: RegenerateRequest, config: ModelConfig, encoder: Encoder, conversations: Conversations, stop: list[int]
) -> Iterator[tuple[Engine, str]]:
    """What answers, and what it calls the target: the servers that are named, else a vLLM that is installed, else we.

    Raises: RequestError, WorkError.
    """
    dialogues = (conversations.dialogue(index) for index in conversations.indices)
    context = config.max_position_embeddings

    def connected(addresses: list[Address], served: str | None) -> ServedTarget:
        servers = Servers(addresses, request.timeout, request.retries)
        engine, notes = connect(
            servers, encoder, dialogues, request.model_name, served, context, request.sampling, stop
        )  # fmt: skip
        for note in notes:
            print(visible(f"  note: {note}"))
        return engine

    if request.server:
        engine = connected([Address(url.rstrip("/")) for url in request.server], request.served_model)
        yield engine, engine.model
        return
    python = None if request.engine == "own" else vllm_python(request)
    target = check_target(request.model_name, "--model_name", use=Use.SERVED if python else Use.REPLIES)
    if python is not None:
        print(f"  starting vLLM with {python}", flush=True)
        with own_server(request, encoder, python) as address:
            yield connected([address], None), target.identity.current
        return
    named = DTYPES.get(config.dtype or "")
    if request.dtype != AUTO:
        dtype = parse_dtype(request.dtype)
    else:
        weights = Weights(request.model_name, flag="--model_name")
        dtype = named if named is not None else read_embedding(weights, config).dtype
    device = torch_device(choose_kind(request.device))
    own = OwnTarget(
        request.model_name, dtype, device, min(request.concurrency, OWN_BATCH), context, request.sampling, stop
    )  # fmt: skip
    yield own, target.identity.current


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
