"""Run a page's blocks of shell in order, as somebody types them, in a folder in which what they name is there."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from eagle.files import ROOT
from tests.npu import stand_ins
from tests.tiny import conversations, make_target

#: Seconds that a block may take.
PATIENCE = 600
#: Conversations in the guide's data: two for each of eight workers.
COUNT = 16


class Typist:
    """A shell in the folder: exports of one block are there in the next.

    replacements: what a user fills in, or what is of the machine: a text, and what stands for it here.
    machines: how many run a block that asks which of them it is on, by ``$NODE_RANK``; side by side.
    """

    def __init__(
        self, work: Path, environment: Mapping[str, str], replacements: Mapping[str, str], machines: int = 1
    ) -> None:
        self.work, self.replacements, self.machines = work, replacements, machines
        stand_ins.install(work / "bin", work / "library", ROOT)
        self.shell = dict(environment) | {"PATH": f"{work / 'bin'}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}

    def type(self, block: str) -> str:
        """What it said. Raises: AssertionError where one of its commands fails, with all that was said."""
        for text, here in self.replacements.items():
            block = block.replace(text, here)
        ranks = range(self.machines if "$NODE_RANK" in block else 1)
        with ThreadPoolExecutor(self.machines) as pool:
            return "".join(pool.map(lambda rank: self._type(block, rank), ranks))

    def _type(self, block: str, rank: int) -> str:
        kept = self.work / f"shell-{rank}"
        own = {"NODE_RANK": str(rank)} if "NODE_RANK" in self.shell else {}
        done = subprocess.run(
            ["/bin/bash", "-euo", "pipefail", "-c", f'{block}\nenv -0 > "{kept}"'],
            cwd=self.work,
            env={**self.shell, **own},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, f"exit code {done.returncode} of\n{block}\n{done.stdout}"
        if rank == 0:
            self.shell = dict(line.split("=", 1) for line in kept.read_text().split("\0") if line)
        return done.stdout


def free_port() -> int:
    with socket.socket() as end:
        end.bind(("127.0.0.1", 0))
        return end.getsockname()[1]


def checkout(work: Path) -> None:
    """The folder that the guide is read in: links to this checkout, and room for configs, whose sizes are others."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("requirements*.txt"), ROOT / "eagle", ROOT / "tools"]:
        (work / path.name).symlink_to(path)
    (work / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "fsdp.yaml", work / "configs")
    cann = work / "Ascend" / "cann"
    cann.mkdir(parents=True)
    (cann / "set_env.sh").write_text(
        "export ASCEND_TOOLKIT_HOME=$(dirname $BASH_SOURCE)\nexport LD_LIBRARY_PATH=$ASCEND_TOOLKIT_HOME/lib64\n"
    )


def target(work: Path, name: str, config: str, family: str = "llama", **more: object) -> None:
    """A tiny model under the name of a large one, and its draft's config under the name of the large one's."""
    folder = make_target(work / name, family, max_shard_size="50KB", **more)  # type: ignore[arg-type]
    shapes = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1}
    shapes.pop("layer_types", None)
    (work / "configs" / config).write_text(json.dumps(shapes))


def served(work: Path) -> None:
    """What the guide serves, as far as the stand-ins look at it: a base model, and a draft in both layouts."""
    folders = {
        "llama-2-7b-chat": ({}, ["model.norm.weight"]),
        "checkpoints-vllm": ({"architectures": ["LlamaForCausalLM"]}, ["model.fc.weight"]),
        "checkpoints-v0": ({"model_type": "eagle", "model": {}}, ["lm_head.weight", "embed_tokens.weight"]),
    }
    for name, (config, tensors) in folders.items():
        (work / name).mkdir(parents=True)
        (work / name / "config.json").write_text(json.dumps(config))
        save_file({tensor: torch.zeros(1) for tensor in tensors}, work / name / "model.safetensors")


def data(work: Path) -> None:
    """Half of the conversations in each of two formats, from which section 4 makes the file that the others read."""
    turns = [[turn["value"] for turn in record["conversations"]] for record in conversations(COUNT, turns=1)]
    asked = [{"instruction": question, "input": "", "output": reply} for question, reply in turns[: COUNT // 2]]
    (work / "alpaca.json").write_text(json.dumps(asked))
    roles = ("user", "assistant")
    chats = [
        {"messages": [{"role": role, "content": text} for role, text in zip(roles, pair, strict=True)]}
        for pair in turns[COUNT // 2 :]
    ]
    (work / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))


def losses(cpdir: Path) -> list[float]:
    lines = [json.loads(line) for line in (cpdir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]
