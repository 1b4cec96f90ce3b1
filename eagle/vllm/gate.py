"""The gate between training and serving: does an engine accept what the stored features make expect, and if not, why?

Of the conversations that training held out the engine is given three things, each alone and while it is watched:

    the whole stored record     the engine's features of the very tokens that training saw
    the stored prompt           what the target replies, what the engine drafts on the way and what is accepted
    the served prompt           the same, where the served template makes other tokens of the conversation

Three comparisons, of which each leaves all but one part as it is:

    features   the trained draft along the stored text: by the store's features, by the engine's
    draft      along the target's own reply, by the engine's features: the trained draft here, the exported one there
    prefix     what the engine accepts behind the served prompts, behind the stored ones

Acceptance is compared by position in the chain; what it takes to differ is `eagle.vllm.prediction.differing`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eagle.data.loss_mask import Encoder
from eagle.device import choose_kind, torch_device
from eagle.drafts.alignment import supervised_positions
from eagle.drafts.interface import DraftFamily
from eagle.drafts.saved import state_of
from eagle.errors import RequestError
from eagle.store.reader import FeatureStore
from eagle.target.check import CheckedTarget
from eagle.target.features import HIDDEN_STATE, describe_feature, holder_of
from eagle.target.trunk import load_final_norm
from eagle.target.weights import read_head
from eagle.vllm.as_exported import Trained, trained_draft
from eagle.vllm.capture import Watched
from eagle.vllm.causes import DRAFT, FEATURES, LEARNT, PARTS, PREFIX, Evidence, Finding, find_causes
from eagle.vllm.conversations import HeldOut, held_out
from eagle.vllm.prediction import Counts, Predictor, differing, served

#: What decides which conversations training holds out, and its defaults.
SPLIT: dict[str, Any] = {"val_ratio": 0.05, "seed": 42, "max_len": 2048}


def split_of(trained: Path | None) -> dict[str, Any]:
    """What a run says of `SPLIT`; nothing of a draft that no run of ours is beside."""
    run = state_of(trained).get("run", {}) if trained else {}
    return {name: run[name] for name in SPLIT if name in run}


def check_store(store: FeatureStore, trained: Path) -> None:
    """Raises: RequestError for a store that the run was not trained on: another's split is not what it held out."""
    run = state_of(trained).get("run", {})
    here = {"records": len(store), "tokens": store.tokens, "conversations": store.records_digest()}
    known = [name for name in here if run.get(name) is not None]
    if other := [f"{name} {run[name]} there, {here[name]} here" for name in known if run[name] != here[name]]:
        raise RequestError(
            f"--tmpdir {store.folder} is not the store that --trained-path {trained} was trained on "
            f"({'; '.join(other)}), so which of its conversations were held out is not known. Name that store, or "
            "leave --trained-path out."
        )


@dataclass(frozen=True, slots=True)
class GateOptions:
    """store: the folder that the draft was trained on. trained: the run or checkpoint that was exported, None where it
    is not at hand. data_path: the conversations, empty where they are where the store says. conversations: how many at
    most. The others are training's, by which the store was split; is_split_known: whether the trained run says them."""

    store: Path
    trained: Path | None = None
    data_path: tuple[Path, ...] = ()
    conversations: int = 16
    val_ratio: float = SPLIT["val_ratio"]
    seed: int = SPLIT["seed"]
    max_len: int = SPLIT["max_len"]
    is_split_known: bool = False


@dataclass(frozen=True)
class Gate:
    """What is asked of the engine, and what it is held against. encoder: the served one."""

    options: GateOptions
    held_out: HeldOut
    trained: Trained
    checked: CheckedTarget
    encoder: Encoder
    depth: int
    new_tokens: int

    def watched(self) -> list[tuple[list[int], int]]:
        """For `EngineRequest.watched`: the whole records, the stored prompts, those served prompts that differ."""
        conversations = self.held_out.conversations
        found = [(one.record.input_ids.tolist(), 1) for one in conversations]
        found += [(one.stored, self.new_tokens) for one in conversations]
        return found + [(one.served, self.new_tokens) for one in conversations if one.served not in (None, one.stored)]


