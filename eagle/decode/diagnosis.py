"""Where a draft is weak, and what would help most: acceptance by slices of the replies, and remedies by what they gain.

A slice is some of all drafts: of one category, at some positions of the reply, behind contexts of some length, of next
tokens that are in the draft's vocabulary or not. A remedy says how much τ would rise if what it mends were as good as
the rest, by which they are ordered. A new remedy is an entry of `REMEDIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from eagle.decode.acceptance_counts import Acceptance
from eagle.decode.replies import Reply

CATEGORY, POSITION, CONTEXT, KIND = "category", "position in the reply", "context", "next token"
#: Where the slices of positions and of contexts begin, in tokens.
POSITIONS, CONTEXTS = (0, 16, 64, 256), (0, 128, 512, 2048, 8192)
INSIDE, OUTSIDE = "in the draft's vocabulary", "not in it"
#: Slices are compared where both have so many drafts; weaker is one that is so by so many standard errors.
LEAST, ERRORS = 30, 2.5
#: What is worth saying, in τ; and how many remedies are said.
WORTH, SAID = 0.02, 3
#: By how much the first guess would have to be right more often, in the remedy that concerns all of a draft.
BETTER = 0.1


@dataclass(slots=True)
class Slice:
    """Some of all drafts: of how many the first token was accepted, and how many tokens in all."""

    name: str
    drafts: int = 0
    first: int = 0
    accepted: int = 0

    def add(self, accepted: int) -> None:
        self.drafts += 1
        self.first += accepted > 0
        self.accepted += accepted

    @property
    def tau(self) -> float:
        return 1 + self.accepted / self.drafts if self.drafts else 1.0

    @property
    def rate(self) -> float:
        return self.first / self.drafts if self.drafts else 0.0

    def is_weaker_than(self, rest: Slice) -> bool:
        if min(self.drafts, rest.drafts) < LEAST:
            return False
        pooled = (self.first + rest.first) / (self.drafts + rest.drafts)
        error = (pooled * (1 - pooled) * (1 / self.drafts + 1 / rest.drafts)) ** 0.5
        return rest.rate - self.rate > ERRORS * error

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "drafts": self.drafts, "tau": self.tau, "first_accepted": self.rate}


def bucket(value: int, begins: Sequence[int]) -> str:
    """The bucket of a number, as it is called."""
    at = max(number for number, begin in enumerate(begins) if value >= begin)
    return f"{begins[at]}-{begins[at + 1] - 1}" if at + 1 < len(begins) else f"{begins[at]} and more"


def slices(replies: Sequence[Reply], vocabulary: Collection[int] | None) -> dict[str, list[Slice]]:
    """By group, in the order of the buckets. vocabulary: the draft's, None where it has all tokens."""
    found: dict[str, dict[str, Slice]] = {CATEGORY: {}, POSITION: {}, CONTEXT: {}, KIND: {}}
    for name, begins in ((POSITION, POSITIONS), (CONTEXT, CONTEXTS)):
        found[name] = {label: Slice(label) for label in (bucket(begin, begins) for begin in begins)}
    if vocabulary is not None:
        found[KIND] = {label: Slice(label) for label in (INSIDE, OUTSIDE)}
    for reply in replies:
        tokens, start = reply.drafted.tokens, 1
        for step in reply.drafted.steps:
            names = {
                CATEGORY: reply.category,
                POSITION: bucket(start, POSITIONS),
                CONTEXT: bucket(reply.prompt_tokens + start, CONTEXTS),
            }
            if vocabulary is not None and start < len(tokens):
                names[KIND] = INSIDE if tokens[start] in vocabulary else OUTSIDE
            for group, name in names.items():
                if name:
                    found[group].setdefault(name, Slice(name)).add(step.accepted)
            start += step.accepted + 1
    return {group: [one for one in some.values() if one.drafts] for group, some in found.items()}


@dataclass(frozen=True, slots=True)
class Found:
    """What remedies look at."""

    acceptance: Acceptance
    slices: dict[str, list[Slice]]

    def weakest(self, group: str, among: Callable[[int], bool] = lambda at: True) -> tuple[Slice, float] | None:
        """Of a group's slices that are weaker than the rest the one that costs most, and what it costs in τ.

        among: which slices, by their place.
        """
        some = self.slices[group]
        costs = []
        for at, one in enumerate(some):
            rest = Slice("", *(sum(getattr(other, of) for other in some if other is not one) for of in _COUNTED))
            if among(at) and one.is_weaker_than(rest):
                costs.append((one, one.drafts / self.acceptance.steps * (rest.tau - one.tau)))
        return max(costs, key=lambda cost: cost[1], default=None)


_COUNTED = ("drafts", "first", "accepted")
#: What a remedy would bring, in τ, and why.
Gain = tuple[float, str]


@dataclass(frozen=True, slots=True)
class Remedy:
    """name: for people. gain: what it would bring and why, None where it is not called for. what: to do."""

    name: str
    gain: Callable[[Found], Gain | None]
    what: str


def tau_of(alphas: Sequence[float]) -> float:
    """τ of a chain whose tokens are accepted at these rates where those before them were."""
    tau, reached = 1.0, 1.0
    for alpha in alphas:
        reached *= alpha
        tau += reached
    return tau


