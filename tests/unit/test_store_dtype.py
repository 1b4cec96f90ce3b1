"""Features in one byte a value: how near they come back, what they cost, and that they are copied untouched."""

import pytest
import torch

from eagle.errors import RequestError
from eagle.store.dtypes import block_size, check_store_dtype, pack
from eagle.store.reader import FeatureStore
from eagle.store.record import Record
from eagle.store.reshard import reshard
from eagle.store.shard import Shard, write_shard
from eagle.store.writer import ShardWriter


def features(tokens=200, hidden=192, dtype=torch.bfloat16):
    """Like a model's: a few channels are many times larger than the others."""
    values = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(0))
    values[:, ::50] *= 12
    return values.to(dtype)


def relative_error(found, wanted):
    return float(((found.float() - wanted.float()).norm(dim=-1) / wanted.float().norm(dim=-1)).mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("store_dtype", "error"), [("same", 0.0), ("int8", 0.013), ("float8", 0.03)])
def test_round_trip(dtype, store_dtype, error):
    wanted = features(dtype=dtype)
    packed = pack(wanted, store_dtype)
    found = packed.unpack()
    assert found.dtype == dtype
    assert relative_error(found, wanted) <= error
    if store_dtype != "same":
        assert packed.nbytes == wanted.shape[0] * (wanted.shape[1] + 4)


@pytest.mark.parametrize(("store_dtype", "error"), [("int8", 0.013), ("float8", 0.03)])
def test_states_side_by_side_have_scales_of_their_own(store_dtype, error, tmp_path):
    """A late layer's are many times larger than an early one's, of which one scale for both would leave little."""
    early, late = features(hidden=64), 300 * features(hidden=64)
    both = torch.cat([early, late], -1)
    packed = pack(both, store_dtype, 2)
    assert packed.scale.shape == (200, 2) and packed.nbytes == 200 * (128 + 2 * 4)
    assert relative_error(packed.unpack()[:, :64], early) <= error >= relative_error(packed.unpack()[:, 64:], late)
    if store_dtype == "int8":
        assert relative_error(pack(both, store_dtype).unpack()[:, :64], early) > 0.5
    record = Record(
        3, torch.arange(200, dtype=torch.int32), torch.ones(200, dtype=torch.uint8), early, {"aux_1_2": both}
    )
    write_shard(tmp_path / "shard-00000.safetensors", [record.stored(store_dtype)] * 2)
    shard = Shard(tmp_path / "shard-00000.safetensors")
    for position in (0, 1):
        found = shard.read(position)
        assert torch.equal(found.more["aux_1_2"], packed.unpack())
        assert torch.equal(found.hidden_state, pack(early, store_dtype).unpack())


def test_rotation_makes_int8_finer():
    wanted = features().float()
    scale = wanted.abs().amax(-1, keepdim=True) / 127
    plain = (wanted / scale).round() * scale
    assert relative_error(pack(wanted, "int8").unpack(), wanted) < relative_error(plain, wanted) / 2


@pytest.mark.parametrize("store_dtype", ["int8", "float8"])
@pytest.mark.parametrize("value", [0.0, 1e-38, 3e38])
def test_extreme_rows(store_dtype, value):
    wanted = torch.full((2, 16), value)
    found = pack(wanted, store_dtype).unpack()
    assert torch.isfinite(found).all()
    assert torch.allclose(found, wanted, rtol=0.01, atol=1e-30)


@pytest.mark.parametrize(("hidden", "block"), [(4096, 128), (576, 64), (896, 128), (32, 32), (7, 1)])
def test_blocks_divide_the_hidden_size(hidden, block):
    assert block_size(hidden) == block


def test_store_is_half_the_size_and_resharding_copies_it(tmp_path):
    def write(store_dtype):
        writer = ShardWriter(tmp_path / store_dtype / "0", store_dtype=store_dtype)
        for number in range(6):
            length = 20 + number
            ids, mask = torch.arange(length, dtype=torch.int32), torch.ones(length, dtype=torch.uint8)
            writer.add(Record(number, ids, mask, features(length, 512), {"aux_1_2": features(length, 1024)}))
        writer.close_shard()
        return sum(path.stat().st_size for path in (tmp_path / store_dtype).rglob("*.safetensors"))

    whole = write("same")
    for store_dtype in ("int8", "float8"):
        assert write(store_dtype) < 0.55 * whole
        before = FeatureStore(tmp_path / store_dtype)
        reshard(tmp_path / store_dtype, tmp_path / f"{store_dtype}-3", 3)
        after = FeatureStore(tmp_path / f"{store_dtype}-3")
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a.hidden_state, b.hidden_state) and torch.equal(a.more["aux_1_2"], b.more["aux_1_2"])
        assert before[0].hidden_state.dtype == torch.bfloat16


def test_unknown_store_dtype():
    with pytest.raises(RequestError, match="--store_dtype int4: expected one of same, int8, float8"):
        check_store_dtype("int4")


def test_float8_needs_a_torch_that_has_it(monkeypatch):
    monkeypatch.delattr(torch, "float8_e4m3fn")
    with pytest.raises(RequestError, match="has no float8_e4m3fn; use int8"):
        check_store_dtype("float8")
