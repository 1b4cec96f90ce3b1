"""A random target of any shape and a random store for it: all that training reads, and nothing that only names it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from eagle.store.record import Record
from eagle.store.shard import write_shard
from eagle.target.config import load_config
from eagle.target.features import aux_name
from eagle.target.trunk import expected_tensors
from eagle.tensor_file import write_tensors


def write_random_target(
    folder: Path, *, vocab: int, hidden: int, inner: int, heads: int, kv_heads: int, family: str = "llama",
    tied: bool = False, layers: int = 1, dtype: torch.dtype = torch.float32,
) -> Path:  # fmt: skip
    """A base model's folder: config.json and the weights of its layers."""
    folder.mkdir(parents=True)
    write_config(folder, vocab, hidden, inner, heads, kv_heads, family, tied, layers)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(*size, generator=generator) * 0.02).to(dtype)
        for name, size in expected_tensors(load_config(folder)).items()
    }
    write_tensors(folder / "model.safetensors", tensors)
    return folder


def write_config(
    folder: Path,
    vocab: int,
    hidden: int,
    inner: int,
    heads: int,
    kv_heads: int,
    family: str,
    tied: bool,
    layers: int = 1,
) -> None:
    content: dict[str, Any] = {
        "model_type": family,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
    }
    (folder / "config.json").write_text(json.dumps(content))


def write_random_store(
    folder: Path, *, vocab: int, hidden: int, records: int, length: int, dtype: torch.dtype = torch.float32,
    aux_layers: tuple[int, ...] = (),
) -> Path:  # fmt: skip
    """A store of `records` conversations of `length` tokens each, all supervised: the most a batch can hold.

    aux_layers: those whose inputs are among its features, where there are any.
    """
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    content = [
        Record(
            number,
            torch.randint(vocab, (length,), generator=generator, dtype=torch.int32),
            torch.ones(length, dtype=torch.uint8),
            torch.randn(length, hidden, generator=generator).to(dtype),
            {
                aux_name(layers): torch.randn(length, len(layers) * hidden, generator=generator).to(dtype)
                for layers in ([aux_layers] if aux_layers else [])
            },
        )
        for number in range(records)
    ]
    write_shard(folder / "shard-00000.safetensors", content)
    return folder


#: Trains, then says how far this process's memory went.
_MEASURE = """
import sys
from eagle.device import process_peak
from eagle.train.main import main
code = main(sys.argv[1:])
print("measured", process_peak() >> 20)
sys.exit(code)
"""


def planned_and_measured(run: Callable[..., str], *options: object) -> dict[str, float]:
    """MiB of a run's process: what ``--dry_run`` says, of that the runtime, and what the process really came to.

    run: runs a command of words in a process of its own and gives what it printed.
    """
    text = run("-m", "eagle.train.main", *options, "--dry_run")
    planned = _number(r"^peak ([\d,]+) MiB", text) + _number(r"may show as ([\d,]+) MiB more", text)
    measured = _number(r"^measured (\d+)", run("-c", _MEASURE, *options))
    return {"runtime": _number(r"^  runtime .*? ([\d,.]+)$", text), "planned": planned, "measured": measured}


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text, re.MULTILINE)
    assert found, f"{pattern!r} is not in:\n{text}"
    return float(found[1].replace(",", ""))
