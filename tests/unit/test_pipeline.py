"""A target spread over cards as a pipeline: nothing goes from one card to another that is not its neighbour."""

import pytest
import torch

from eagle.releases import TORCH
from eagle.target import features, pipeline
from eagle.target.features import HIDDEN_STATE, TRUNK_FEATURES, TrunkFeature, aux_name, features_of
from eagle.target.pipeline import HandOver, overlap_batches
from eagle.target.trunk import load_trunk
from tests.tiny import make_target

CPU, META = torch.device("cpu"), torch.device("meta")


class Placed(torch.Tensor):
    """A tensor with a card's number."""

    card: int


def placed(value, card):
    made = torch.tensor(float(value)).as_subclass(Placed)
    made.card = card
    return made


def test_what_layers_share_is_handed_on_from_card_to_card():
    sent = []

    def send(tensor, card):
        sent.append((tensor.card, card, float(tensor)))
        return placed(float(tensor), card)

    hand_over = HandOver(send, lambda tensor: tensor.card)
    for batch in range(2):
        hand_over.forget()
        hidden, cosines, sines = placed(0, 0), placed(1 + batch, 0), placed(11 + batch, 0)
        for layer in range(6):
            card = layer // 2
            args = hand_over.bring((hidden,), card)
            given = hand_over.bring({"position_embeddings": (cosines, sines), "mask": None, "use_cache": False}, card)
            assert [t.card for t in (*args, *given["position_embeddings"])] == [card] * 3
            assert [float(t) for t in given["position_embeddings"]] == [1 + batch, 11 + batch]
            assert given["mask"] is None and given["use_cache"] is False
            hidden = placed(float(args[0]) + 1, card)
        assert float(hidden) == 6
    assert {(source, target) for source, target, _ in sent} == {(0, 1), (1, 2)}
    assert len(sent) == 2 * 2 * 3, "once a card, and not once a layer"


def spread(trunk):
    """A trunk as accelerate leaves it: half of it on another card, which the meta device plays, and a hook each."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    names = ["embed_tokens", *(f"layers.{number}" for number in range(len(trunk.layers))), "norm"]
    half = len(names) // 2
    trunk.hf_device_map = dict.fromkeys(names[:half], 0) | dict.fromkeys([*names[half:], "rotary_emb"], 1)
    for number, name in enumerate(names):
        module = trunk.get_submodule(name).to(META if number >= half else CPU)
        add_hook_to_module(module, AlignDevicesHook(META if number >= half else CPU))
    add_hook_to_module(trunk, AlignDevicesHook(io_same_device=True), append=True)
    return trunk


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_spread_trunk_moves_little_and_leaves_its_features_on_its_last_card(tmp_path, family, monkeypatch):
    sent = []

    def send(tensor, place):
        sent.append((tensor.device, place))
        return tensor.to(place)

    monkeypatch.setattr(pipeline, "HandOver", lambda: HandOver(send))
    trunk = spread(load_trunk(make_target(tmp_path / "m", family, layers=6), torch.float32, CPU))
    overlap_batches(trunk)
    assert not any(hasattr(module, "_hf_hook") for module in trunk.modules())
    for _ in range(2):
        with torch.inference_mode():
            found = trunk(input_ids=torch.arange(1, 13)[None], use_cache=False).last_hidden_state
        assert found.device == META and found.shape == (1, 12, 32)
    assert set(sent) == {(CPU, META)}
    masks = TORCH < (2, 1, 1)  # the eager attention has one
    assert len(sent) <= 2 * (5 + masks), "hidden states, cosines, sines and perhaps positions: once a card"


def test_layers_that_are_one_entry_of_the_map_are_brought_their_inputs(tmp_path):
    """accelerate names the whole list of layers where all are on one card; nobody calls the list."""
    trunk = load_trunk(make_target(tmp_path / "m", "llama", layers=3), torch.float32, CPU)
    trunk.hf_device_map = {"embed_tokens": 0, "layers": 1, "norm": 1, "rotary_emb": 1}
    for name in ("layers", "norm"):
        trunk.get_submodule(name).to(META)
    overlap_batches(trunk)
    with torch.inference_mode():
        assert trunk(input_ids=torch.arange(1, 13)[None], use_cache=False).last_hidden_state.device == META


def test_features_of_several_layers_come_to_one_card(tmp_path, monkeypatch):
    """A family may put together what a spread trunk computed on several."""
    both = TrunkFeature(
        lambda output: torch.cat([output.hidden_states[1], *output.hidden_states[-2:]], -1),
        {"output_hidden_states": True},
    )
    monkeypatch.setitem(TRUNK_FEATURES, "both", both)
    trunk = spread(load_trunk(make_target(tmp_path / "m", "llama", layers=6), torch.float32, CPU))
    overlap_batches(trunk)
    with torch.inference_mode():
        found = features_of(trunk, (HIDDEN_STATE, "both"), input_ids=torch.arange(1, 13)[None], use_cache=False)
    assert found["both"].device == META and found["both"].shape == (1, 12, 96)


def test_inputs_of_layers_go_with_the_hidden_states(tmp_path, monkeypatch):
    """Copied at the end, from an early card to the last one, they would have batches wait for each other."""
    called, sent = [], []

    def send(tensor, place):
        if tensor.device != place:
            sent.append((len(called), place))
        return tensor.to(place)

    monkeypatch.setattr(features, "_send", send)
    trunk = spread(load_trunk(make_target(tmp_path / "m", "llama", layers=6), torch.float32, CPU))
    overlap_batches(trunk)
    for layer in trunk.layers:
        layer.register_forward_hook(lambda *_: called.append(None))
    first = next(at for at, layer in enumerate(trunk.layers) if next(layer.parameters()).device == META)
    name = aux_name((0, first - 1, 5))
    with torch.inference_mode():
        found = features_of(trunk, (HIDDEN_STATE, name), input_ids=torch.arange(1, 13)[None], use_cache=False)
    assert found[name].device == META and found[name].shape == (1, 12, 96)
    assert sent == [(first, META)] * 2, "as the first layer of that card is called"


def test_a_trunk_with_layers_on_no_card_keeps_its_hooks(tmp_path):
    folder = make_target(tmp_path / "model", layers=4)
    size = sum(parameter.nbytes for parameter in load_trunk(folder, torch.float32, CPU).parameters())
    trunk = load_trunk(
        folder, torch.float32, CPU, spread=True, memory={"cpu": size * 2 // 3}, offload_folder=tmp_path / "offload"
    )
    overlap_batches(trunk)
    assert hasattr(trunk, "_hf_hook")
    with torch.inference_mode():
        assert trunk(input_ids=torch.arange(1, 13)[None], use_cache=False).last_hidden_state.device == CPU