def open_gate(
    options: GateOptions,
    checked: CheckedTarget,
    exported: Path,
    family: DraftFamily,
    encoder: Callable[[dict[str, Any]], Encoder],
    depth: int,
    new_tokens: int,
) -> Gate:
    """encoder: the served one, from the store's manifest.

    Raises: FileNotFoundError, RequestError, WorkError.
    """
    store = FeatureStore(options.store)
    if options.trained:
        check_store(store, options.trained)
    room = checked.config.max_position_embeddings - new_tokens - depth - 2
    if room < 1:
        raise RequestError(
            f"--max_new_tokens {new_tokens} leaves no room for a prompt in the base model's "
            f"{checked.config.max_position_embeddings} positions. Lower it."
        )
    found = held_out(
        store,
        encoder,
        count=options.conversations,
        val_ratio=options.val_ratio,
        seed=options.seed,
        max_len=options.max_len,
        longest=room,
        data_path=options.data_path,
    )
    trained = trained_draft(exported, options.trained, checked.weights, checked.config, family)
    if holder_of(trained.draft.reads, store.widths) is None:
        raise RequestError(
            f"--tmpdir {options.store} holds {', '.join(map(describe_feature, store.widths))}, and this draft reads "
            f"{describe_feature(trained.draft.reads)}. Name the store that it was trained on."
        )
    return Gate(options, found, trained, checked, encoder(found.manifest), depth, new_tokens)


@dataclass(frozen=True)
class Verdict:
    """believed: along the stored text by the store's features; measured: by the engine's. predicted, engine: behind the
    stored prompts; as_served: the engine behind the served ones. differs: by part, the positions (from 0)."""

    believed: Counts
    measured: Counts
    predicted: Counts
    engine: Counts
    as_served: Counts
    same: tuple[int, int]
    apart: float | None
    differs: dict[str, list[int]]
    causes: list[Finding]
    gate: Gate

    @property
    def is_sound(self) -> bool:
        return not self.causes and not any(self.differs.values()) and self.untold is None

    @property
    def untold(self) -> str | None:
        """Why nothing can be told of a part that no cause was found in, None where of all something can."""
        if self.causes or any(self.differs.values()):
            return None
        if not self.believed.chains:
            return f"no stored reply is as long as a chain of {self.gate.depth} tokens; ask for shorter chains"
        if not self.measured.chains:
            return "the engine gave no features of the stored text; try --enforce-eager, or another release"
        if not self.predicted.chains or not self.engine.chains:
            return "the base model's own replies end before anything is drafted; ask for more conversations"
        return None

    def wrong(self) -> str | None:
        """What is wrong, None where nothing is."""
        if self.is_sound:
            return None
        if self.untold:
            return f"The gate had nothing to compare: {self.untold}."
        named = ", ".join(one.name for one in self.causes) or "no cause was found"
        if not any(self.differs.values()):
            return f"The draft is not served as it was trained: {named}."
        return f"The engine accepts otherwise than training makes expect: {named}."

    def to_json(self) -> dict[str, Any]:
        counts = {
            "believed": self.believed, "believed_by_engine_features": self.measured, "predicted": self.predicted,
            "engine_behind_stored_prompts": self.engine, "engine": self.as_served,
        }  # fmt: skip
        return {
            "is_sound": self.is_sound,
            "conversations": len(self.gate.held_out.conversations),
            **{name: dataclasses.asdict(one) | {"rates": one.rates()} for name, one in counts.items()},
            "differs": self.differs,
            "features_apart": self.apart,
            "same_guesses": self.same,
            "not_tested": self.gate.held_out.unknown or None,
            "nothing_compared": self.untold,
            "too_long": self.gate.held_out.too_long,
            "trained_by_itself": self.gate.trained.by_itself,
            "causes": [dataclasses.asdict(one) for one in self.causes],
        }


