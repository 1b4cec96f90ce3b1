"""An exported folder beside what exporting the trained draft again would write: all numbers and tensors that differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from eagle.drafts.families import DRAFT_FAMILIES
from eagle.drafts.interface import DraftFamily
from eagle.drafts.network import DraftNetwork
from eagle.drafts.saved import WEIGHTS_FILE, load_trained_state, read_saved
from eagle.drafts.vllm_layout import Layout, SavedDraft
from eagle.errors import RequestError
from eagle.files import read_json
from eagle.target.config import ModelConfig
from eagle.target.weights import Weights, read_embedding, read_head
from eagle.vllm.export import export_dtype

#: Keys that decide nothing here: names, ids and what an engine takes from its target.
_IDLE = {
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "initializer_range", "bos_token_id",
    "eos_token_id", "pad_token_id", "speculators_config", "speculators_model_type", "speculators_version", "use_cache",
    "hidden_act", "transformer_layer_config", "model",
}  # fmt: skip
#: What transformers takes for no rope_theta.
_THETA = 10000.0
#: By how much of its norm a tensor may differ that was written in a narrower dtype.
_ROUNDING = 0.01
_EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class Difference:
    """name: of a config key or a tensor. words: what is wrong with it."""

    name: str
    words: str

    def __str__(self) -> str:
        return f"{self.name} {self.words}"


@dataclass(frozen=True, slots=True)
class Trained:
    """The draft as it should be served. differences: of the exported folder from it. by_itself: whether the exported
    folder is all there is, so that only what the base model decides was compared. accuracy: how often its first guess
    was right in its run's validation, None where no run says it."""

    draft: DraftNetwork
    differences: list[Difference]
    by_itself: bool
    accuracy: float | None = None


def trained_draft(
    exported: Path, trained: Path | None, base: Weights, target: ModelConfig, family: DraftFamily
) -> Trained:
    """trained: the run, checkpoint or folder that was exported, None where it is not at hand.

    Raises: FileNotFoundError, RequestError for what is no draft of this target.
    """
    flag = "--draft-path" if trained is None else "--trained-path"
    saved = read_saved(trained or exported, None, target, lambda: read_head(base, target), flag)
    if saved.family != family.name:
        raise RequestError(
            f"{flag} {trained} is {DRAFT_FAMILIES[saved.family].describes}, and --draft-path {exported} is "
            f"{family.describes}. Name the run that was exported."
        )
    if trained is None and not family.config_keys:
        # A folder alone does not tell a draft with a rope of its own from a damaged one; nearly all have the base's.
        usual, own = target.draft(), saved.config.rope_scaling
        scaling = own if own and own["rope_type"] == "longrope" else usual.rope_scaling
        config = dataclasses.replace(
            saved.config, rope_theta=usual.rope_theta, rope_scaling=scaling, rms_norm_eps=usual.rms_norm_eps
        )
        saved = dataclasses.replace(saved, config=config)
    draft = family.build(saved.config, read_embedding(base, target).float(), saved.tensors)
    load_trained_state(draft, saved.tensors, str(saved.source))
    found = differences(exported, saved, base, target, family)
    draft = draft.float().eval().requires_grad_(False)
    return Trained(draft, found, trained is None, saved.measured.get("val_accuracy"))


def layout_of(folder: Path, family: DraftFamily) -> Layout:
    raw = read_json(folder / "config.json", "an exported config.json")
    nested = (layout for layout in family.layouts.values() if layout.inner and layout.inner in raw)
    return next(nested, next(iter(family.layouts.values())))


def differences(
    folder: Path, saved: SavedDraft, base: Weights, target: ModelConfig, family: DraftFamily
) -> list[Difference]:
    layout = layout_of(folder, family)
    saved = dataclasses.replace(saved, base=Path(base.folder).resolve())
    dtype = export_dtype(target, base)
    raw = read_json(folder / "config.json", "an exported config.json")
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    expected = layout.tensors(saved, dtype, base, target)
    own = [*_of_config(_flat(raw, layout), _flat(layout.config(saved, dtype), layout))]
    own += _of_tensors(tensors, expected)
    theirs = tensors.get(_EMBEDDING)
    if theirs is not None and _EMBEDDING not in expected and _far(theirs, read_embedding(base, target)):
        own.append(Difference(_EMBEDDING, "is in the export and is not the base model's"))
    return own


def _flat(raw: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """All keys of a config, its layer's among them; of rope_parameters, which say it again, the kind alone.

    Which theta counts where several are given is another in every release of transformers: all that may are kept. Where
    there is rope_scaling, transformers 5 takes none from rope_parameters.
    """
    found = {**layout.defaults, **raw, **(raw.get(layout.inner, {}) if layout.inner else {})}
    parameters, old = found.pop("rope_parameters", None) or {}, found.pop("rope_scaling", None) or {}
    scaling = old or parameters
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    top = found.pop("rope_theta", None)
    thetas = {top, old.get("rope_theta"), parameters.get("rope_theta")} - {None}
    if old and top is None and "rope_theta" not in old:
        thetas.add(_THETA)
    found["rope_theta"] = thetas.pop() if len(thetas) == 1 else " or ".join(map(str, sorted(thetas))) or None
    rest = {key: value for key, value in scaling.items() if key not in ("rope_theta", "rope_type", "type")}
    found["rope_scaling"] = None if kind == "default" else {"rope_type": kind, **dict(sorted(rest.items()))}
    return {key: value for key, value in found.items() if key not in _IDLE}


def _of_config(found: dict[str, Any], expected: dict[str, Any]) -> Iterator[Difference]:
    for key in sorted(found.keys() | expected.keys()):
        one, other = found.get(key), expected.get(key)
        if (one or None) != (other or None):  # false and absent mean the same
            shown = ("absent" if value is None else value for value in (one, other))
            yield Difference(key, "is {} in the export and should be {}".format(*shown))


def _of_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> Iterator[Difference]:
    for name in sorted((found.keys() | expected.keys()) - {_EMBEDDING}):
        if name not in found:
            yield Difference(name, "is missing in the export")
        elif name not in expected:
            yield Difference(name, "is in the export and has no place there")
        elif found[name].shape != expected[name].shape:
            shapes = (list(tensors[name].shape) for tensors in (found, expected))
            yield Difference(name, "is {} in the export and should be {}".format(*shapes))
        elif _far(found[name], expected[name]):
            yield Difference(name, "in the export is not the trained draft's")


def _far(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return True
    if not one.is_floating_point():
        return not torch.equal(one, other)
    one, other = one.float(), other.float()
    return not bool((one - other).norm() <= _ROUNDING * other.norm().clamp_min(1e-12))
