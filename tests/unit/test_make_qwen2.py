"""The Llama model turned Qwen2 that a real Qwen2 target is made from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from eagle.errors import RequestError
from eagle.target.config import load_config
from eagle.target.weights import fingerprint
from tests.make_qwen2 import make_qwen2
from tests.tiny import make_target


@pytest.mark.parametrize("tied", [False, True])
def test_the_weights_are_the_same_and_the_biases_small_and_seeded(tmp_path: Path, tied: bool) -> None:
    source = make_target(tmp_path / "llama", tied=tied)
    folder = make_qwen2(source, tmp_path / "qwen2")
    config = load_config(folder)
    assert (config.family, config.qkv_bias, config.o_bias) == ("qwen2", True, False)
    qwen2 = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(qwen2).__name__ == "Qwen2ForCausalLM"
    biases = [parameter for name, parameter in qwen2.named_parameters() if name.endswith("_proj.bias")]
    assert len(biases) == 3 * config.num_hidden_layers
    assert all(0.01 < bias.std() < 0.1 for bias in biases)
    assert fingerprint(make_qwen2(source, tmp_path / "again")) == fingerprint(folder)

    ids = torch.tensor([[5, 9, 7, 30]])
    with torch.no_grad():
        with_biases = qwen2(ids).logits
        for bias in biases:
            bias.zero_()
        assert not torch.allclose(qwen2(ids).logits, with_biases)
        llama = AutoModelForCausalLM.from_pretrained(source).eval()
        torch.testing.assert_close(qwen2(ids).logits, llama(ids).logits)


def test_a_qwen2_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="not a Llama model"):
        make_qwen2(make_target(tmp_path / "base", "qwen2"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