def known_alphas(acceptance: Acceptance) -> list[float]:
    """n-α for all n that were seen."""
    return [alpha for alpha in acceptance.n_alpha() if alpha is not None]


def _vocabulary(found: Found) -> Gain | None:
    acceptance, inside = found.acceptance, [one for one in found.slices[KIND] if one.name == INSIDE]
    if not inside or not acceptance.outside:
        return None
    # Each would be accepted as often as others are, and as much behind it.
    gain = acceptance.outside / acceptance.steps * (inside[0].tau - 1)
    share = acceptance.outside / max(1, acceptance.rejected)
    return gain, f"{share:.0%} of the rejections are of a token that is not in the draft's vocabulary"


def _depth(found: Found) -> Gain | None:
    alphas = known_alphas(found.acceptance)
    if len(alphas) < 2 or found.acceptance.tried[1] < LEAST or alphas[1] >= alphas[0]:
        return None
    gain = tau_of([alphas[0]] * len(alphas)) - tau_of(alphas)
    later = " ".join(f"{alpha:.3f}" for alpha in alphas[1:])
    return gain, f"0-α is {alphas[0]:.3f}, and on the draft's own features it falls to {later}"


def _said(cost: tuple[Slice, float] | None, where: str) -> Gain | None:
    if cost is None:
        return None
    one, gain = cost
    return gain, f"{where.format(one.name)} the first token is accepted in {one.rate:.3f} of {one.drafts:,} drafts"


def _category(found: Found) -> Gain | None:
    return _said(found.weakest(CATEGORY), "in the category {}")


def _long_context(found: Found) -> Gain | None:
    return _said(found.weakest(CONTEXT, lambda at: at > 0), "behind {} tokens of context")


def _beginning(found: Found) -> Gain | None:
    return _said(found.weakest(POSITION, lambda at: at == 0), "at the positions {} of replies")


def _end(found: Found) -> Gain | None:
    return _said(found.weakest(POSITION, lambda at: at > 0), "at the positions {} of replies")


def _all(found: Found) -> Gain | None:
    alphas = known_alphas(found.acceptance)
    if not alphas or alphas[0] > 1 - 2 * BETTER:
        return None
    gain = tau_of([alphas[0] + BETTER, *alphas[1:]]) - tau_of(alphas)
    return gain, f"0-α is {alphas[0]:.3f}; so much for {BETTER:.1f} more of it"


REMEDIES = (
    Remedy(
        "draft vocabulary", _vocabulary,
        "train with a larger --draft_vocab_size, or on replies like these, which choose its tokens",
    ),
    Remedy(
        "unrolled steps", _depth,
        "train with more --ttt_steps, so that the draft learns on its own features; or serve a smaller K",
    ),
    Remedy("category", _category, "add conversations of this kind to the training data (--data_path takes weights)"),
    Remedy(
        "long contexts", _long_context,
        "make and train on longer records (--max_length of allocation.py, --max_len of the training)",
    ),
    Remedy(
        "beginnings of replies", _beginning,
        "see that prompts are served as they were trained (eagle.vllm.verify --tmpdir); train on more, shorter replies",
    ),
    Remedy(
        "long replies", _end,
        "train on replies as long as these: the base model's own, uncut (tools/regenerate.py, a larger --max_length)",
    ),
    Remedy(
        "training", _all,
        "train on more tokens, of the base model's own replies (tools/regenerate.py), or for more epochs",
    ),
)  # fmt: skip


def diagnosis(replies: Sequence[Reply], depth: int, vocabulary: Collection[int] | None) -> dict[str, Any]:
    """For report.json. vocabulary: the draft's, None where it has all tokens."""
    acceptance = Acceptance.of((step for reply in replies for step in reply.drafted.steps), depth)
    found = Found(acceptance, slices(replies, vocabulary))
    gains = [(remedy, gain) for remedy in REMEDIES if acceptance.steps and (gain := remedy.gain(found))]
    gains = sorted((one for one in gains if one[1][0] >= WORTH), key=lambda one: -one[1][0])[:SAID]
    return {
        "slices": {group: [one.to_json() for one in some] for group, some in found.slices.items()},
        "remedies": [
            {"name": remedy.name, "tau_gain": gain, "why": why, "what": remedy.what} for remedy, (gain, why) in gains
        ],
    }


def diagnosis_lines(found: dict[str, Any]) -> Iterator[str]:
    """For people; the categories are in the report's own table."""
    rows = [
        (group, one) for group, some in found["slices"].items() if group != CATEGORY and len(some) > 1 for one in some
    ]
    if rows:
        width = max(len(f"{group} {one['name']}") for group, one in rows)
        yield ""
        yield f"{'':{width}}  drafts     τ  pos 1"
        for group, one in rows:
            name = f"{group} {one['name']}"
            yield f"{name:{width}}{one['drafts']:>8}{one['tau']:>6.2f}{one['first_accepted']:>7.3f}"
    if found["remedies"]:
        yield ""
        yield "Likeliest remedies, by what each can bring to τ at most:"
        for one in found["remedies"]:
            yield f"  +{one['tau_gain']:.2f}  {one['name']}: {one['why']}. To do: {one['what']}."
