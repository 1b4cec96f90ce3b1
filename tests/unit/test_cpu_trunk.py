"""The CPU's own forward pass: transformers' features, of every token once."""

import numpy as np
import pytest
import torch

from eagle.target import cpu_trunk
from eagle.target.config import load_config
from eagle.target.cpu_trunk import packed_trunk
from eagle.target.features import HIDDEN_STATE
from eagle.target.packing import KEY_STEP, pack, shared_beginning
from eagle.target.trunk import load_trunk, parts_of
from tests.tiny import make_target

CPU = torch.device("cpu")


def sequences(seed: int, lengths: list[int], shared: int, odd: tuple[int, ...] = ()) -> list[np.ndarray]:
    """Random ids that begin with `shared` equal ones, except those whose numbers are in `odd`."""
    random = np.random.default_rng(seed)
    found = [random.integers(3, 200, size=length) for length in lengths]
    for number, ids in enumerate(found):
        if number not in odd:
            ids[:shared] = found[0][:shared][: len(ids)]
        ids[shared:][:1] = 200 + number  # they part here
    return found


def packed_llama(tmp_path):
    folder = make_target(tmp_path / "target", "llama", kv_heads=2)
    trunk = load_trunk(folder, torch.bfloat16, CPU)
    if not hasattr(trunk, "rotary_emb"):
        pytest.skip("this transformers has no rope of the whole model")
    return packed_trunk(trunk, parts_of(trunk, load_config(folder)))


@pytest.mark.parametrize(
    ("lengths", "shared", "odd", "saved"),
    [
        ([40, 40, 40], 24, (), 48),
        ([90, 71, 30, 26], 24, (2,), 48),
        ([130], 5, (), 0),
        ([1, 1], 0, (), 0),
        ([20, 5, 1], 2, (), 2),
        ([70, 64], 0, (), 0),
    ],
)
def test_every_token_stands_in_the_row_once(lengths, shared, odd, saved) -> None:
    some = sequences(0, lengths, shared, odd)
    packed = pack(some)
    for ids, places in zip(some, packed.places, strict=True):
        assert packed.ids[places[: len(ids)]].tolist() == ids.tolist()
        assert packed.positions[places[: len(ids)]].tolist() == list(range(len(ids)))
    rows = [row for group in packed.groups for row in range(group.rows.start, group.rows.stop)]
    assert rows == list(range(len(packed.ids)))
    for group in packed.groups:
        assert group.keys.shape[1] % KEY_STEP == 0
        # The queries of a group are its rows.
        assert group.keys[:, group.first :].flatten()[group.own].tolist() == list(
            range(group.rows.start, group.rows.stop)
        )
    assert len(packed.ids) == sum(lengths) - saved


def test_the_beginning_of_most_is_found_among_others() -> None:
    some = sequences(1, [50] * 9, 24, odd=(1, 4, 7))
    assert shared_beginning(some) == (24, [0, 2, 3, 5, 6, 8])
    assert shared_beginning([some[0]] * 3) == (49, [0, 1, 2])  # each keeps a token of its own
    assert shared_beginning(sequences(2, [500, 500], 5)) == (0, [])  # not worth it


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(("lengths", "shared", "odd"), [([90, 71, 30, 26], 24, (2,)), ([33, 150, 7], 0, ())])
def test_features_are_those_of_transformers(tmp_path, family, lengths, shared, odd) -> None:
    folder = make_target(tmp_path / "target", family, kv_heads=2)
    trunks = {dtype: load_trunk(folder, dtype, CPU) for dtype in (torch.float32, torch.bfloat16)}
    packed = packed_trunk(trunks[torch.bfloat16], parts_of(trunks[torch.bfloat16], load_config(folder)))
    if packed is None and not hasattr(trunks[torch.bfloat16], "rotary_emb"):
        pytest.skip("this transformers has no rope of the whole model for this family")
    assert packed is not None
    some = sequences(3, lengths, shared, odd)
    ids = torch.zeros(len(some), max(lengths), dtype=torch.long)
    for row, one in zip(ids, some, strict=True):
        row[: len(one)] = torch.from_numpy(one)
    own = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    with torch.inference_mode():
        exact, plain = (trunks[d](input_ids=ids, use_cache=False).last_hidden_state.float()[own] for d in trunks)
        found = packed.features(some)[HIDDEN_STATE]
        again = packed.features(some)[HIDDEN_STATE]
    assert torch.equal(found[own], again[own])  # what was left in memory is not in the result
    errors = [float((features - exact).norm() / exact.norm()) for features in (found.float()[own], plain)]
    assert errors[0] < 1.3 * errors[1] + 1e-4


def test_a_sequence_that_overflows_spoils_no_other(tmp_path) -> None:
    """What is masked is multiplied by 0, and 0 * NaN is NaN: no place of another sequence is even masked."""
    packed = packed_llama(tmp_path)
    for shared, spoilt in ((0, [0]), (24, [0, 1, 3])):
        some = sequences(3, [33, 90, 7 + shared, 26 + shared, 150], shared, odd=(2, 4))
        some[0][0] = 2
        for number in spoilt:
            some[number][:shared] = some[0][:shared]
        packed.parts.embedding.data[2] = torch.nan
        with torch.inference_mode():
            found = packed.features(some)[HIDDEN_STATE]
        finite = [bool(row[: len(ids)].isfinite().all()) for row, ids in zip(found, some, strict=True)]
        assert finite == [number not in spoilt for number in range(len(some))]


@pytest.mark.parametrize("wrong", ["those that share nothing", "one in twenty"])
def test_packed_features_are_compared_in_all_groups_and_nearly_all_places(tmp_path, monkeypatch, capsys, wrong) -> None:
    def pack_wrongly(some):
        packed = pack(some)
        shared, *_, others = packed.groups
        if wrong == "one in twenty":
            packed.places[0, -13:] = packed.places[0, :13]
        elif others.first == 0 and others is not shared:
            others.keys[:] = np.roll(others.keys, 1, axis=0)
        return packed

    monkeypatch.setattr(cpu_trunk, "pack", pack_wrongly)
    assert packed_llama(tmp_path) is None
    assert "packed features differ by" in capsys.readouterr().err


def test_where_packed_features_fail_transformers_goes_on(tmp_path, monkeypatch, capsys) -> None:
    def fail(*_):
        raise RuntimeError("The size of tensor a (8) must match\nthe size of tensor b (4)")

    monkeypatch.setattr(cpu_trunk, "causal_attention", fail)
    assert packed_llama(tmp_path) is None
    assert "going on with transformers' own: The size of tensor a (8) must match\n" in capsys.readouterr().err


def test_other_trunks_are_left_to_transformers(tmp_path, monkeypatch, capsys) -> None:
    folder = make_target(tmp_path / "target", "llama")
    config = load_config(folder)
    exact, trunk = (load_trunk(folder, dtype, CPU) for dtype in (torch.float32, torch.bfloat16))
    assert packed_trunk(exact, parts_of(exact, config)) is None
    parts = parts_of(trunk, config)
    wrong = lambda *values, **more: torch.zeros_like(values[0]).transpose(1, 2)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(cpu_trunk, "causal_attention", wrong)
        assert packed_trunk(trunk, parts) is None
    assert "packed features differ by" in capsys.readouterr().err
    parts.layers[0].self_attn.q_norm = torch.nn.Linear(2, 2)
    assert packed_trunk(trunk, parts) is None
    assert capsys.readouterr().err == ""
