"""Why an engine accepts other than training makes expect: a table of causes, each with its test and its cure.

The tests come in the order in which a draft is served: the tokens of the prompt, the target's features, the exported
draft, what the engine drafts with it. A new cause is a function from `Evidence` to words (None: it is not this one) and
an entry in `CAUSES`, the special before the general.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from eagle.data.template_variables import shown
from eagle.target.features import HIDDEN_STATE
from eagle.vllm.as_exported import Trained
from eagle.vllm.capture import Watched
from eagle.vllm.conversations import Conversation, HeldOut, told_to

PREFIX, FEATURES, DRAFT = "prefix", "features", "draft"
#: In words, in the order of the tests.
PARTS = {PREFIX: "the tokens of the prompt", FEATURES: "the target's features", DRAFT: "the exported draft"}

#: Distances of two features of one token, of their norm: float32 computed twice, and what 16 bits or fewer leave.
EXACT, ROUNDED = 0.01, 0.2
#: How often the first guess of a draft that has learned anything is the target's choice at least, on what it was
#: trained for; and of its share in its run's validation, where a run says that.
LEARNT, AS_VALIDATED = 0.05, 0.5
#: Of the guesses of one draft on the same features, how many an engine shares with another computation at least.
SHARED = 0.9


@dataclass(frozen=True)
class Evidence:
    """What the tests look at.

    whole: every held-out record through the engine, for its features. reads: the features that the draft reads.
    norm: the target's final norm. dtype: the engine's. variables: that the served template is told. is_target: whether
    the store names this target. trained: the draft as it should be. same: guesses of the engine that are ours on its
    own features, and how many were compared. first: how often the trained draft's first guess along the stored text is
    the target's choice, None where no chain was long enough to tell. decode: tokens to text. differs: the parts in
    which acceptance does.
    """

    held_out: HeldOut
    whole: list[Watched]
    reads: str
    norm: Callable[[torch.Tensor], torch.Tensor]
    dtype: str
    variables: dict[str, Any] | None
    template: str
    is_target: bool
    trained: Trained
    same: tuple[int, int]
    first: float | None
    decode: Callable[[list[int]], str]
    differs: frozenset[str] = field(default_factory=frozenset)

    @cached_property
    def _other(self) -> list[Conversation]:
        """Those whose served prompt is not the stored one."""
        return [one for one in self.held_out.conversations if one.served and one.served != one.stored]

    @cached_property
    def prompts(self) -> tuple[list[int], list[int]] | None:
        """Of the first conversation whose served prompt is not the stored one, both: stored, served. None where most
        are the same: a conversation that a server would not be sent like that is no cause."""
        known = [one for one in self.held_out.conversations if one.served is not None]
        if 2 * len(self._other) <= len(known):
            return None
        first = self._other[0]
        return first.stored, first.served or []

    @property
    def is_of_variables(self) -> bool:
        """Whether the served template makes most of these stored prompts where it is told what it was for the store."""
        return 2 * sum(one.as_told == one.stored for one in self._other) > len(self._other)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return self.held_out.manifest

    @cached_property
    def computed_in(self) -> str:
        """The dtype of the store's features; of classic dumps, which do not say it, the file's."""
        features = self.held_out.conversations[0].record.feature(self.reads)
        return str(self.manifest.get("dtype") or features.dtype).removeprefix("torch.")

    @cached_property
    def tolerance(self) -> float:
        stored_as = (self.manifest.get("options") or {}).get("store_dtype", "same")
        exact = self.dtype == self.manifest.get("dtype") == "float32" and stored_as in ("same", "float32")
        return EXACT if exact else ROUNDED

    def stored(self, at: int) -> torch.Tensor:
        """The store's features of a record ``[T, W]``."""
        return self.held_out.conversations[at].record.feature(self.reads).float()

    def distance(self, change: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> float:
        """How far the store's features are from the engine's, the median over tokens; both after `change`."""
        found = []
        for at, seen in enumerate(self.whole):
            theirs, own = change(self.stored(at), seen.features.float())
            rows = min(len(theirs), len(own))
            if not rows:
                continue
            apart = (theirs[:rows] - own[:rows]).norm(dim=-1) / own[:rows].norm(dim=-1).clamp_min(1e-12)
            found.append(apart)
        return float(torch.cat(found).nanmedian()) if found else 0.0

    @cached_property
    def apart(self) -> float:
        return self.distance(lambda theirs, own: (theirs, own))

    def differing(self, *words: str) -> str | None:
        """What differs in the exported folder and has one of these words in its name."""
        found = [str(one) for one in self.trained.differences if any(word in one.name for word in words)]
        return "; ".join(found) or None


@dataclass(frozen=True, slots=True)
class Cause:
    """name: for people and the report. part: of which it is. find: what is wrong, in words. cure: what to do. beside:
    whether it is also a cause where another of its part was found."""

    name: str
    part: str
    find: Callable[[Evidence], str | None]
    cure: str
    beside: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    name: str
    part: str
    words: str
    cure: str

    def __str__(self) -> str:
        return f"{self.name}: {self.words}. {self.cure}"


# The tokens of the prompt.


def _variables(evidence: Evidence) -> str | None:
    told = told_to(evidence.manifest)
    serving = shown(evidence.variables) if evidence.variables else None
    if evidence.prompts is None or told == serving or not evidence.is_of_variables:
        return None
    return f"the chat template is told {serving or 'nothing'}, and for the store it was told {told or 'nothing'}"


def _cut(one: list[int], other: list[int]) -> tuple[list[int], list[int], int, int]:
    """Both without what they begin and end with alike, and how many tokens either is."""
    begin = next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    begin = min(len(one), len(other)) if begin is None else begin
    one, other, end = one[begin:], other[begin:], 0
    while end < min(len(one), len(other)) and one[-1 - end] == other[-1 - end]:
        end += 1
    return one[: len(one) - end], other[: len(other) - end], begin, end


def _generation_prompt(evidence: Evidence) -> str | None:
    if evidence.prompts is None:
        return None
    stored, serving = evidence.prompts
    if stored[: len(serving)] == serving:
        return f"served prompts end without {evidence.decode(stored[len(serving) :])!r}, which the stored ones have"
    if serving[: len(stored)] == stored:
        return f"served prompts end with {evidence.decode(serving[len(stored) :])!r} more than the stored ones"
    return None


def _system_prompt(evidence: Evidence) -> str | None:
    """Something is in front of the question in one of them, and all the rest is alike."""
    if evidence.prompts is None:
        return None
    stored, serving, begin, end = _cut(*evidence.prompts)
    if begin > end:
        return None
    if not stored and serving:
        return f"served prompts hold {evidence.decode(serving)!r} more than the stored ones"
    if not serving and stored:
        return f"served prompts lack {evidence.decode(stored)!r}, which the stored ones hold"
    return None


def _template(evidence: Evidence) -> str | None:
    if evidence.prompts is None:
        return None
    stored, serving = (evidence.decode(ids) for ids in _cut(*evidence.prompts)[:2])
    made = (evidence.manifest.get("tokenizer") or {}).get("chat_template", "unknown")
    return (
        f"where a stored prompt has {_short(stored)} the served one has {_short(serving)}; template of the store: "
        f"{made}, served: {evidence.template}"
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:40]} ... {text[-15:]}")


