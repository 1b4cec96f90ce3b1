"""Quantized targets: features by vLLM, a draft trained on them, and that draft in vLLM beside the same folder.

Formats are those that vLLM's kernels for CPUs run; GPUs and NPUs have kernels for more.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from eagle.drafts.families import DRAFT_FAMILIES
from eagle.drafts.saved import load_draft
from eagle.generate.source_options import SourceOptions
from eagle.generate.sources import open_source
from eagle.regenerate import main as regenerate
from eagle.store.manifest import MANIFEST
from eagle.store.reader import FeatureStore
from eagle.target.config import load_config
from eagle.target.quantization import Use
from eagle.target.weights import Weights, read_embedding, read_head
from eagle.train.main import run_training
from eagle.train.options import TrainOptions
from eagle.vllm import verify
from eagle.vllm.engine import EngineRequest
from eagle.vllm.export import export
from tests.e2e.commands import command
from tests.quantized import quantize
from tests.tiny import conversations, make_target, write_sharegpt
from tests.vllm.captured import capture, capture_all
from tests.vllm.engines import run_child
from tests.vllm.exact import exact_features
from tests.vllm.extracted import CPU, distance

#: Times the dtype's own noise.
NOISE = 3.0
#: Times the same, by which another model's features are off at least: the one before it was quantized.
ANOTHER = 8.0
#: Of the largest logit in float32.
TOLERANCE = 1e-5
DEPTH = 4
#: Of the families, in which form the draft is exported.
LAYOUTS = {"eagle1": "v1", "eagle3": "plain"}


@dataclass(frozen=True, slots=True)
class Chain:
    """Step 3 over a 4-bit target. twin: the plain model it stands for."""

    plain: Path
    target: Path
    twin: Path
    store: Path
    data: Path

    def draft(self, family: str) -> Path:
        """Steps 4 and 5: the exported folder."""
        run, layout = self.store.with_name(family), LAYOUTS[family]
        exported = run.with_name(f"{family}-vllm")
        if not exported.exists():
            options = TrainOptions(
                run, self.target, tmpdir=self.store, draft=family, num_epochs=1, lr=3e-3, ttt_steps=2,
                max_len=128, vloss_weight=0.0, **({"draft_vocab_size": 150} if family == "eagle3" else {}),
            )  # fmt: skip
            assert run_training(options) == 0
            export(self.target, run, exported, layout)
        return exported


def make_plain(folder: Path) -> Path:
    # With smaller weights than other tests' targets, whose features bfloat16 alone moves as far as 4 bits do.
    return make_target(folder, "qwen2", hidden=128, layers=7, initializer_range=0.05)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    root = tmp_path_factory.mktemp("quantized")
    plain = make_plain(root / "plain")
    target = quantize(plain, root / "target", "compressed-tensors", root / "twin")
    data, store = write_sharegpt(root / "data.json", conversations(16, seed=3)), root / "store"
    command(
        "allocation.py", "--model_name", target, "--data_path", data, "--outdir", store, "--device", "cpu",
        "--draft", "eagle3", "--chat_template", "chatml", "--feature_source", "vllm",
    )  # fmt: skip
    return Chain(plain, target, root / "twin", store, data)


def test_the_store_holds_the_quantized_models_features(chain):
    manifest = json.loads((chain.store / MANIFEST).read_text())
    assert manifest["target"]["quantization"] == {"method": "compressed-tensors", "format": "pack-quantized"}
    store = FeatureStore(chain.store)
    records = [store[index] for index in (0, 5, 11)]
    names = tuple(manifest["features"])
    sequences = [record.input_ids.numpy() for record in records]
    exact, others = (exact_features(folder, names, sequences) for folder in (chain.twin, chain.plain))
    theirs = open_source(SourceOptions(chain.twin, torch.bfloat16, CPU, names)).features(sequences)
    for name in names:
        for row, record in enumerate(records):
            own = record.more.get(name, record.hidden_state)
            noise = distance(theirs[name][row, : len(own)], exact[name][row])
            assert distance(own, exact[name][row]) < NOISE * noise
            assert distance(others[name][row], exact[name][row]) > ANOTHER * noise


def request(family: str, dtype: str, target: Path, draft: Path) -> EngineRequest:
    prompt = torch.randint(3, 400, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    return EngineRequest(
        str(target), [prompt], str(draft), method=DRAFT_FAMILIES[family].method, num_speculative_tokens=DEPTH,
        max_new_tokens=8, dtype=dtype, warm_up=False,
    )  # fmt: skip


def logits_of(folder: Path, target: Path, seen: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Our own of what vLLM's draft saw, in that dtype."""
    config, weights = load_config(target, use=Use.SERVED), Weights(target)
    draft = load_draft(folder, read_embedding(weights, config).to(dtype)).to(dtype)
    head = read_head(weights, config).to(dtype)
    with torch.inference_mode():
        found = draft(seen["tokens"].long().unsqueeze(0), seen["features"].to(dtype).unsqueeze(0))[0]
        return draft.logits(found, head) if draft.ids is not None else found @ head.T


