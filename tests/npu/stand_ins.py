"""Programs that the Ascend guide calls and that are not ours, as far as their arguments can be checked.

    python tests/npu/stand_ins.py docker run ...

Each ends with 2 where the real one would not understand its arguments, or could not find or load what they name. `LLM`
is vLLM's, as `eagle.vllm.verify` uses it. Nothing but the standard library is imported: they start at once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

#: What a container needs to use the cards, beside the cards themselves.
DEVICES = ("/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc")
DRIVER = ("/usr/local/dcmi", "/usr/local/Ascend/driver/lib64/", "/usr/local/Ascend/driver/version.info")
#: The most that Ascend's attention kernel verifies at once.
MOST_AT_ONCE = 16


class Misunderstood(Exception):
    """The real program would have ended here."""


def need(holds: object, why: str) -> None:
    if not holds:
        raise Misunderstood(why)


def parser(name: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=name, allow_abbrev=False)


def tensor_names(folder: Path) -> set[str]:
    with (folder / "model.safetensors").open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return set(json.loads(file.read(size))) - {"__metadata__"}


def check_model(folder: str) -> None:
    need((Path(folder) / "config.json").is_file(), f"{folder} is no model")


def check_draft(folder: str, layout: str) -> None:
    """As the vLLM for that layout finds it: its V1 engine ends at an lm_head, its V0 engine needs one."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    whole = {"lm_head.weight", "embed_tokens.weight"}
    held = tensor_names(Path(folder)) & whole
    if layout == "v1":
        need(config.get("architectures") == ["LlamaForCausalLM"] and not held, f"{folder} is no draft of layout v1")
    else:
        need(config.get("model_type") == "eagle" and "model" in config and held == whole, f"{folder} is not of v0")


def check_speculation(options: dict[str, Any], tensor_parallel: int) -> None:
    known = {"method", "model", "num_speculative_tokens", "draft_tensor_parallel_size"}
    need(set(options) <= known, f"speculative_config: {sorted(set(options) - known)}")
    need(options["method"] == "eagle", f"method {options['method']}")
    need(0 < options["num_speculative_tokens"] < MOST_AT_ONCE, "more tokens than are verified at once")
    need(options.get("draft_tensor_parallel_size", 1) in (1, tensor_parallel), "draft_tensor_parallel_size")
    check_draft(options["model"], "v1")


def docker(words: list[str]) -> None:
    options = parser("docker")
    options.add_argument("run", choices=["run"])
    for flag in ("--rm", "-it"):
        options.add_argument(flag, action="store_true")
    for flag in ("--name", "--network", "--shm-size", "-w"):
        options.add_argument(flag, required=True)
    for flag in ("--device", "-v"):
        options.add_argument(flag, action="append", required=True)
    options.add_argument("image")
    options.add_argument("command")
    given = options.parse_args(words)
    wanted = {*DEVICES, *(f"/dev/davinci{card}" for card in range(8))}
    need(set(given.device) == wanted, f"devices {sorted(set(given.device) ^ wanted)}")
    mounts = dict(mount.split(":") for mount in given.v)
    need(all(mounts.get(path) == path for path in DRIVER), f"the driver's mounts: {mounts}")
    need(given.w in mounts.values() and Path.cwd() == Path(next(iter(m for m in mounts if mounts[m] == given.w))), "-w")
    need(re.fullmatch(r"quay\.io/ascend/vllm-ascend:v\d+\.\d+\.\d+", given.image), f"image {given.image}")


def npu_smi(words: list[str]) -> None:
    need(words in (["info"], ["info", "-l"]), f"npu-smi {words}")
    print("Total Count                    : 8")


#: What an image brings, as pip lists it.
IMAGE = (
    "numpy==1.26.4",
    "tokenizers==0.22.1",
    "torch==2.8.0+cpu",
    "torch_npu==2.8.0",
    "transformers==4.57.1",
    "vllm==0.13.0",
)


def package_names(text: str) -> set[str]:
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return {re.split(r"[\s\[<>=!~;]", line)[0].lower() for line in lines if line}


def pip(words: list[str]) -> None:
    """A list that leaves the image's torch alone, and transformers too where the image's is to stay."""
    if words == ["list", "--format=freeze"]:
        print("\n".join(IMAGE))
        return
    options = parser("pip")
    options.add_argument("install", choices=["install"])
    for flag in ("-r", "-c"):
        options.add_argument(flag, type=Path, required=True)
    given = options.parse_args(words)
    wanted, kept = (package_names(path.read_text(encoding="utf-8")) for path in (given.r, given.c))
    need({"torch", "torch_npu", "numpy"} <= kept, f"{given.c} keeps {kept}")
    need("accelerate" in wanted and not wanted & (kept - {"numpy"}) and "-r" not in wanted, f"{given.r} has {wanted}")
    need("transformers" in wanted | kept, f"neither {given.r} nor {given.c} has transformers")


def curl(words: list[str]) -> None:
    need(words == ["-s", "http://localhost:8000/metrics"], f"curl {words}")
    for name, value in {"drafts": 10, "draft_tokens": 30, "accepted_tokens": 20}.items():
        print(f'vllm:spec_decode_num_{name}_total{{engine="0"}} {value}')


