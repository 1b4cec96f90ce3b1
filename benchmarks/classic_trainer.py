"""Trains as EAGLE's published trainer does (``train/main.py`` of eagle-llm 1.2.1), over our records:

    python benchmarks/classic_trainer.py --basepath ... --tmpdir ... --metrics metrics.jsonl --steps 12

Sequences in random order padded to a batch's longest, the head over every padded position with all logits at once,
softmax and log-softmax of them, a gradient-checkpointed layer with plain attention, its accuracies taken from the full
logits, values clipped. It starts at random, and is given the alignment and the learning rate of ours. Ends after
`--steps`, or after `--seconds` of training or once validation has found `--until_tau`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import benchmarks  # noqa: F401  keeps folders of the user's from being imported
from eagle.device import choose_kind
from eagle.drafts.alignment import Batch
from eagle.drafts.eagle1.draft_config import draft_config_for
from eagle.drafts.eagle1.network import Eagle1Network
from eagle.drafts.eagle1.objective import Eagle1Objective
from eagle.drafts.objective import LossOptions
from eagle.drafts.token_loss import TokenLossHead
from eagle.drafts.unroll import UnrolledDraft
from eagle.entry import run
from eagle.store.reader import FeatureStore
from eagle.target.config import ModelConfig, load_config
from eagle.target.weights import Weights, read_embedding, read_head
from eagle.train.dataset import FeatureDataset, keep_apart, split_store
from eagle.train.loader import Key, Loader
from eagle.train.options import TrainOptions
from eagle.train.validation import validate

#: Steps between validations, where it trains for so many seconds.
VALIDATE_EVERY = 50


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--basepath", type=Path, required=True, help="folder of the base model")
    add("--tmpdir", type=Path, required=True, help="the store of step 3")
    add("--metrics", type=Path, required=True, help="write a line a step, and one a validation, to this file")
    add("--bs", type=int, default=4, help="sequences a step")
    add("--max_len", type=int, default=512, help="cut records to this many tokens")
    end = parser.add_mutually_exclusive_group(required=True)
    end.add_argument("--steps", type=int, help="end after so many steps")
    end.add_argument("--seconds", type=float, help="end after so many seconds of training")
    add("--until_tau", type=float, default=float("inf"), help="with --seconds: end once validation finds this τ")
    return parser


class PublishedTrainer:
    """The published trainer's loop over our records; its metrics have the same lines as ours."""

    noise = 0.1

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.accelerator = args, Accelerator(mixed_precision="bf16", cpu=choose_kind() == "cpu")
        target, weights = load_config(args.basepath), Weights(args.basepath)
        embedding = read_embedding(weights, target)
        head = embedding if target.tie_word_embeddings else read_head(weights, target)
        torch.manual_seed(0)
        self.draft: Any = self.network(target, weights, embedding, head).to(self.accelerator.device)
        self.head = nn.Linear(target.hidden_size, target.vocab_size, bias=False)
        self.head.weight = nn.Parameter(head.float(), requires_grad=False)
        self.head.to(self.accelerator.device)
        self.lr = TrainOptions(Path(), args.basepath, args.tmpdir).learning_rate(target.hidden_size)
        trained = [parameter for parameter in self.draft.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=self.lr, betas=(0.9, 0.95))
        store = FeatureStore(args.tmpdir)
        train, held_out = split_store(store, 0.05, 42)
        train, _ = keep_apart(store, train, held_out, args.max_len)
        self.train = FeatureDataset(store, train, args.max_len, self.draft.reads, noise=self.noise)
        self.held_out = FeatureDataset(store, held_out, args.max_len, self.draft.reads)
        self.step, self.seconds = 0, 0.0

    def network(self, target: ModelConfig, weights: Weights, embedding: torch.Tensor, head: torch.Tensor) -> nn.Module:
        """The draft. embedding, head: the base model's."""
        return Eagle1Network(draft_config_for(target, None), embedding.float())

    def fit(self) -> None:
        """Until so many steps are done, so many seconds have passed, or the validation τ is reached."""
        args, epoch = self.args, 0
        while True:
            order = np.random.RandomState(epoch).permutation(len(self.train))
            for at in range(0, len(order), args.bs):
                stored = self.train.batch(epoch, order[at : at + args.bs].tolist())
                started = time.perf_counter()
                supervised = self.one_step(stored.to(self.accelerator.device).prepared(torch.float32))
                self.seconds += time.perf_counter() - started
                self.step += 1
                self.write(supervised_tokens=supervised)
                if self.step == args.steps:
                    return
                if args.seconds and self.step % VALIDATE_EVERY == 0:
                    tau = self.validate()
                    if tau >= args.until_tau or self.seconds > args.seconds:
                        return
            epoch += 1

    def one_step(self, batch: Batch) -> int:
        # The head runs over every position of the batch, counted or not.
        targets = batch.features.new_zeros(batch.features.shape)
        targets.flatten(0, 1)[batch.places] = batch.targets.float()
        self.warm_up()
        with self.accelerator.autocast():
            predict = torch.utils.checkpoint.checkpoint(self.layer, batch, use_reentrant=False)
            with torch.no_grad():
                target_head = self.head(targets)
                target_p = target_head.softmax(2)
            out_head = self.head(predict)
            out_logp = out_head.log_softmax(2)
            mask = batch.supervised[:, :, None].float()
            count = mask.sum() + 1e-5
            token_loss = -torch.sum(torch.sum(mask * (target_p * out_logp), 2)) / count
            feature_loss = functional.smooth_l1_loss(predict, targets, reduction="none")
            feature_loss = torch.sum(torch.mean(mask * feature_loss, 2)) / count
            loss = feature_loss + 0.1 * token_loss
        loss.backward()
        nn.utils.clip_grad_value_(self.draft.parameters(), 0.5)
        self.optimizer.step()
        with torch.no_grad():
            agreed = out_head.max(2).indices == target_head.max(2).indices
            self.accuracy = float((agreed * batch.supervised).sum() / count)
            out_head[batch.supervised].topk(3, dim=-1)
        return int(batch.supervised.sum())

    def warm_up(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (self.step + 1) / 20)
        self.optimizer.zero_grad()

    def layer(self, batch: Batch) -> torch.Tensor:
        """The draft with attention scores that exist as a tensor."""
        draft, layer = self.draft, self.draft.layers[0]
        hidden = draft.fc(draft.inputs(batch.tokens, batch.features))
        length = hidden.shape[1]
        positions = torch.arange(length, device=hidden.device)[None]
        attention = layer.self_attn
        queries, keys, values = attention.project(hidden, draft.rotary(hidden, positions))
        groups = attention.heads // attention.kv_heads
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        scores = queries @ keys.transpose(2, 3) / attention.head_dim**0.5
        scores = scores + torch.full((length, length), torch.finfo(scores.dtype).min, device=scores.device).triu(1)
        mixed = scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values
        hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def validate(self) -> float:
        """Our validation, whose time does not count."""
        head = TokenLossHead(self.head.weight.detach().bfloat16())
        judge = Eagle1Objective(head, LossOptions())
        keys = [Key(0, (index,)) for index in range(len(self.held_out))]
        with Loader(self.held_out, keys, self.accelerator.device, head.weight.dtype, threads=0) as loader:
            batches = (batch for group in loader.groups(1) for batch in loader.on_device(group))
            found = validate(self.accelerator, UnrolledDraft(self.draft), judge, batches)
        self.write(**found.metrics())
        return found.tau[-1]

    def write(self, **values: object) -> None:
        line = {"step": self.step, **values, "seconds": self.seconds}
        with self.args.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def main() -> int:
    PublishedTrainer(make_parser("Training as the published trainer does it.").parse_args()).fit()
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