def test_a_draft_beside_it_in_vllm_is_not_quantized(chain, tmp_path):
    draft = chain.draft("eagle1")
    seen = capture(request("eagle1", "bfloat16", chain.target, draft), tmp_path)
    exact, ours = (logits_of(draft, chain.target, seen, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert len(exact) == 40 + DEPTH - 1
    assert distance(seen["logits"], exact) < NOISE * distance(ours, exact)


@pytest.mark.long
def test_drafts_beside_8_bits_in_float32(chain, tmp_path):
    """In a format that vLLM computes in float32 too: the same model's, so that the drafts are of its shapes."""
    target = quantize(chain.plain, tmp_path / "int8", "int8")
    asked = {family: request(family, "float32", target, chain.draft(family)) for family in LAYOUTS}
    for family, seen in capture_all(asked, tmp_path).items():
        assert isinstance(seen, dict), seen
        exact = logits_of(chain.draft(family), target, seen, torch.float32)
        chosen = exact[0].isfinite()
        assert int(chosen.sum()) == (150 if family == "eagle3" else len(chosen))
        assert not seen["logits"][:, ~chosen].isfinite().any()
        assert distance(seen["logits"][:, chosen], exact[:, chosen]) < TOLERANCE


@pytest.mark.long
def test_features_of_every_format(chain, tmp_path):
    asked = {}
    for name in ("compressed-tensors", "gptq", "awq"):
        model = quantize(chain.plain, tmp_path / name, name, tmp_path / f"{name}-twin")
        asked[name] = {
            "model": str(model), "reads": f"{model}-twin", "tells": str(chain.plain), "dtype": "bfloat16",
            "features": ["hidden_state", "aux_2_3_4"], "engine": {"arguments": {"max_num_batched_tokens": 96}},
        }  # fmt: skip
    found = run_child("tests.vllm.extracted", tmp_path, asked)
    print(json.dumps(found, indent=1))
    for name, far in found.items():
        assert isinstance(far, dict), f"{name}: {far}"
        for feature in asked[name]["features"]:
            assert far[feature] < NOISE and far[f"another {feature}"] > ANOTHER, (name, far)


@pytest.mark.long
def test_verify_serves_it(chain, tmp_path, capsys):
    words = ["--base-path", chain.target, "--draft-path", chain.draft("eagle1"), "--num_prompts", 3, "--output"]
    words += [tmp_path / "report.json", "--max_new_tokens", 32, "--chat_template", "chatml"]
    assert verify.main([str(word) for word in words]) == 0
    shown = capsys.readouterr().out
    assert "loaded    yes" in shown
    assert json.loads((tmp_path / "report.json").read_text())["tau"] > 2


@pytest.mark.long
def test_its_own_replies(chain, tmp_path):
    output = tmp_path / "own.jsonl"
    words = ["--model_name", chain.target, "--data_path", chain.data, "--output", output, "--chat_template", "chatml"]
    words += ["--engine", "vllm", "--engine_args=--enforce-eager --max-model-len 1024", "--end_num", 3]
    assert regenerate.main([str(word) for word in [*words, "--max_new_tokens", 16]]) == 0
    records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert records and {record["reply_tokens"] for record in records} == {"sampled"}
