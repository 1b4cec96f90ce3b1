"""The CPU's own attention: equal to torch's, and used only where it is right."""

import pytest
import torch
import transformers

from eagle.target import cpu_attention
from eagle.target.cpu_attention import BLOCKED, Scratch, attention_for, causal_attention
from eagle.target.trunk import load_trunk
from tests.families import make_row, row_named

CPU = torch.device("cpu")
REGISTERS = tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 53)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(4, 4, 8), (6, 2, 16), (3, 1, 64)])
def test_equals_torchs_attention(length: int, heads: int, key_heads: int, width: int) -> None:
    query = torch.randn(3, length, heads, width, dtype=torch.float64).transpose(
        1, 2
    )  # laid out as transformers hands them over
    key, value = (torch.randn(3, length, key_heads, width, dtype=torch.float64).transpose(1, 2) for _ in range(2))
    found = causal_attention(query, key, value, 0.3)
    whole = [part.repeat_interleave(heads // key_heads, dim=1) for part in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *whole, is_causal=True, scale=0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2))


@pytest.mark.parametrize(("queries", "length"), [(1, 70), (64, 96), (40, 64), (100, 131)])
def test_later_queries_see_all_keys_before_them(queries: int, length: int) -> None:
    query, key, value = (torch.randn(2, heads, length, 8, dtype=torch.float64) for heads in (4, 2, 2))
    whole, scratch = causal_attention(query, key, value, 0.3), Scratch()
    for _ in range(2):  # the second time in memory that is no longer zero
        found = causal_attention(query[:, :, -queries:], key, value, 0.3, scratch)
        torch.testing.assert_close(found, whole[:, -queries:])


def test_only_for_bfloat16_on_a_cpu() -> None:
    assert attention_for(CPU, torch.bfloat16) == (BLOCKED if REGISTERS else "sdpa")
    assert attention_for(CPU, torch.float32) == "sdpa"
    assert attention_for(torch.device("meta"), torch.bfloat16) == "sdpa"


@pytest.mark.skipif(not REGISTERS, reason="transformers before 4.53 knows no other attention")
@pytest.mark.parametrize("window", [None, 16])
def test_features_are_those_of_torchs_attention(tmp_path, monkeypatch, window: int | None) -> None:
    sizes = {"num_hidden_layers": 3, "initializer_range": 0.02}
    folder = make_row(tmp_path / "target", row_named("mistral"), sliding_window=window, **sizes)
    ids = torch.randint(3, 60, (2, 90))
    calls = []
    monkeypatch.setattr(cpu_attention, "causal_attention", lambda *values: calls.append(1) or causal_attention(*values))
    features = {}
    for dtype, name in ((torch.float32, "sdpa"), (torch.bfloat16, "sdpa"), (torch.bfloat16, BLOCKED)):
        attention_for(CPU, torch.bfloat16)  # registers it
        trunk = load_trunk(folder, dtype, CPU, attention=name)
        with torch.inference_mode():
            features[dtype, name] = trunk(input_ids=ids, use_cache=False).last_hidden_state.float()
    exact = features.pop((torch.float32, "sdpa"))
    errors = {name: float((found - exact).norm() / exact.norm()) for (_, name), found in features.items()}
    assert errors[BLOCKED] < 1.3 * errors["sdpa"] + 1e-4
    assert len(calls) == (3 if window is None else 0)  # a sliding window takes a mask, which torch's attention knows
