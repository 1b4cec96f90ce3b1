"""A tiny target that was taught the tests' few sentences: what it says next can be learned, by a draft too."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import conversations, make_target

#: Tokens of a prompt.
PROMPT = 24


def teach_target(folder: Path, steps: int = 60) -> list[list[int]]:
    """Write the target; prompts for it, ``[8, PROMPT]``. A draft of `conversations` is right about every other time."""
    make_target(folder, hidden=128, layers=7, initializer_range=0.05)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [" ".join(turn["value"] for turn in talk["conversations"]) for talk in conversations(64, seed=9)]
    ids = torch.tensor([token for text in texts for token in tokenizer(text)["input_ids"]])
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(ids) - 64, (8,), generator=generator).tolist()
        batch = torch.stack([ids[start : start + 64] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return [ids[start : start + PROMPT].tolist() for start in range(100, len(ids) - PROMPT, len(ids) // 8)][:8]