def judge(gate: Gate, watched: list[Watched], dtype: str) -> Verdict:
    """watched: what the engine made of `Gate.watched`. dtype: the engine's."""
    conversations, depth = gate.held_out.conversations, gate.depth
    count, draft = len(conversations), gate.trained.draft
    whole, stored, other = watched[:count], watched[count : 2 * count], watched[2 * count :]
    replaced = iter(other)
    as_served = [
        seen if one.served in (None, one.stored) else next(replaced)
        for one, seen in zip(conversations, stored, strict=True)
    ]
    config, weights = gate.checked.config, gate.checked.weights
    device = torch_device(choose_kind())  # where no engine is any more: it wants nearly all of a card's memory
    predictor = Predictor(draft.to(device), read_head(weights, config).to(device).float(), depth)
    believed, measured = [], []
    for one, seen in zip(conversations, whole, strict=True):
        record = one.record
        rows = min(len(record), len(seen.features)) - 1
        if rows < depth:
            continue  # past the draft's longest context it is given nothing
        supervised = supervised_positions(record.loss_mask)[:rows]
        truth = predictor.target_choice(record.hidden_state[1 : rows + 1], supervised)
        tokens = record.input_ids[1 : rows + 1].long()
        believed += predictor.taught(tokens, record.feature(draft.reads)[:rows], truth, supervised)
        if draft.reads == HIDDEN_STATE:  # then the engine's say what the target chooses there
            truth = predictor.target_choice(seen.features[1 : rows + 1], supervised)
        measured += predictor.taught(tokens, seen.features[:rows], truth, supervised)
    same = [predictor.same_guesses(seen) for seen in stored]
    counts = Counts.of(believed, depth), Counts.of(measured, depth)
    predicted = Counts.of([length for seen in stored for length in predictor.rounds(seen)], depth)
    engine, behind_served = (
        Counts.of([length for seen in seens for length in served(seen, depth)], depth) for seens in (stored, as_served)
    )
    differs = {
        PREFIX: differing(engine, behind_served),
        FEATURES: differing(*counts),
        DRAFT: differing(predicted, engine),
    }
    named = (gate.held_out.manifest.get("target") or {}).get("fingerprint")
    tokenizer = gate.encoder.tokenizer
    norm = load_final_norm(weights, config, torch.float32, torch.device("cpu"))
    evidence = Evidence(
        held_out=gate.held_out,
        whole=whole,
        reads=draft.reads,
        norm=norm,
        dtype=dtype,
        variables=gate.encoder.variables,
        template=gate.encoder.template_name,
        is_target=named is not None and gate.checked.identity.is_named(named),
        trained=gate.trained,
        same=(sum(one for one, _ in same), sum(compared for _, compared in same)),
        first=counts[0].rates()[0] if counts[0].chains else None,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        differs=frozenset(part for part, positions in differs.items() if positions),
    )
    causes = find_causes(evidence)
    apart = evidence.apart if any(len(seen.features) for seen in whole) else None
    return Verdict(*counts, predicted, engine, behind_served, evidence.same, apart, differs, causes, gate)


def gate_lines(verdict: Verdict) -> list[str]:
    """For people."""
    gate, held = verdict.gate, verdict.gate.held_out
    options, number, engine = gate.options, len(held.conversations), verdict.as_served
    whose = "held-out" if held.in_split else "(none is held out: training has seen them)"
    if held.in_split and not options.is_split_known:
        whose += f" (if it was trained with --val_ratio {options.val_ratio:g} --seed {options.seed})"
    lines = [
        f"gate      {number} {whose} conversations of {options.store}, {gate.new_tokens} tokens each",
        f"training  {verdict.believed.shown()}   along the stored text ({verdict.believed.chains:,} chains); by the "
        f"engine's features {verdict.measured.shown()}",
        f"predicted {verdict.predicted.shown()}   along the target's own replies ({verdict.predicted.chains:,} drafts)",
        f"engine    {engine.shown()}   ({engine.chains:,} drafts)",
    ]
    if engine != verdict.engine:
        behind = f"behind the stored prompts ({verdict.engine.chains:,} drafts)"
        lines.append(f"          {verdict.engine.shown()}   {behind}")
    same, compared = verdict.same
    wrong = len(gate.trained.differences)
    apart = "-" if verdict.apart is None else f"{verdict.apart:.2%}"
    lines.append(
        f"tested    features {apart} apart; {same:,} of {compared:,} guesses are the engine's and ours; "
        f"{wrong or 'no'} difference{'' if wrong == 1 else 's'} in the exported folder"
    )
    known = [one for one in held.conversations if one.served is not None]
    if known:
        alike = sum(one.served == one.stored for one in known)
        lines.append(f"          {alike} of {len(known)} served prompts are the stored ones")
    if held.unknown:
        lines.append(f"          not the served prompts: {held.unknown}")
    if held.too_long:
        lines.append(f"          {held.too_long} more have prompts beyond what --max_new_tokens leaves room for")
    if gate.trained.by_itself:
        lines.append("          the exported folder against itself: name what was exported with --trained-path")
    if verdict.is_sound:
        lines.append("gate      the engine accepts what training makes expect")
        if verdict.believed.chains and verdict.believed.rates()[0] < LEARNT:
            lines.append("          which is little: the draft has hardly learned anything yet; train it longer")
        return lines
    if verdict.untold:
        return [*lines, f"gate      nothing was compared: {verdict.untold}"]
    parts = [PARTS[part] for part, positions in verdict.differs.items() if positions]
    if parts:
        lines.append(f"gate      acceptance differs by more than sampling error, by {' and '.join(parts)}:")
    else:
        lines.append("gate      acceptance does not show it here, and this is not as it was trained:")
    lines += [f"cause     {cause}" for cause in verdict.causes]
    if not verdict.causes:
        lines.append("cause     none of those that are tested")
    return lines
