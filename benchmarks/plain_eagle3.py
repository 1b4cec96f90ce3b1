"""Trains EAGLE-3 drafts plainly, much as the published trainer does (SafeAILab/EAGLE, ``traineagle3``):

    python benchmarks/plain_eagle3.py --basepath ... --tmpdir ... --metrics metrics.jsonl --steps 12 --ttt_steps 7 \\
        --draft_vocab_size 8192

The target's and every draft step's logits at all padded positions at once, softmax and log-softmax of them, a
gradient-checkpointed layer whose attention scores exist as a tensor: all of the first step's keys, and of every later
step's the one at the same row, since tokens move left from step to step. Values clipped; random weights to begin with.
It computes what ours does: unlike there, a step's output is detached before the next reads it, and the target's softmax
is computed once for all steps.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.classic_trainer import PublishedTrainer, make_parser
from eagle.drafts.alignment import Batch
from eagle.drafts.choices import DraftChoices
from eagle.drafts.eagle3.draft_config import draft_config_for
from eagle.drafts.eagle3.network import Eagle3Network
from eagle.drafts.eagle3.vocabulary import most_frequent
from eagle.entry import run
from eagle.store.reader import FeatureStore
from eagle.target.config import ModelConfig
from eagle.target.features import aux_layers
from eagle.target.weights import Weights, read_norm

#: Weight of a step's loss against the one before, as published.
DECAY = 0.8


class PlainEagle3Trainer(PublishedTrainer):
    """The loop of the published EAGLE-3 trainer."""

    noise = 0.0

    def network(self, target: ModelConfig, weights: Weights, embedding: torch.Tensor, head: torch.Tensor) -> nn.Module:
        store = FeatureStore(self.args.tmpdir)
        layers = next(layers for name in store.widths if (layers := aux_layers(name)))
        choices = DraftChoices(aux_layers=layers, draft_vocab_size=self.args.draft_vocab_size)
        draft = Eagle3Network(draft_config_for(target, None, choices), embedding.float())
        ids = torch.from_numpy(most_frequent(store.token_counts(target.vocab_size), len(draft.d2t)))
        draft.choose(ids)
        with torch.no_grad():
            draft.lm_head.weight.copy_(head[ids])
            draft.norm.weight.copy_(read_norm(weights, target))
        self.ids = ids.to(self.accelerator.device)
        return draft

    def one_step(self, batch: Batch) -> int:
        targets = batch.features.new_zeros(*batch.tokens.shape, self.draft.config.hidden_size)
        targets.flatten(0, 1)[batch.places] = batch.targets.float()
        self.warm_up()
        draft, loss = self.draft, 0.0
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        accuracies: list[float] = []
        tokens, mask = batch.tokens, batch.supervised.clone()
        with self.accelerator.autocast():
            with torch.no_grad():
                logits = self.head(targets)
                known = torch.isin(logits.argmax(-1), self.ids)
                target_p = logits[..., self.ids].softmax(-1, dtype=torch.float32)
                del logits
            supervised = int(mask.sum())
            states = draft.read(batch.features)
            for step in range(self.args.ttt_steps):
                states, key, value = torch.utils.checkpoint.checkpoint(
                    self.layer, tokens, states, step, tuple(keys), tuple(values), use_reentrant=False
                )
                keys.append(key)
                values.append(value)
                out = draft.lm_head(draft.for_head(states))
                counted = (mask & known).float()
                spread = torch.sum(target_p * out.log_softmax(-1, dtype=torch.float32), -1)
                loss = loss - DECAY**step * torch.sum(counted * spread) / (counted.sum() + 1e-5)
                with torch.no_grad():
                    agreed = out.argmax(-1) == target_p.argmax(-1)
                    accuracies.append(float((agreed * counted).sum() / (counted.sum() + 1e-5)))
                states = states.detach()
                tokens, known = moved(tokens), moved(known)
                mask, target_p = mask & moved(batch.supervised, step + 1), moved(target_p)
        loss.backward()
        nn.utils.clip_grad_value_(draft.parameters(), 0.5)
        self.optimizer.step()
        self.accuracy = accuracies[0]
        return supervised

    def layer(
        self,
        tokens: torch.Tensor,
        states: torch.Tensor,
        step: int,
        keys: tuple[torch.Tensor, ...],
        values: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The next states, and this step's keys and values. Row t: the chain that began there, at position t + step."""
        layer, attention = self.draft.midlayer, self.draft.midlayer.self_attn
        length = tokens.shape[1]
        positions = torch.arange(step, length + step, device=tokens.device)[None]
        normed = layer.hidden_norm(states)
        embedded = layer.input_layernorm(self.draft.embed_tokens(tokens).to(states.dtype))
        query, key, value = attention.project(torch.cat((embedded, normed), -1), self.draft.rotary(states, positions))
        groups = attention.heads // attention.kv_heads
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        keys, values = (*keys, key), (*values, value)
        scores = query @ keys[0].transpose(2, 3) / attention.head_dim**0.5
        scores = scores + torch.full((length, length), torch.finfo(scores.dtype).min, device=scores.device).triu(1)
        own = [(query * one).sum(-1, keepdim=True) / attention.head_dim**0.5 for one in keys[1:]]
        shares = torch.cat((scores, *own), -1).softmax(-1, dtype=torch.float32).to(value.dtype)
        mixed = shares[..., :length] @ values[0]
        for number, one in enumerate(values[1:]):
            mixed = mixed + shares[..., length + number, None] * one
        hidden = states + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), key, value


def moved(tensor: torch.Tensor, by: int = 1) -> torch.Tensor:
    """``[B, T, ...]`` to the left, zeros behind."""
    return functional.pad(tensor[:, by:], (0, 0) * (tensor.dim() - 2) + (0, by))


def main(argv: list[str] | None = None) -> int:
    parser = make_parser("EAGLE-3 training as its published trainer does it.")
    parser.add_argument("--ttt_steps", type=int, default=7, help="draft steps unrolled")
    parser.add_argument("--draft_vocab_size", type=int, help="tokens the draft chooses among")
    args = parser.parse_args(argv)
    if args.steps is None:
        parser.error("--seconds is for classic_trainer.py: here nothing is validated; expected --steps")
    PlainEagle3Trainer(args).fit()
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
