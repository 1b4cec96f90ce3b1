"""Our draft module and the one inside vLLM give the same logits for the same (token, feature) rows.

The draft is a random one with every tensor large enough to matter, so that, unlike in an oracle pair, the feature half
of ``fc`` counts as much as the token half.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from eagle.drafts.choices import DraftChoices
from eagle.drafts.eagle1.network import Eagle1Network
from eagle.drafts.families import DRAFT_FAMILIES
from eagle.drafts.saved import load_draft, save_draft
from eagle.target.config import load_config
from eagle.target.features import features_of
from eagle.target.trunk import load_trunk
from eagle.target.weights import Weights, read_embedding, read_head
from eagle.vllm.engine import EngineRequest
from eagle.vllm.export import export
from tests.tiny import VOCAB, make_target
from tests.vllm.captured import capture

PROMPT_LENGTH, DEPTH = 40, 4

#: Of the largest logit: float32 has 24 bits, and the sums are over a hundred terms in another order.
TOLERANCE = 1e-5


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"kv_heads": 2}),
        ("llama", {"kv_heads": 4, "tied": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("qwen2", {"kv_heads": 2}),
    ],
    ids=["llama", "llama-mha-tied-theta", "qwen2"],
)
def test_logits_equal_those_inside_vllm(tmp_path: Path, family: str, options: dict) -> None:
    base = make_target(tmp_path / "base", family, hidden=128, **options)
    target, weights = load_config(base), Weights(base)
    torch.manual_seed(1)
    draft = Eagle1Network(target.draft(), read_embedding(weights, target).float())
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.5)
            elif "layernorm" in name:
                parameter.uniform_(0.5, 1.5)
    save_draft(draft, tmp_path / "draft")
    exported = export(base, tmp_path / "draft", tmp_path / "export", "v1")["v1"]

    prompt = torch.randint(3, 400, (PROMPT_LENGTH,)).tolist()
    seen = capture(
        EngineRequest(
            str(base),
            [prompt],
            str(exported),
            num_speculative_tokens=DEPTH,
            max_new_tokens=8,
            dtype="float32",
            warm_up=False,
        ),
        tmp_path,
    )

    rows = PROMPT_LENGTH + DEPTH - 1
    assert seen["positions"].tolist() == list(range(rows))
    ours = load_draft(exported, read_embedding(weights, target).float())
    with torch.inference_mode():
        predicted = ours(seen["tokens"].long().unsqueeze(0), seen["features"].unsqueeze(0))[0]
        logits = predicted @ read_head(weights, target).float().T
    error = difference(seen["logits"], logits)
    print(f"\n{family} {options}: {rows} rows, largest error {error:.2e} of the largest logit")
    assert error < TOLERANCE
    assert torch.equal(logits.argmax(-1), seen["logits"].argmax(-1))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, of the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("layout", ["plain", "speculators"])
@pytest.mark.parametrize(
    ("family", "options", "layers", "drafted", "variant"),
    [
        ("llama", {"kv_heads": 2}, (1, 3, 5), 100, {"qkv_bias": True, "o_bias": True, "mlp_bias": True}),
        ("llama", {"kv_heads": 4, "tied": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
         (0, 2), 100, {"normed": True}),
        ("qwen2", {"kv_heads": 2}, (1, 2, 4, 5), VOCAB + 24, {}),
    ],
    ids=["llama-biases", "llama-mha-tied-theta-normed-two-layers", "qwen2-whole-vocabulary-four-layers"],
)  # fmt: skip
def test_eagle3_logits_equal_those_inside_vllm(
    tmp_path: Path, family: str, options: dict, layers: tuple[int, ...], drafted: int, variant: dict, layout: str
) -> None:
    """At every step of a chain, over the draft's own tokens; and what the draft reads is what our trunk gives."""
    base = make_target(tmp_path / "base", family, hidden=128, layers=7, **options)
    target, weights = load_config(base), Weights(base)
    torch.manual_seed(1)
    eagle3 = DRAFT_FAMILIES["eagle3"]
    config = eagle3.config(target, None, DraftChoices(layers, drafted))
    variant = dict(variant)
    config.extra["norm_before_residual"] = variant.pop("normed", False)
    config = dataclasses.replace(config, **variant)
    draft = eagle3.build(config, read_embedding(weights, target).float())
    ids = torch.randperm(target.vocab_size)[:drafted].sort().values
    draft.choose(ids)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name != "embed_tokens.weight":
                parameter.normal_(std=0.1)
    save_draft(draft, tmp_path / "draft")
    exported = export(base, tmp_path / "draft", tmp_path / "export", layout)[layout]

    prompt = torch.randint(3, 400, (PROMPT_LENGTH,)).tolist()
    seen = capture(
        EngineRequest(
            str(base),
            [prompt],
            str(exported),
            method="eagle3",
            num_speculative_tokens=DEPTH,
            max_new_tokens=8,
            dtype="float32",
            warm_up=False,
        ),
        tmp_path,
    )

    rows = PROMPT_LENGTH + DEPTH - 1
    assert seen["positions"].tolist() == list(range(rows))
    ours = load_draft(exported, read_embedding(weights, target).float())
    trunk = load_trunk(base, torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        read = features_of(trunk, (ours.reads,), input_ids=torch.tensor([prompt]), use_cache=False)[ours.reads][0]
        assert difference(read, seen["auxiliary"]) < 10 * TOLERANCE
        states = ours.read(read)
        assert difference(states, seen["features"][:PROMPT_LENGTH]) < 10 * TOLERANCE
        found = ours(seen["tokens"].long().unsqueeze(0), seen["features"].unsqueeze(0))[0]
        # What the next step reads in place of a feature is the state as it is, before the norm.
        assert difference(found[PROMPT_LENGTH - 1 : -1], seen["features"][PROMPT_LENGTH:]) < TOLERANCE
        logits = ours.logits(found, read_head(weights, target).float())
    chosen = torch.zeros(target.vocab_size, dtype=torch.bool)
    chosen[ids] = True
    assert not logits[:, ~chosen].isfinite().any() and not seen["logits"][:, ~chosen].isfinite().any()
    error = difference(seen["logits"][:, chosen], logits[:, chosen])
    print(f"\n{family} {options}, {layout}: {rows} rows, largest error {error:.2e} of the largest logit")
    assert error < TOLERANCE
