"""A draft on disk: the folder it is saved as, the folders of others that hold one, and the shapes of its tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from eagle.drafts.families import family_of
from eagle.drafts.foreign import check_is_draft
from eagle.drafts.interface import DraftFamily
from eagle.drafts.network import DraftNetwork
from eagle.drafts.vllm_layout import SavedDraft
from eagle.errors import RequestError
from eagle.files import existing_path, read_json, write_json
from eagle.target.config import ModelConfig, load_config
from eagle.target.families import LLAMA, TARGET_FAMILIES
from eagle.target.weights import Weights
from eagle.tensor_file import write_pieces

WEIGHTS_FILE = "model.safetensors"

#: What a training run's folder holds beside checkpoints: pointers to two of them; and what one says of itself.
BEST, LAST, STATE = "best", "last", "state.json"

EMBEDDING = "embed_tokens.weight"


def without_values(family: DraftFamily, config: ModelConfig) -> DraftNetwork:
    """The network on the meta device: the shape of every tensor and none of their values; nothing is allocated."""
    with torch.device("meta"):
        return family.build(config, torch.empty(config.vocab_size, config.hidden_size))


def shape_problems(network: DraftNetwork, found: Mapping[str, torch.Tensor]) -> list[str]:
    """What a saved draft lacks to fit the network, what does not belong, and what has another shape, in words."""
    expected = network.own_state()
    family = family_of(expected)
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is not part of {family.describes}" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} is {list(found[name].shape)}, expected {list(expected[name].shape)}"
        for name in expected.keys() & found.keys()
        if found[name].shape != expected[name].shape
    ]
    return sorted(problems)


def save_draft(network: DraftNetwork, folder: Path, whole: dict[str, torch.Tensor] | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors`` (embedding included), a folder that loads by itself.

    whole: the weights by name, where the network itself holds only shards of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = network.state_dict() if whole is None else whole
    tensors = {name: [tensor.detach().cpu()] for name, tensor in named.items()}
    # Not by safetensors' own writer, of which older ones hold the interpreter all the while: on a slow disk the other
    # processes of a run would hear nothing of this one and take it for lost.
    write_pieces(folder / WEIGHTS_FILE, tensors, {"format": "pt"})
    write_json(folder / "config.json", network.config.to_json())


def read_draft_state(weights: Weights) -> dict[str, torch.Tensor]:
    """The tensors of a saved draft under their public names, whoever saved it.

    A ``model.`` prefix is taken off; rotary buffers that old scripts saved are left out.
    """
    state = {}
    for name in weights.names():
        bare = name.removeprefix("model.")
        if "rotary_emb" not in bare:
            state[bare] = weights[name]
    with said_of(f"{weights.flag} {weights.folder}"):
        return family_of(state).canonical(state)


@contextmanager
def said_of(source: str) -> Iterator[None]:
    """What a family says of a draft, with where the draft is in front."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{source}: {error}") from None


def load_draft_config(folder: str | Path, family: DraftFamily) -> ModelConfig:
    """The config of a saved draft. One that calls itself what its target is, is the Llama layer that its tensors are.

    Raises: FileNotFoundError, RequestError for an EAGLE-3 draft of another kind of layer.
    """
    config = load_config(folder, family.config_keys)
    if TARGET_FAMILIES[config.family].as_itself:
        return config
    if family.config_keys:
        raise RequestError(
            f"{folder}: its model_type is {config.family!r}, and {family.describes} is a Llama layer here, which says "
            f"{LLAMA!r}. A draft with another layer is not read; vLLM serves it as it is."
        )
    return config.draft()


def draft_names(weights: Weights) -> set[str]:
    """The public names of a saved draft's tensors, without reading any."""
    return {name.removeprefix("model.") for name in weights.names()}


def load_draft(
    folder: str | Path,
    embedding: torch.Tensor | None = None,
    target: ModelConfig | None = None,
    head: Callable[[], torch.Tensor] | None = None,
) -> DraftNetwork:
    """The draft in a checkpoint or export folder, in its stored dtype.

    embedding: the target's, for exports that leave it out. target: its config, for drafts that leave choices to it.
    head: gives its ``lm_head``, for drafts that leave that out.

    Raises: FileNotFoundError, RequestError (missing or misshapen tensors).
    """
    state = read_draft_state(Weights(folder, flag="--draft-path"))
    family = family_of(state)
    saved = load_draft_config(folder, family)
    with said_of(f"--draft-path {folder}"):
        config = family.completed(saved, state, target)
        state = family.filled(config, state, head)
    theirs = {name: state.pop(name) for name in family.targets_own if name in state}
    embedding = theirs.get(EMBEDDING, embedding)
    if embedding is None:
        raise RequestError(f"{folder} holds no {EMBEDDING}; the target's embedding is needed beside it.")
    network = family.build(config, embedding, state)
    load_trained_state(network, state, str(folder))
    return network.to(state[next(iter(network.trained_state()))].dtype)


