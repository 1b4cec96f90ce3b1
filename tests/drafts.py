"""Rigged drafts: their answers are known, so what decoding makes of them is known too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from eagle.decode.target import Target, load_target
from eagle.drafts.choices import DraftChoices
from eagle.drafts.eagle1.network import Eagle1Network
from eagle.drafts.eagle3.draft_config import draft_config_for
from eagle.drafts.eagle3.network import Eagle3Network
from eagle.drafts.network import DraftNetwork
from eagle.target.trunk import from_pretrained_dtype

CPU = torch.device("cpu")


def tiny_target(folder: Path, dtype: torch.dtype = torch.float32) -> Target:
    return load_target(folder, dtype, CPU)


def random_draft(target: Target, seed: int = 1, std: float = 0.3) -> Eagle1Network:
    """Every weight random."""
    torch.manual_seed(seed)
    draft = Eagle1Network(target.config.draft(), target.embedding.data)
    for parameter in draft.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    return draft.requires_grad_(False).eval().to(target.head.dtype)


def random_eagle3_draft(target: Target, vocabulary: torch.Tensor, seed: int = 1, std: float = 0.3) -> Eagle3Network:
    """Every weight random. vocabulary: ``[D]``, the tokens it chooses among, ascending."""
    torch.manual_seed(seed)
    config = draft_config_for(target.config, None, DraftChoices((0, 1), len(vocabulary)))
    draft = Eagle3Network(config, target.embedding.data)
    for parameter in draft.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    draft.choose(vocabulary)
    return draft.requires_grad_(False).eval().to(target.head.dtype)


def trained_draft(target: Target, prompt: list[int], tokens: list[int], features: torch.Tensor) -> Eagle1Network:
    """A random draft after some steps on one continuation; right about much of it, and about little else."""
    draft = random_draft(target, std=0.1)
    trained = [p.requires_grad_() for name, p in draft.named_parameters() if name != "embed_tokens.weight"]
    sequence = torch.tensor([prompt + tokens])
    wanted = target.logits(features[1:-1]).argmax(-1)
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for _ in range(40):
        predicted = draft(sequence[:, 1:-1], features[None, :-2])[0]
        loss = nn.functional.cross_entropy(target.logits(predicted), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return draft.requires_grad_(False)


class RiggedDraft(DraftNetwork):
    """Predicts, at position t, what it is told of the target's own greedy continuation: right says where truly.

    features: ``[T, H]``, the target's along prompt and continuation. right: by position; wrong features are the true
    ones turned round, whose likeliest token is the target's least likely one.
    """

    def __init__(self, target: Target, features: torch.Tensor, right: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.reads = "hidden_state"
        self.config = target.config.draft()
        self.features, self.right = features, right

    def read(self, features):
        return features

    def for_head(self, states):
        return states

    def forward(self, tokens, features, positions, mask, remember):
        shape = (1, self.config.num_key_value_heads, tokens.shape[1], self.config.head_dim)
        remember(torch.zeros(shape, dtype=features.dtype), torch.zeros(shape, dtype=features.dtype))
        true = self.features[(positions + 1).clamp(max=len(self.features) - 1)]
        return torch.where(self.right(positions).unsqueeze(-1), true, -true)


RIGGED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "always right": lambda positions: torch.ones_like(positions, dtype=torch.bool),
    "always wrong": lambda positions: torch.zeros_like(positions, dtype=torch.bool),
    "right two times of three": lambda positions: positions % 3 != 0,
}


def greedy_by_transformers(folder: Path, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """The target's own greedy continuation and the features ``[T, H]`` along all of it, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, **from_pretrained_dtype(torch.float32)).eval()
    with torch.no_grad():
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return ids[0, len(prompt) :].tolist(), model.model(ids).last_hidden_state[0]
