"""A data-generation job: what was asked for, what that comes to, and the manifest that records it.

The parent (`eagle.generate.launch`) resolves the request once and writes it to the store's manifest; every worker
(`eagle.generate.worker`) reads its share from there, so that all of them agree and a rerun can be compared.
"""

from __future__ import annotations

import dataclasses
import datetime
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from eagle import device
from eagle.data.cleaning import Tally
from eagle.data.loss_mask import Encoder, load_encoder
from eagle.data.mixture import Data, Outcome, open_data, outcomes, read_weights
from eagle.data.reader import are_records, refuse_to_change
from eagle.data.record_file import Records
from eagle.data.regenerated import check_regenerated
from eagle.data.template_variables import shown
from eagle.data.tokens import LENGTH_BLOCK, TOKENS, Tokens, encode_all, key_of, load_tokens, save_tokens
from eagle.device import Card
from eagle.drafts.families import DRAFT_FAMILIES, check_served
from eagle.dtypes import check_computes, dtype_name, parse_dtype
from eagle.errors import RequestError
from eagle.files import existing_path, write_json
from eagle.generate.dealing import FREE_OPTIONS, LEFT, count_redealt, forget_done, has_shards, job_share, node_share
from eagle.generate.engine_check import check_engine, check_steady, shaping, vllm_of
from eagle.generate.progress import finished
from eagle.generate.request import GenerationRequest
from eagle.generate.sources import DEFAULT_SOURCE
from eagle.provenance import provenance
from eagle.store.manifest import MANIFEST, check_no_reshard, read_manifest
from eagle.store.shard import FORMAT_VERSION
from eagle.target.check import check_config, check_target
from eagle.target.compiled import should_compile
from eagle.target.config import ModelConfig
from eagle.target.features import aux_layers, describe_feature
from eagle.target.identity import Identity
from eagle.target.quantization import Use
from eagle.target.tokenizer import tokens_without_row
from eagle.target.trunk import least_context
from eagle.target.weights import first_weight_file


@dataclass(frozen=True, slots=True)
class Job:
    """A resolved request: the manifest's content, and what the parent needs to start the workers.

    conversations: how many this node computes. identity: None where only a plan is made, of a model without weights.
    """

    request: GenerationRequest
    kind: str
    conversations: int
    manifest: dict
    notes: list[str]
    records: Records
    encoder: Encoder
    target: ModelConfig
    identity: Identity | None

    @property
    def widths(self) -> dict[str, int]:
        """Of the features that every record is to hold, by name."""
        return self.manifest["features"]

    @property
    def groups(self) -> list[tuple[Card, ...]]:
        return self.request.card_groups()


def resolve(request: GenerationRequest, *, only_planned: bool = False) -> Job:
    """Check the request against the disk, the data and the device, before any work begins.

    only_planned: nothing is to be computed, so that the base model's folder may do without weights.

    Raises: FileNotFoundError, RequestError.
    """
    model = existing_path(request.model_name, "--model_name", "folder")
    for one in read_weights(request.data_path):
        if are_records(one.path):  # others are refused when they are opened
            refuse_to_change(one.path, "--data_path", request.outdir, "--outdir")
    identity = None
    use = Use.SERVED if request.is_engine else Use.FEATURES
    if only_planned and first_weight_file(model) is None:
        config = check_config(model, "--model_name", use)
    else:
        checked = check_target(model, "--model_name", use=use)
        config, identity = checked.config, checked.identity
    if request.model_type not in (None, config.family):
        raise RequestError(
            f"--model_type {request.model_type}: {model}/config.json says model_type {config.family!r}. "
            f"Use --model_type {config.family}."
        )
    kind = device.choose_kind(request.device)
    check_computes(parse_dtype(request.dtype), kind)
    device.check_indices(kind, request.npu_indices)
    should_compile(request.compile, kind, 0)  # refuses what its workers would have to
    check_steady(config, request.max_length, "--max_length")
    engine = {}
    if request.is_engine:
        check_engine(config, request.engine.arguments, request.max_length, "--max_length")
        version = vllm_of(request.engine_python or Path(sys.executable), request.engine, kind)
        engine = {"engine": {request.feature_source: version, **dataclasses.asdict(request.engine)}}
    data = open_data(request.data_path, request.end_num, allow_truncated=request.allow_truncated)
    began = began_with(request)
    date = datetime.date.fromisoformat(began["date"]) if began and "date" in began else None
    encoder = load_encoder(model, config, request.chat_template, date, request.chat_template_kwargs)
    encoder.trains_leading_space = not began or "trains_leading_space" in began
    conversations = data.conversations
    if conversations < request.num_nodes:
        raise RequestError(f"--num_nodes {request.num_nodes}: {conversations} conversations are too few for them.")
    notes = _notes(request, data, encoder, config)
    if beyond := tokens_without_row(encoder.tokenizer, config.vocab_size):
        notes.append(
            f"the embedding has no row for {', '.join(sorted(beyond)[:4])}; conversations that spell them out are left "
            "out"
        )
    manifest = {
        "format_version": FORMAT_VERSION,
        "target": {
            "name": str(model.resolve()),
            "fingerprint": identity.current if identity else None,
            "config_digest": config.digest(),
            "family": config.family,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            **({"quantization": config.quantization.to_json()} if config.quantization else {}),
        },
        "tokenizer": {
            "digest": encoder.digest(),
            "chat_template": encoder.template_name,
            **({"trains_leading_space": True} if encoder.trains_leading_space else {}),
            **({"date": encoder.date.isoformat()} if encoder.is_dated else {}),
        },
        "data": data.to_json(),
        "dtype": dtype_name(parse_dtype(request.dtype)),
        "features": features_for(request, config),
        "options": {
            "conversations": conversations,
            "seed": request.seed,
            "max_length": request.max_length,
            "chat_template": request.chat_template,
            # Absent where it is not given, as in the manifests of versions that did not know it.
            **({"chat_template_kwargs": shown(request.chat_template_kwargs)} if request.chat_template_kwargs else {}),
            "allow_truncated": request.allow_truncated,
            "batch_tokens": request.batch_tokens,
            "workers": len(request.card_groups()),
            "store_dtype": request.store_dtype,
            "num_nodes": request.num_nodes,
            "node_rank": request.node_rank,
            **({"feature_source": request.feature_source} if request.feature_source != DEFAULT_SOURCE else {}),
            **({"engine_args": chosen} if (chosen := shaping(request.engine.arguments)) else {}),
            "length_block": LENGTH_BLOCK,
            **({"shares": data.shares} if data.shares else {}),
        },
        **engine,
        "complete": False,
        "made_by": provenance(),
    }
    share = node_share(manifest)
    data.refuse_other_formats(sorted(job_share(manifest).tolist()))  # of a small source this node may have one or two
    return Job(request, kind, len(share), manifest, notes, data.records, encoder, config, identity)