def vllm(words: list[str]) -> None:
    """vLLM Ascend 0.13's ``vllm serve``."""
    options = parser("vllm")
    options.add_argument("serve", choices=["serve"])
    options.add_argument("model")
    options.add_argument("--tensor-parallel-size", type=int, default=1)
    options.add_argument("--enforce-eager", action="store_true")
    options.add_argument("--compilation-config", type=json.loads)
    options.add_argument("--speculative-config", type=json.loads, required=True)
    given = options.parse_args(words)
    check_model(given.model)
    check_speculation(given.speculative_config, given.tensor_parallel_size)
    need(given.enforce_eager != bool(given.compilation_config), "graphs, or none")
    if given.compilation_config:
        need(set(given.compilation_config) == {"cudagraph_mode", "cudagraph_capture_sizes"}, "compilation_config")
        at_once = 1 + given.speculative_config["num_speculative_tokens"]
        need(not any(size % at_once for size in given.compilation_config["cudagraph_capture_sizes"]), "capture sizes")


def api_server(words: list[str]) -> None:
    """vLLM 0.6's ``python -m vllm.entrypoints.openai.api_server``."""
    options = parser("api_server")
    for flag in ("--model", "--speculative-model"):
        options.add_argument(flag, required=True)
    options.add_argument("--num-speculative-tokens", type=int, required=True)
    options.add_argument("--use-v2-block-manager", action="store_true", required=True)
    given = options.parse_args(words)
    check_model(given.model)
    check_draft(given.speculative_model, "v0")


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "docker": docker,
    "npu-smi": npu_smi,
    "pip": pip,
    "curl": curl,
    "vllm": vllm,
    "api_server": api_server,
}


class SamplingParams(SimpleNamespace):
    pass


class LLM:
    """An engine that accepts every drafted token."""

    def __init__(self, model: str, enforce_eager: bool = False, speculative_config: Any = None, **options: Any) -> None:
        check_model(model)
        need(enforce_eager, "as the manual of vLLM Ascend serves EAGLE-1")
        if speculative_config:
            check_speculation(speculative_config, options["tensor_parallel_size"])
        self._chain = speculative_config["num_speculative_tokens"] if speculative_config else 0
        self._drafts = 0
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(dtype="torch.bfloat16"))

    def generate(self, prompts: list[Any], sampling: SamplingParams, use_tqdm: bool) -> list[Any]:
        self._drafts += len(prompts) * sampling.max_tokens // (1 + self._chain)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[5] * sampling.max_tokens)]) for _ in prompts]

    def get_metrics(self) -> list[Any]:
        drafted = self._drafts * self._chain
        counted = {"drafts": self._drafts, "draft_tokens": drafted, "accepted_tokens": drafted}
        found = [SimpleNamespace(name=f"vllm:spec_decode_num_{name}", value=value) for name, value in counted.items()]
        each = SimpleNamespace(name="vllm:spec_decode_num_accepted_tokens_per_pos", values=[self._drafts] * self._chain)
        return [*found, each] if self._chain else []


def install(bin_folder: Path, library: Path, root: Path) -> None:
    """Put the programs into `bin_folder`, and into `library` a vLLM that `eagle.vllm.verify` finds installed.

    ``python`` and ``accelerate`` are this interpreter's. The first training is shown two cards, later ones one, of
    several machines each one: a process for each of eight would only take longer. Its port is a free one: two
    trainings may be side by side here.
    """
    python, seen = sys.executable, bin_folder / "several-cards"
    scripts = {name: f'exec {python} -S {__file__} {name} "$@"' for name in PROGRAMS}
    scripts["python"] = f"""\
case "$*" in
"-m vllm.entrypoints.openai.api_server "*) shift 2; exec {python} -S {__file__} api_server "$@" ;;
"-m eagle.vllm.verify "*) export PYTHONPATH={library}:$PYTHONPATH:{root} ;;
esac
exec {python} "$@"
"""
    scripts["accelerate"] = f"""\
port=
case "$*" in
*--num_machines*) cards=$NODE_RANK ;;
*) [ -e {seen} ] && cards=0 || cards=0,1 port="--main_process_port 0" ;;
esac
touch {seen}
export ASCEND_RT_VISIBLE_DEVICES=${{ASCEND_RT_VISIBLE_DEVICES:-$cards}}
[ "$1" = launch ] && shift && set -- launch $port "$@"
exec {python} -m accelerate.commands.accelerate_cli "$@"
"""
    bin_folder.mkdir(parents=True)
    for name, script in scripts.items():
        (bin_folder / name).write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
        (bin_folder / name).chmod(0o755)
    files = {
        "vllm/__init__.py": "from tests.npu.stand_ins import LLM, SamplingParams\n__version__ = '0.13.0'\n",
        "vllm/platforms.py": "from types import SimpleNamespace\n"
        "current_platform = SimpleNamespace(is_cpu=lambda: False, device_name='npu', device_type='npu')\n",
        "vllm-0.13.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: vllm\nVersion: 0.13.0\n",
    }
    for name, content in files.items():
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    try:
        PROGRAMS[sys.argv[1]](sys.argv[2:])
    except (Misunderstood, OSError, KeyError) as error:
        print(f"{os.path.basename(sys.argv[1])}: {error!r}", file=sys.stderr)  # noqa: PTH119
        sys.exit(2)