# The target's features.


def _unnormed(evidence: Evidence) -> str | None:
    if evidence.reads != HIDDEN_STATE or evidence.apart <= evidence.tolerance:
        return None
    if evidence.distance(lambda theirs, own: (evidence.norm(theirs), own)) <= evidence.tolerance:
        return "the store's features are those before the base model's final norm, and the engine's behind it"
    if evidence.distance(lambda theirs, own: (theirs, evidence.norm(own))) <= evidence.tolerance:
        return "the store's features went through the base model's final norm twice"
    return None


def _shifted(evidence: Evidence) -> str | None:
    if evidence.apart <= evidence.tolerance:
        return None
    for by, change in (
        (1, lambda theirs, own: (theirs[:-1], own[1:])),
        (-1, lambda theirs, own: (theirs[1:], own[:-1])),
    ):
        if evidence.distance(change) <= evidence.tolerance:
            return f"the store's features at a position are the engine's at the {'next' if by > 0 else 'last'} one"
    return None


def _checkpoint(evidence: Evidence) -> str | None:
    named = bool(evidence.manifest.get("target"))
    if evidence.is_target or (evidence.apart <= evidence.tolerance and not (named and FEATURES in evidence.differs)):
        return None
    says = "names another base model" if named else "does not say of which base model it is"
    return f"{_distance(evidence)}, and the store {says}"


def _engine_features(evidence: Evidence) -> str | None:
    if not evidence.is_target or evidence.apart <= evidence.tolerance:
        return None
    return f"{_distance(evidence)}, though both are of the same base model"


def _distance(evidence: Evidence) -> str:
    return f"the features of the same tokens are {evidence.apart:.0%} apart in the store and in the engine"


