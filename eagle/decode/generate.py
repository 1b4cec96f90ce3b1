"""The loop: draft a tree, verify it with the target in one pass, keep what the target chose.

                     prompt                    the draft row i is (embed(x[i+1]), f[i])
    target rows  x[0] ... x[P-1]               -> f[0] ... f[P-1], and x[P] from the last one
    draft rows   (x[1], f[0]) ... (x[P], f[P-1])   -> the drafted nodes behind x[P]
    target rows  x[P] and the drafted nodes    -> their features, the path that was right, and one token more
    draft rows   for that path, with the target's features; and so on

Neither side ever computes a row of the true sequence twice, and ``lm_head`` sees only rows whose logits are used.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from eagle.decode.acceptance_rule import settle
from eagle.decode.drafter import Drafter, DraftRunner, Proposal
from eagle.decode.sampling import Sampling, draw
from eagle.decode.target import Target
from eagle.decode.tree_verification import Verdict, follow
from eagle.drafts.network import DraftNetwork
from eagle.streams import Clock
from eagle.target.features import HIDDEN_STATE


@dataclass(frozen=True, slots=True)
class Step:
    """One verification.

    accepted: drafted tokens that the target chose too. tried: depths at which it had drafted tokens to choose from on
    its way, `accepted` or one more. order: the ranks (see `Tree`) of the accepted nodes. Seconds of either side.
    is_outside: all of the last depth was rejected for a token that is not in the draft's vocabulary.
    """

    accepted: int
    tried: int
    order: tuple[int, ...]
    draft_seconds: float
    target_seconds: float
    is_outside: bool = False


@dataclass(slots=True)
class Generation:
    """What came behind one prompt. tokens: up to a stop token, that included. seconds: all of it, prefill included."""

    tokens: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    prefill_seconds: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: list[int], limit: int, stop: Collection[int]) -> bool:
        """Append tokens up to the limit or a stop token. Returns whether there is more to come."""
        for token in tokens:
            self.tokens.append(token)
            if token in stop or len(self.tokens) == limit:
                return False
        return True


class SpeculativeDecoder:
    """A target with a draft. One sequence at a time; the random generator goes on from one to the next."""

    def __init__(self, target: Target, draft: DraftNetwork, drafter: Drafter, sampling: Sampling) -> None:
        self.target, self.draft, self.drafter, self.sampling = target, draft, drafter, sampling
        self.generator = sampling.generator(target.device)
        #: What a pass of the target has to give: its own logits come from the first, the draft reads the other.
        self.names = tuple(dict.fromkeys((HIDDEN_STATE, draft.reads)))
        #: The tokens that the draft chooses among, where these are not all. The host has read them once and for all.
        self.vocabulary = None if draft.ids is None else frozenset(draft.ids.tolist())
        if self.vocabulary is not None and len(self.vocabulary) == len(target.head):
            self.vocabulary = None

    @torch.inference_mode()
    def generate(self, prompt: list[int], max_new_tokens: int, stop: Collection[int] = ()) -> Generation:
        """Continue the prompt's tokens by up to `max_new_tokens`, or to the first token in `stop`."""
        target, device, result = self.target, self.target.device, Generation()
        started, clock = time.perf_counter(), Clock(device)
        rows = len(prompt) + max_new_tokens
        cache = target.new_cache(rows + self.drafter.nodes + 1)
        draft = DraftRunner(self.draft, target.head, rows + self.drafter.nodes + self.drafter.rows + 1)
        ids = torch.tensor(prompt, device=device)
        features = target.features(ids, cache, names=self.names)
        cache.keep(len(prompt))
        root = self.sampling.choose(target.logits(features[HIDDEN_STATE][-1:]), self.generator)
        more = result.add(root.tolist(), max_new_tokens, stop)
        clock.mark()
        verdicts: list[Verdict] = []
        tokens = torch.cat((ids[1:], root))
        while more:
            predicted = draft.advance(tokens, features[self.draft.reads])
            proposal = self.drafter.propose(root, predicted, draft, self.generator)
            clock.mark()
            tree = proposal.tree
            features = target.features(proposal.tokens, cache, (tree.depths, tree.ancestors), self.names)
            choices = self.choices(target.logits(features[HIDDEN_STATE]), proposal)
            verdict = follow(proposal.tokens, tree, choices)
            nodes = verdict.nodes
            cache.keep(len(verdict.path), None if verdict.is_prefix else nodes)
            more = result.add(verdict.tokens, max_new_tokens, stop)
            tokens, features = choices[nodes], {name: rows[nodes] for name, rows in features.items()}
            root = tokens[-1:]
            verdicts.append(verdict)
            clock.mark()
        result.prefill_seconds, *seconds = clock.seconds()
        result.seconds = time.perf_counter() - started
        for verdict, drafting, verifying in zip(verdicts, seconds[::2], seconds[1::2], strict=True):
            accepted, last = len(verdict.order), verdict.tokens[-1]
            is_outside = verdict.tried > accepted and self.vocabulary is not None and last not in self.vocabulary
            result.steps.append(Step(accepted, verdict.tried, verdict.order, drafting, verifying, is_outside))
        return result

    def choices(self, logits: torch.Tensor, proposal: Proposal) -> torch.Tensor:
        """The target's token ``[N+1]`` behind each node, from its logits ``[N+1, V]``."""
        if proposal.q is None or proposal.children is None:
            return self.sampling.choose(logits, self.generator)
        p = self.sampling.distribution(logits)
        choices = draw(p, self.generator).squeeze(1)
        candidates = torch.where(proposal.children < 0, -1, proposal.tokens[proposal.children])
        choices[proposal.parent_nodes] = settle(p[proposal.parent_nodes], proposal.q, candidates, self.generator)
        return choices


@torch.inference_mode()
def generate_alone(
    target: Target, prompt: list[int], max_new_tokens: int, sampling: Sampling, stop: Collection[int] = ()
) -> Generation:
    """The target without a draft, one token a pass: what speculation is measured against."""
    started, result, generator = time.perf_counter(), Generation(), sampling.generator(target.device)
    cache = target.new_cache(len(prompt) + max_new_tokens)
    tokens, more = torch.tensor(prompt, device=target.device), True
    while more:
        hidden_state = target.features(tokens, cache)[HIDDEN_STATE]
        cache.keep(len(tokens))
        tokens = sampling.choose(target.logits(hidden_state[-1:]), generator)
        more = result.add(tokens.tolist(), max_new_tokens, stop)
        if not result.prefill_seconds:
            result.prefill_seconds = time.perf_counter() - started
    result.seconds = time.perf_counter() - started
    return result