def load_trained_state(network: DraftNetwork, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy weights into the network. Raises: RequestError naming what is missing, extra or of another shape."""
    problems = shape_problems(network, state)
    if problems:
        raise RequestError(f"{source} does not hold a draft of this target: {'; '.join(problems)}.")
    network.load_state_dict(dict(state), strict=False)


def start_folder(path: Path, flag: str, family: DraftFamily) -> Path:
    """The folder of the saved draft behind a path, of the family that is to start from it.

    Raises: FileNotFoundError, RequestError (no draft, or one of another family).
    """
    source = resolve_pointer(path)
    check_is_draft(source, flag)
    names = draft_names(Weights(source, flag=flag))
    found = family_of(names)
    if found.name != family.name and found.recognises(names):
        raise RequestError(
            f"{flag} {source} is {found.describes}, and this run trains {family.describes} (--draft {family.name}). "
            f"Add --draft {found.name} to go on from it, or name a draft of the other kind."
        )
    return source


#: What of a draft's config decides what its weights compute.
_COMPUTES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling",
)  # fmt: skip


def network_differences(saved: ModelConfig, config: ModelConfig) -> list[str]:
    """In what a saved draft computes otherwise than one of `config`, in words."""
    return [
        f"{name} is {getattr(saved, name)!r} there and {getattr(config, name)!r} here"
        for name in _COMPUTES
        if getattr(saved, name) != getattr(config, name)
    ]


def warm_start(
    network: DraftNetwork,
    path: Path,
    flag: str,
    family: DraftFamily,
    target: ModelConfig,
    head: Callable[[], torch.Tensor],
) -> list[str]:
    """Start `network` from a saved draft; notes on what of it is left behind. target, head: as in `load_draft`.

    Raises: FileNotFoundError, RequestError (no draft of this network's shape).
    """
    source = start_folder(path, flag, family)
    state = read_draft_state(Weights(source, flag=flag))
    if family.config_keys:
        saved = load_draft_config(source, family)
        with said_of(f"{flag} {source}"):
            config = family.completed(saved, state, target)
        differing = [
            f"{name} is {config.extra.get(name)!r} there and {value!r} here"
            for name, value in network.config.extra.items()
            if config.extra.get(name) != value
        ] + network_differences(config, network.config)
        if differing:
            raise RequestError(
                f"{flag} {source} is a draft of other choices: {'; '.join(differing)}. Leave these to it, or start "
                "from another draft."
            )
        notes = []
    else:  # a layer that is trained here is always the base model's, whatever the config says that it began with
        differing = network_differences(load_draft_config(source, family), network.config)
        notes = [f"{flag} {source}: {what}; it goes on as here" for what in differing]
    optional = family.optional(state)
    kept = {name: tensor for name, tensor in state.items() if name not in (*family.targets_own, *optional)}
    with said_of(f"{flag} {source}"):
        kept = family.filled(network.config, kept, head)
    load_trained_state(network, kept, f"{flag} {source}")
    return notes + [f"{flag} {source} has {what}; it is left out" for what in optional.values() if what]


def read_saved(
    path: Path,
    weight_name: str | None,
    target: ModelConfig,
    head: Callable[[], torch.Tensor],
    flag: str = "--draft-path",
) -> SavedDraft:
    """Read a draft from a checkpoint of ours, a run's folder, or a public EAGLE folder, for export.

    target, head: its config; gives its ``lm_head``. flag: by which the path was named.

    Raises: FileNotFoundError, RequestError (wrong keys or shapes for this target).
    """
    existing_path(path, flag, "path")
    folder = resolve_pointer(path)
    check_is_draft(folder, flag, weight_name)
    state = read_draft_state(Weights(folder, weight_name, flag=flag))
    family = family_of(state)
    brought = {name: state.pop(name, None) for name in family.targets_own}
    for name, tensor in brought.items():  # the layouts that want them take them from the target
        expected = (target.vocab_size, target.hidden_size)
        if tensor is not None and tuple(tensor.shape) != expected:
            raise RequestError(
                f"{flag} {folder}: {name} is {list(tensor.shape)}, the base model's is {list(expected)}. This "
                "draft was trained for another model."
            )
    saved = load_draft_config(folder, family)
    with said_of(f"{flag} {folder}"):
        config = family.config_of(target, saved, state)
        state = family.filled(config, state, head)
    optional = family.optional(state)
    kept = {name: tensor for name, tensor in state.items() if name not in optional}
    problems = shape_problems(without_values(family, config), kept)
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise RequestError(f"{flag} {folder} does not hold a draft of --base-path's model: {shown}.")
    said = state_of(folder)
    measured, trained_for = said.get("metrics", {}), said.get("run", {}).get("target")
    return SavedDraft(family.name, config, state, folder, measured, trained_for, embedding=brought.get(EMBEDDING))


def state_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint of a run says of itself and the run; nothing of a draft that no run is behind."""
    file = resolve_pointer(checkpoint) / STATE
    return read_json(file, "a checkpoint's state") if file.is_file() else {}


def resolve_pointer(path: Path) -> Path:
    """The checkpoint folder behind a pointer, a run's folder (its best, else its last), or the path itself."""
    if path.is_file() and path.name in (BEST, LAST):
        return path.parent / path.read_text(encoding="utf-8").strip()
    if path.is_dir() and not (path / "config.json").exists():
        for pointer in (BEST, LAST):
            if os.path.lexists(path / pointer):
                return resolve_pointer(path / pointer)
    return path.resolve() if path.is_symlink() else path
