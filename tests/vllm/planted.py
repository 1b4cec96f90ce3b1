"""Pairs, stores and templates for the tests of the gate, and one engine that many questions are asked of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle.data.loss_mask import Encoder, load_encoder
from eagle.drafts.families import DRAFT_FAMILIES
from eagle.generate import main as generation
from eagle.store.reader import FeatureStore
from eagle.store.record import Record
from eagle.store.shard import write_shard
from eagle.target.check import check_target
from eagle.vllm.capture import load_watched
from eagle.vllm.engine import EngineRequest
from eagle.vllm.export import export
from eagle.vllm.gate import Gate, GateOptions, Verdict, judge, open_gate
from tests.oracle import Shape, random_prompts, write_pair
from tests.oracle3 import write_oracle
from tests.tiny import conversations, write_sharegpt
from tests.vllm.damage import edit_tensors
from tests.vllm.engines import run_engines
from tests.vllm.family_rows import work_here

NEW = 24
#: A template whose prompts end in the assistant's header, and others that differ from it in one thing each.
_TURNS = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] -}}"
    "{{- '<|im_end|>\\n' -}}{%- endfor -%}"
)
_HEADER = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}"
_END = "{%- endif -%}"
_SYSTEM = "{{- '<|im_start|>system\\nAnswer briefly.<|im_end|>\\n' -}}"
_THINKS = (
    "{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}"
)
TEMPLATES = {
    "plain": _TURNS + _HEADER + _END,
    "no header": _TURNS,
    "system": _SYSTEM + _TURNS + _HEADER + _END,
    "thinks": _TURNS + _HEADER + _THINKS + _END,
}
SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pair:
    """A target, its oracle draft, the export of that, and K: as deep as the oracle is right."""

    target: Path
    draft: Path
    exported: Path
    method: str
    depth: int


def eagle1_pair(folder: Path) -> Pair:
    """A Qwen2, whose layer has everything that can get lost: biases, its own theta, scaled rotary embeddings."""
    target, draft = write_pair(folder, Shape("qwen2", kv_heads=2, rope_theta=500.0))
    for place in (target, draft):
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(config | {"rope_scaling": SCALING}))
    return Pair(target, draft, export(target, draft, folder / "export", "v1")["v1"], "eagle", 3)


def tuned(pair: Pair, folder: Path) -> Pair:
    """The pair after its target was trained on: another last layer, and the draft that is right for it, exported for
    the target before."""
    target, draft = (Path(shutil.copytree(place, folder / place.name)) for place in (pair.target, pair.draft))
    for place, prefix in ((target, "model.layers.1."), (draft, "layers.0.")):

        def change(tensors: dict[str, torch.Tensor], prefix: str = prefix) -> None:
            for name in ("self_attn.v_proj.weight", "mlp.down_proj.weight"):
                tensors[prefix + name] = tensors[prefix + name].roll(1, 0)

        edit_tensors(place, change)
    exported = export(pair.target, draft, folder / "export", "v1", allow_other_base=True)["v1"]
    return Pair(target, draft, exported, pair.method, pair.depth)


def changed(pair: Pair, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Pair:
    """The pair with another draft, exported."""
    draft = Path(shutil.copytree(pair.draft, folder / "draft"))
    edit_tensors(draft, change)
    exported = export(pair.target, draft, folder / "export", "v1")["v1"]
    return Pair(pair.target, draft, exported, pair.method, pair.depth)


def eagle3_pair(folder: Path) -> Pair:
    oracle = write_oracle(folder, Shape(kv_heads=2, rope_theta=500.0))
    exported = export(oracle.target, oracle.draft, folder / "export", "plain")["plain"]
    return Pair(oracle.target, oracle.draft, exported, "eagle3", 1)


def write_templates(folder: Path) -> dict[str, Path]:
    found = {name: folder / f"{name.replace(' ', '-')}.jinja" for name in TEMPLATES}
    for name, path in found.items():
        path.write_text(TEMPLATES[name], encoding="utf-8")
    return found


def make_store(folder: Path, target: Path, data: Path, template: Path, draft: str, *more: str) -> Path:
    words = ["--outdir", folder, "--model_name", target, "--data_path", data, "--draft", draft, "--dtype", "float32"]
    if draft == "eagle3":
        words += ["--aux_layers", "1,3,5"]
    words += ["--device", "cpu", "--max_length", 400, "--chat_template", template, *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "run_workers", work_here)
        assert generation.main([str(word) for word in words]) == 0
    return folder


def altered(store: Path, folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a store of last hidden states alone, its features changed."""
    shutil.copytree(store, folder)
    for path in folder.glob("0/shard-*.safetensors"):
        path.unlink()
    records = [
        Record(one.conversation, one.input_ids, one.loss_mask, change(one.hidden_state)) for one in FeatureStore(store)
    ]
    write_shard(folder / "0" / "shard-00000.safetensors", records)
    return folder


def damaged(pair: Pair, folder: Path, damage: Callable[[Path], object]) -> Path:
    shutil.copytree(pair.exported, folder)
    damage(folder)
    return folder


def gate_of(
    pair: Pair, store: Path, template: Path | str, exported: Path | None = None, *, told: dict[str, Any] | None = None,
    new_tokens: int = NEW, **options: Any,
) -> Gate:  # fmt: skip
    checked = check_target(pair.target, "--base-path")
    family = next(family for family in DRAFT_FAMILIES.values() if family.method == pair.method)

    def encoder(manifest: dict[str, Any]) -> Encoder:
        return load_encoder(pair.target, checked.config, str(template), chat_template_kwargs=told)

    given = {"trained": pair.draft, "val_ratio": 0.5, "conversations": 6} | options
    asked = GateOptions(store, **given)
    return open_gate(asked, checked, exported or pair.exported, family, encoder, pair.depth, new_tokens)


def verdicts(asked: dict[str, tuple[Pair, Path, Gate]], folder: Path, dtypes: Mapping[str, str]) -> dict[str, Verdict]:
    """By name, the pair, the folder that is served and the gate; those of one folder and dtype share an engine. dtypes:
    of engines that do not compute in float32."""
    requests: dict[tuple[Path, str], EngineRequest] = {}
    for name, (pair, served, gate) in asked.items():
        dtype = dtypes.get(name, "float32")
        if (served, dtype) not in requests:
            requests[served, dtype] = EngineRequest(
                str(pair.target), random_prompts(1, 16), str(served), method=pair.method,
                num_speculative_tokens=pair.depth, max_new_tokens=1, dtype=dtype, warm_up=False,
                watch_file=str(folder / f"watched-{len(requests)}.pt"),
            )  # fmt: skip
        wanted = requests[served, dtype].watched
        wanted += [one for one in gate.watched() if one not in wanted]
    results = dict(zip(requests, run_engines(list(requests.values()), folder), strict=True))
    found = {}
    for name, (_, served, gate) in asked.items():
        key = served, dtypes.get(name, "float32")
        watched = load_watched(Path(str(requests[key].watch_file)))
        own = [watched[requests[key].watched.index(one)] for one in gate.watched()]
        found[name] = judge(gate, own, results[key].dtype)
    return found


def data_file(folder: Path) -> Path:
    return write_sharegpt(folder / "data.json", conversations(24, turns=1, seed=5))
