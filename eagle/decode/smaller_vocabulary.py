"""What a draft would still get accepted if it chose among fewer tokens: those of its own that are most frequent.

A smaller ``--draft_vocab_size`` of the same training keeps the most frequent supervised tokens, so where their counts
are known, so is which tokens it would keep. That it would be right about these as often as the larger one is assumed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from eagle.decode.replies import Reply
from eagle.decode.serving_choice import Measured
from eagle.decode.step_costs import Shape
from eagle.errors import RequestError
from eagle.store.reader import FeatureStore
from eagle.target.identity import Identity


def order_of(
    store: Path, identity: Identity, vocabulary: int, own: Iterable[int] | None, max_len: int | None = None
) -> np.ndarray:
    """`by_frequency` of a store. vocabulary: the target's size. max_len: to which training cut its records, where that
    is known.

    Raises: FileNotFoundError, RequestError for a store of another base model.
    """
    opened = FeatureStore(store)
    for manifest in opened.manifests.values():
        if not identity.is_named((manifest.get("target") or {}).get("fingerprint")):
            raise RequestError(
                f"--tmpdir {store} is of another base model than --base-path {identity.folder}. Name the store that "
                "the draft was trained on."
            )
    return by_frequency(opened.token_counts(vocabulary, max_len), own)


def by_frequency(counts: np.ndarray, own: Iterable[int] | None) -> np.ndarray:
    """The draft's tokens, the most frequent first. counts: ``[V]``. own: None where the draft has all tokens."""
    ids = np.arange(len(counts)) if own is None else np.array(sorted(own))
    return ids[np.lexsort((ids, -counts[ids]))]


def cut(replies: Sequence[Reply], depth: int, kept: Collection[int]) -> list[float]:
    """The share of drafts whose first, ... token would be accepted, where a token that is not kept ends a chain.

    replies: decoded with chains of `depth` tokens.
    """
    counts, steps = [0] * depth, 0
    for reply in replies:
        start = 1
        for step in reply.drafted.steps:
            chain = reply.drafted.tokens[start : start + step.accepted]
            within = next((at for at, token in enumerate(chain) if token not in kept), step.accepted)
            for at in range(within):  # what was accepted past the reply's end, whose tokens are gone, is counted there
                counts[at] += 1
            steps += 1
            start += step.accepted + 1
    return [count / max(1, steps) for count in counts]


def by_coverage(accepted: Sequence[float], outputs: Sequence[Sequence[int]], own: Collection[int] | None,
                kept: Collection[int]) -> list[float]:  # fmt: skip
    """The same where single steps are not known: each further token is accepted so much less often as less of the
    output is among the tokens."""
    tokens = [token for output in outputs for token in output]
    held = sum(own is None or token in own for token in tokens)
    share = sum(token in kept for token in tokens) / max(1, held)
    return [rate * share**at for at, rate in enumerate(accepted, start=1)]


def coverage(outputs: Iterable[Sequence[int]], kept: Collection[int]) -> float:
    tokens = [token for output in outputs for token in output]
    return sum(token in kept for token in tokens) / max(1, len(tokens))


def smaller(
    draft: Measured,
    shapes: Iterable[Shape],
    order: np.ndarray,
    outputs: Sequence[Sequence[int]],
    replies: Sequence[Reply] | None = None,
) -> list[Measured]:
    """The draft with each smaller vocabulary among the shapes. order: as `by_frequency`. outputs: the replies' tokens.
    replies: the same with their steps, where they are known."""
    found, own = [], frozenset(order.tolist())
    for shape in shapes:
        same = Shape(draft.shape.family, shape.draft_vocab_size, draft.shape.layer)
        if shape != same or shape.draft_vocab_size >= draft.shape.draft_vocab_size:
            continue
        kept = frozenset(order[: shape.draft_vocab_size].tolist())
        if replies is None:
            accepted = by_coverage(draft.accepted, outputs, own, kept)
        else:
            accepted = cut(replies, len(draft.accepted), kept)
        share, now = coverage(outputs, kept), coverage(outputs, own)
        how = f"an estimate: its tokens are {share:.1%} of these replies ({draft.shape.draft_vocab_size:,}: {now:.1%})"
        how += ", and it is taken to be as often right"
        found.append(Measured(draft.name, shape, tuple(accepted), draft.drafts, how))
    return found