def features_for(request: GenerationRequest, target: ModelConfig) -> dict[str, int]:
    """Widths of the features that the draft of this job reads, by name. Raises: RequestError."""
    family = DRAFT_FAMILIES[request.draft]
    check_served(family, target)
    features = family.features(family.config(target, None, request.choices))
    if request.compile == "on" and any(map(aux_layers, features)):
        raise RequestError(
            f"--compile on: {family.describes} reads what several layers of the base model are given, which a compiled "
            "one does not show. Leave --compile out."
        )
    return features


def began_with(request: GenerationRequest) -> dict | None:
    """What the manifest of a job that has begun says of its tokenizer; of another node's, where this has not."""
    for path in (request.folder / MANIFEST, *sorted(request.outdir.glob(f"node-*/{MANIFEST}"))):
        if path.is_file():
            return read_manifest(path).get("tokenizer") or {}
    return None


def _notes(request: GenerationRequest, data: Data, encoder: Encoder, config: ModelConfig) -> list[str]:
    """For people. Raises: RequestError as `check_regenerated`."""
    longest = config.max_position_embeddings
    told = [f"--{name}" for name in ("chat_template", "chat_template_kwargs") if getattr(request, name)]
    notes = [
        f"chat template: {encoder.template_name}",
        *([config.quantization.note()] if config.quantization else []),
        *encoder.notes(),
        *data.notes(request.end_num),
        *check_regenerated(data.records, encoder, told),
    ]
    if request.max_length > longest:
        notes.append(f"--max_length {request.max_length} is more than the {longest} positions the model was made for")
    if config.window is not None and request.max_length > config.window:
        notes.append(
            f"the base model attends to the last {config.window} tokens, and vLLM limits its draft alike: training "
            "cuts records to that, so that --max_length can be as small"
        )
    if least := least_context(config):
        notes.append(
            "longrope: features are computed with its long factors, as vLLM does unless --max-model-len is "
            f"{least - 1} at most. To serve it so, put the short factors in place of the long ones in config.json, "
            "here and there"
        )
    return notes


#: What has to be the same for a rerun to continue a store, and how to say it; of the options all but `FREE_OPTIONS`.
_IDENTITY = (
    ("target", "fingerprint"),
    ("tokenizer", "digest"),
    ("data", "digest"),
    ("dtype",),
    ("features",),
    ("options",),
)


def claim_outdir(job: Job) -> None:
    """Make the folder this job's: `check_outdir`, and the manifest of a new job.

    Raises: RequestError as `check_outdir` does.
    """
    folder = job.request.folder
    if not check_outdir(job):
        if (folder / MANIFEST).is_file():
            print(f"  {folder} was another job's, which finished no shard; this one takes its place")
            forget_done(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MANIFEST, job.manifest)