def _dtype(evidence: Evidence) -> str | None:
    # What the draft makes of features is compared on the engine's own: another dtype of the store is no cause of that.
    if evidence.computed_in == evidence.dtype or FEATURES not in evidence.differs:
        return None
    return f"the store was computed in {evidence.computed_in} and the engine runs in {evidence.dtype}"


# The exported draft.


def _left(evidence: Evidence) -> str | None:
    """What differs and no entry above names."""
    named = [word for words in _EXPORTED.values() for word in words]
    found = [str(one) for one in evidence.trained.differences if not any(word in one.name for word in named)]
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    return f"{'; '.join(found[:3])}{more}" if found else None


def _foreign(evidence: Evidence) -> str | None:
    known = evidence.trained.accuracy
    least = LEARNT if known is None else AS_VALIDATED * known
    if evidence.first is None or evidence.first >= least or evidence.apart > evidence.tolerance:
        return None
    there = "" if known is None else f", where the training's validation had {known:.1%}"
    return f"along the store's own text and features the draft's first guess is right in {evidence.first:.1%}{there}"


def _guesses(evidence: Evidence) -> str | None:
    same, compared = evidence.same
    if not compared or same >= SHARED * compared:
        return None
    return (
        f"on the engine's own features the trained draft shares {same} of the engine's {compared} guesses, and the "
        "exported folder is as it should be"
    )


_AGAIN = "Export the trained draft again (convert_eagle_ckpt_to_vllm_compatible.py)"
_AS_STORED = "Serve with the template and variables of the store, or make the store again with those that are served"


#: Of config keys and tensors of the exported folder words that their names hold, by the cause that they are.
_EXPORTED = {
    "rotary settings": ("rope_theta", "rope_scaling", "partial_rotary"),
    "vocabulary map": ("d2t", "t2d", "draft_vocab_size"),
    "length limit": ("max_position_embeddings", "sliding_window"),
    "embedding": ("embed_tokens",),
    "head": ("lm_head",),
    "biases": ("bias",),
    "norms": ("norm",),
    "layers read": ("aux_hidden",),
}


def _exported(name: str, why: str = "") -> Cause:
    words = _EXPORTED[name]
    return Cause(name, DRAFT, lambda evidence: evidence.differing(*words), f"{_AGAIN}{why}.", beside=True)


CAUSES = (
    Cause("template variables (think mode)", PREFIX, _variables, f"{_AS_STORED}."),
    Cause("generation prompt", PREFIX, _generation_prompt, f"{_AS_STORED}."),
    Cause("system prompt", PREFIX, _system_prompt, f"{_AS_STORED}."),
    Cause("chat template", PREFIX, _template, f"{_AS_STORED}."),
    Cause(
        "final norm of the features", FEATURES, _unnormed,
        "An EAGLE-1 draft reads what the lm_head reads: make the store with allocation.py.",
    ),
    Cause("features shifted", FEATURES, _shifted, "Make the store with allocation.py and train again."),
    Cause(
        "another base model", FEATURES, _checkpoint,
        "Make the store with the model that is served, and train on that.",
    ),
    Cause(
        "features of the engine", FEATURES, _engine_features,
        "The store was altered, or this vLLM computes other features: make a few records again (allocation.py, with "
        "and without --feature_source vllm), or try --enforce-eager, --dtype float32, another release.",
    ),
    Cause("dtype", FEATURES, _dtype, "Serve in the store's dtype, or make the store in the engine's."),
    _exported(
        "rotary settings",
        " with this base model: a draft has rotary settings of its own, and vLLM takes 10000 for none",
    ),
    _exported("vocabulary map", ": d2t are offsets, token i of the draft's is the base model's i + d2t[i]"),
    _exported("length limit", ": nothing is drafted past the draft's own limit"),
    _exported("embedding", ": the folder needs none, vLLM takes the base model's"),
    _exported("head"),
    _exported("biases"),
    _exported("norms"),
    _exported("layers read"),
    Cause("weights or config", DRAFT, _left, f"{_AGAIN}.", beside=True),
    Cause(
        "draft and store", DRAFT, _foreign,
        "It was not trained on this store, or something was lost: name what was exported with --trained-path.",
    ),
    Cause(
        "draft logits", DRAFT, _guesses,
        "This vLLM computes another draft than the file says: try --enforce-eager, --dtype float32, another release.",
    ),
)  # fmt: skip


def find_causes(evidence: Evidence) -> list[Finding]:
    """What is wrong, in the table's order."""
    found: list[Finding] = []
    for cause in CAUSES:
        if not cause.beside and any(one.part == cause.part for one in found):
            continue
        if words := cause.find(evidence):
            found.append(Finding(cause.name, cause.part, words, cause.cure))
    return found
