"""Our draft module and the one inside vLLM give the same logits for the same (token, feature) rows.

The draft is a random one with every tensor large enough to matter, so that, unlike in an oracle pair, the feature half
of ``fc`` counts as much as the token half.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eagle.drafts.eagle1.network import Eagle1Network
from eagle.drafts.saved import load_draft, save_draft
from eagle.target.config import load_config
from eagle.target.weights import Weights, read_embedding, read_head
from eagle.vllm.engine import EngineRequest
from eagle.vllm.export import export
from tests.tiny import make_target
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
    error = ((logits - seen["logits"]).abs().max() / logits.abs().max()).item()
    print(f"\n{family} {options}: {rows} rows, largest error {error:.2e} of the largest logit")
    assert error < TOLERANCE
    assert torch.equal(logits.argmax(-1), seen["logits"].argmax(-1))
