"""What the target chooses after a node whose drafted children were drawn by chance (EAGLE section 3.3, SpecInfer).

The token emitted after a node is always the target's choice there, so the output is the target's own if every choice is
distributed as the target's next token:

    greedy                      the most likely token
    fixed candidates            a draw from p: the draft's candidates do not depend on chance, so nothing needs mending
    candidates drawn from q     `settle`: accept with min(1, p/q), else draw from what is left
"""

from __future__ import annotations

import torch

from eagle.decode.sampling import draw


def settle(p: torch.Tensor, q: torch.Tensor, candidates: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The target's choice behind each of E nodes whose candidates were drawn from `q` without replacement.

    p: ``[E, V]``, the target's distribution. q: ``[E, V]``, the draft's. candidates: ``[E, C]`` in the order they
    were drawn, -1 where there are none left. Returns ``[E]``, distributed as p whatever q is.

    A candidate x is accepted with probability min(1, p(x) / q(x)). Where it is not, what is left of the target's
    distribution is p <- norm(max(p - q, 0)); the next candidate was drawn from q <- norm(q without x).
    """
    choice = torch.full_like(candidates[:, 0], -1)
    for x in candidates.unbind(1):
        at = x.clamp(min=0).unsqueeze(1)
        p_x, q_x = p.gather(1, at).squeeze(1), q.gather(1, at).squeeze(1)
        # Where q had nothing more to offer, the candidate is no draw from it and cannot be judged as one.
        is_draw = (x >= 0) & (q_x > 0)
        chance = torch.rand(p_x.shape, generator=generator, device=p.device)
        accepted = is_draw & (chance * q_x < p_x)
        choice = torch.where((choice < 0) & accepted, x, choice)
        left = (p - q).clamp_(min=0)
        total = left.sum(1, keepdim=True)
        p = torch.where(is_draw.unsqueeze(1) & (total > 0), left / total, p)
        q = q.scatter(1, at, torch.where(x >= 0, 0.0, q_x).unsqueeze(1))
        q = q / q.sum(1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
    return torch.where(choice < 0, draw(p, generator).squeeze(1), choice)