def check_outdir(job: Job) -> bool:
    """Whether the folder holds this job already, so that it can go on. Changes nothing.

    A job without a finished shard, which was killed before its first, holds nothing and does not bind another.

    Raises: RequestError for a folder that holds something else, or a job with other options.
    """
    outdir, root = job.request.folder, job.request.outdir
    if outdir != root and root.is_dir():
        foreign = sorted(e.name for e in root.iterdir() if not e.name.startswith((".", "node-")))[:3]
        if foreign:
            raise RequestError(
                f"--outdir {root} holds something else than the stores of nodes ({', '.join(foreign)}, ...). Name a "
                "new or empty folder."
            )
    if outdir.exists() and not outdir.is_dir():
        raise RequestError(f"--outdir {outdir} is a file; expected a folder to write the store to.")
    for place in (root, outdir):
        check_no_reshard(place, "--outdir")
    path = outdir / MANIFEST
    if path.is_file():
        existing = read_manifest(path)
        if "resharded_into" in existing:
            raise RequestError(f"--outdir {outdir} holds a resharded store, which cannot be continued; name another.")
        # Stores of version 0.1 name their target by another fingerprint.
        named = existing["target"].get("fingerprint")
        named = job.identity.as_in(named) if job.identity else named
        own = {**job.manifest, "target": {**job.manifest["target"], "fingerprint": named}}
        differences = _differences(existing, own)
        if differences and has_shards(outdir):
            raise RequestError(
                f"--outdir {outdir} holds a store made with other options: {'; '.join(differences)}. Repeat that "
                "command to continue it, or name another folder."
            )
        return not differences
    if outdir.is_dir() and any(not entry.name.startswith(".") for entry in outdir.iterdir()):
        found = sorted(entry.name for entry in outdir.iterdir())[:3]
        raise RequestError(
            f"--outdir {outdir} is not empty ({', '.join(found)}, ...) and is no store. Name a new or empty folder."
        )
    return False


def _differences(old: dict, new: dict) -> list[str]:
    found = []
    for keys in _IDENTITY:
        before, after = old, new
        for key in keys:
            before, after = before[key], after[key]
        if keys == ("features",):
            if before != after:
                found.append(f"it holds {_listed(before)}, now asked for are {_listed(after)}")
        elif isinstance(after, dict):
            names = sorted((set(before) | set(after)).difference(FREE_OPTIONS))
            found += [
                f"{n} was {before.get(n)!r}, now {after.get(n)!r}" for n in names if before.get(n) != after.get(n)
            ]
        elif before != after:
            shown = [str(value)[:12] if keys[-1] in ("digest", "fingerprint") else value for value in (before, after)]
            found.append(f"{' '.join(keys)} was {shown[0]}, now {shown[1]}")
    return found


def _listed(features: dict[str, int]) -> str:
    return " and ".join(map(describe_feature, features))


def encode_job(job: Job, *, save: bool = True) -> Tokens:
    """The tokens of this node's conversations: encoded in all cores, or as an earlier run left them in the folder.

    save: leave them there for the workers, in a folder that is claimed.
    """
    path, key = job.request.folder / TOKENS, key_of(job.manifest)
    tokens = load_tokens(path, key)
    if tokens is None:
        tokens = encode_all(job.records, job.encoder, node_share(job.manifest), job.request.max_length)
        assert tokens.input_ids.max(initial=0) < job.encoder.vocab_size, "the embedding would end the job"
        if save:
            save_tokens(path, tokens, key)
            tokens = load_tokens(path, key) or tokens  # mapped: the workers need the memory
    return tokens


def mixture(tokens: Tokens, manifest: dict) -> list[Outcome]:
    """What came of each source of this node's conversations; nothing where there is one source only."""
    sources = manifest["data"].get("sources")
    return outcomes(tokens, node_share(manifest), sources) if sources else []


def finish(job: Job) -> dict:
    """Add up what the workers did, all of them finished, into the manifest and mark it complete. Returns it.

    Raises: WorkError where shards lack something that is counted on.
    """
    folder = job.request.folder
    manifest = read_manifest(folder / MANIFEST)
    if "sources" in manifest["data"] and not manifest["complete"]:
        manifest["mixture"] = [asdict(one) for one in mixture(encode_job(job, save=False), manifest)]
    if not manifest.get("redealt"):
        total, tally = {"records": 0, "tokens": 0, "supervised_tokens": 0}, Tally()
        for worker in range(manifest["options"]["workers"]):
            done = finished(folder / str(worker))
            assert done
            total = {key: value + getattr(done, key) for key, value in total.items()}
            tally.add(done.tally)
    elif not manifest["complete"]:
        tokens = load_tokens(folder / TOKENS, key_of(manifest))
        assert tokens is not None
        total, tally = count_redealt(tokens, manifest, folder), tokens.tally()
    else:
        total, tally = {}, Tally.from_json(manifest)
    manifest |= total | tally.to_json() | {"complete": True}
    write_json(folder / MANIFEST, manifest)
    for name in (TOKENS, LEFT):
        (folder / name).unlink(missing_ok=True)
    return manifest
