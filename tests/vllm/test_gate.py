"""The train/serve gate in a real engine: what is sound is said to be sound, and every planted cause is named.

Causes in prompts and stores need no engine of their own: a sound one is held against other templates and stores.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eagle.drafts.families import DRAFT_FAMILIES
from eagle.entry import run
from eagle.train.main import run_training
from eagle.train.options import TrainOptions
from eagle.vllm import verify
from eagle.vllm.export import export
from eagle.vllm.gate import Gate, Verdict, gate_lines
from tests.taught import teach_target
from tests.tiny import conversations, write_sharegpt
from tests.vllm.damage import edit_config, edit_tensors
from tests.vllm.planted import (
    Pair,
    altered,
    changed,
    damaged,
    data_file,
    eagle1_pair,
    eagle3_pair,
    gate_of,
    make_store,
    tuned,
    verdicts,
    write_templates,
)

Tensors = dict[str, torch.Tensor]


def theta(folder: Path) -> None:
    def change(config: dict) -> None:
        config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 10000.0

    edit_config(folder, change)


def unscaled(folder: Path) -> None:
    def change(config: dict) -> None:
        config.pop("rope_scaling", None)
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}

    edit_config(folder, change)


def other_embedding(pair: Pair) -> Callable[[Path], None]:
    from safetensors.torch import load_file

    embedding = load_file(pair.target / "model.safetensors")["model.embed_tokens.weight"]
    return lambda folder: edit_tensors(folder, lambda t: t.update({"embed_tokens.weight": embedding.roll(1, 0)}))


def shake(tensors: Tensors, by: float) -> None:
    noise = torch.randn(tensors["fc.weight"].shape, generator=torch.Generator().manual_seed(0))
    tensors["fc.weight"] += by * noise


def rounded(states: torch.Tensor) -> torch.Tensor:
    """To a bit of fraction, which is coarser than any dtype of an engine and as far from float32 as 16 bits may be."""
    fraction, exponent = torch.frexp(states)
    return torch.ldexp((fraction * 4).round() / 4, exponent)


def shift_map(tensors: Tensors) -> None:
    tensors["d2t"] = (tensors["d2t"] + 1).clamp_max(111)
    tensors["d2t"][-1] -= 1


def roll_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].roll(1, 0)


#: What is planted in an exported folder, and the cause that has to be named.
EAGLE1 = {
    "theta 10000 for 500": (theta, "rotary settings"),
    "rope_scaling dropped": (unscaled, "rotary settings"),
    "another embedding": (None, "embedding"),
    "qkv_bias not declared": (lambda folder: edit_config(folder, lambda config: config.pop("qkv_bias")), "biases"),
    "short context": (
        lambda folder: edit_config(folder, lambda config: config.update(max_position_embeddings=130)),
        "length limit",
    ),
}
EAGLE3 = {
    "d2t shifted by one": (lambda folder: edit_tensors(folder, shift_map), "vocabulary map"),
    "another lm_head": (lambda folder: edit_tensors(folder, roll_head), "head"),
    "final norm missing": (lambda folder: edit_tensors(folder, lambda tensors: tensors.pop("norm.weight")), "norms"),
}
#: What is planted in the served prompts, or in the store.
PROMPTS = {
    "another template": "chat template",
    "no generation prompt": "generation prompt",
    "a system prompt": "system prompt",
    "another think mode": "template variables (think mode)",
}
STORES = {
    "shifted by one": "features shifted",
    "without the final norm": "final norm of the features",
    "altered": "features of the engine",
    "rounded": "dtype",
}
#: What is wrong with neither prompts nor store nor export.
OTHERS = {"another computation": "draft logits", "another draft": "draft and store"}
SOUND = ("EAGLE-1", "EAGLE-3", "EAGLE-1 that thinks", "EAGLE-1 by itself")
#: Engines in 16 bits, of drafts that are right now and then; the store of the second is in float32.
ROUNDED = ("weak in bfloat16", "weak in bfloat16, not so the store")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verdict]:
    root, began = tmp_path_factory.mktemp("gate"), time.monotonic()
    torch.set_num_threads(1)  # tiny matrices gain nothing from more
    data, template = data_file(root), write_templates(root)
    one, three = eagle1_pair(root / "1"), eagle3_pair(root / "3")
    other = tuned(one, root / "other")
    store = make_store(root / "store", one.target, data, template["plain"], "eagle1")
    told = make_store(
        root / "told", one.target, data, template["thinks"], "eagle1", "--chat_template_kwargs",
        '{"enable_thinking": false}',
    )  # fmt: skip
    wide = make_store(root / "wide", three.target, data, template["plain"], "eagle3")
    theirs = make_store(root / "theirs", other.target, data, template["plain"], "eagle1")
    scale = torch.linspace(0.2, 3.0, 512)[:, None]
    stores = {
        "shifted by one": altered(store, root / "shifted", lambda states: states.roll(-1, 0)),
        "without the final norm": altered(store, root / "unnormed", lambda states: states * scale[: len(states)]),
        "altered": altered(store, root / "altered", lambda states: states + states.roll(7, 1)),
        "rounded": altered(store, root / "rounded", rounded),
    }
    manifest = stores["rounded"] / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"dtype": "float16"}))
    weak = changed(one, root / "weak", lambda tensors: shake(tensors, 0.006))
    untaught = changed(one, root / "untaught", lambda tensors: shake(tensors, 10.0))
    narrow = make_store(root / "narrow", one.target, data, template["plain"], "eagle1", "--dtype", "bfloat16")
    plain = template["plain"]
    asked: dict[str, tuple[Pair, Path, Gate]] = {
        "EAGLE-1": (one, one.exported, gate_of(one, store, plain)),
        "EAGLE-1 by itself": (one, one.exported, gate_of(one, store, plain, trained=None)),
        "EAGLE-1 that thinks": (
            one, one.exported, gate_of(one, told, template["thinks"], told={"enable_thinking": False}),
        ),
        "EAGLE-3": (three, three.exported, gate_of(three, wide, plain)),
        "another template": (one, one.exported, gate_of(one, store, "llama2")),
        "no generation prompt": (one, one.exported, gate_of(one, store, template["no header"])),
        "a system prompt": (one, one.exported, gate_of(one, store, template["system"])),
        "another think mode": (
            one, one.exported, gate_of(one, told, template["thinks"], told={"enable_thinking": True}),
        ),
        **{name: (one, one.exported, gate_of(one, path, plain)) for name, path in stores.items()},
    }  # fmt: skip
    asked["another computation"] = (one, root / "eagle-0", gate_of(one, store, plain))
    asked["another draft"] = (untaught, untaught.exported, gate_of(untaught, store, plain))
    asked |= {
        name: (weak, weak.exported, gate_of(weak, of, plain)) for name, of in zip(ROUNDED, (narrow, store), strict=True)
    }
    for pair, damages, of in ((one, EAGLE1, store), (three, EAGLE3, wide)):
        for number, (name, (damage, _)) in enumerate(damages.items()):
            folder = damaged(pair, root / f"{pair.method}-{number}", damage or other_embedding(pair))
            asked[name] = (pair, folder, gate_of(pair, of, plain, folder))
    # Damaged ones first: what is left as it was in memory must not be right by chance.
    wrong = asked["theta 10000 for 500"][1]
    asked["rope_theta, by itself"] = (one, wrong, gate_of(one, store, plain, wrong, trained=None))
    mixed = dataclasses.replace(other, target=one.target)
    asked["another checkpoint"] = (mixed, other.exported, gate_of(mixed, theirs, plain))
    order = sorted(asked, key=lambda name: name not in EAGLE1 and name not in EAGLE3)
    answers = verdicts({name: asked[name] for name in order}, root, dict.fromkeys(ROUNDED, "bfloat16"))
    for name in asked:
        print(f"\n--- {name}", *gate_lines(answers[name]), sep="\n")
    engines = len({served for _, served, _ in asked.values()})
    print(f"\n{len(asked)} gates, {engines} engines: {time.monotonic() - began:.0f} s")
    return answers


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_draft_is_said_to_be_sound(found: dict[str, Verdict], name: str) -> None:
    verdict = found[name]
    assert verdict.is_sound, gate_lines(verdict)
    assert verdict.engine.chains > 30
    assert verdict.engine == verdict.predicted
    assert verdict.engine.rates()[0] > 0.6, "an oracle"
    assert verdict.same[0] == verdict.same[1]


@pytest.mark.parametrize("name", ROUNDED)
def test_rounding_alone_is_no_cause(found: dict[str, Verdict], name: str) -> None:
    verdict = found[name]
    assert verdict.is_sound, gate_lines(verdict)
    assert 0.05 < verdict.engine.rates()[0] < 0.9, "neither always nor never right"


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_left_is_named(found: dict[str, Verdict], name: str) -> None:
    verdict = found[name]
    assert [one.name for one in verdict.causes] == [OTHERS[name]], gate_lines(verdict)


@pytest.mark.parametrize("name", [*PROMPTS, *STORES])
def test_a_cause_in_prompts_or_store_is_named(found: dict[str, Verdict], name: str) -> None:
    verdict = found[name]
    assert [one.name for one in verdict.causes] == [(PROMPTS | STORES)[name]], gate_lines(verdict)
    assert not verdict.is_sound


def test_a_store_of_another_checkpoint_is_named_and_costs_acceptance(found: dict[str, Verdict]) -> None:
    """The draft is right for the model of its store, and is served with that model's ancestor."""
    verdict = found["another checkpoint"]
    assert [one.name for one in verdict.causes] == ["another base model"], gate_lines(verdict)
    assert verdict.differs["features"] and not verdict.differs["draft"] and not verdict.differs["prefix"]
    assert verdict.believed.rates()[0] > 0.8 and verdict.engine.rates()[0] < 0.3
    assert verdict.engine == verdict.predicted


def test_without_the_trained_draft_the_base_model_says_what_is_wrong(found: dict[str, Verdict]) -> None:
    verdict = found["rope_theta, by itself"]
    assert [one.name for one in verdict.causes] == ["rotary settings"], gate_lines(verdict)
    assert verdict.differs["draft"]


@pytest.mark.parametrize("name", [*EAGLE1, *EAGLE3])
def test_a_cause_in_the_export_is_named_and_costs_acceptance(found: dict[str, Verdict], name: str) -> None:
    verdict = found[name]
    assert [one.name for one in verdict.causes] == [(EAGLE1 | EAGLE3)[name][1]], gate_lines(verdict)
    assert verdict.differs["draft"] and not verdict.differs["prefix"] and not verdict.differs["features"]
    assert verdict.engine.rates()[0] < verdict.predicted.rates()[0]


@pytest.mark.long
@pytest.mark.parametrize("draft", ["eagle1", "eagle3"])
def test_a_trained_draft_through_the_commands(tmp_path: Path, draft: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Store, training, export and the proof: what training believed of its split is what the engine accepts."""
    torch.set_num_threads(1)
    teach_target(tmp_path / "base")
    data, template = write_sharegpt(tmp_path / "data.json", conversations(64, turns=1)), write_templates(tmp_path)
    store = make_store(tmp_path / "store", tmp_path / "base", data, template["plain"], draft)
    options = TrainOptions(
        tmp_path / "run", tmp_path / "base", tmpdir=store, draft=draft, num_epochs=2, lr=3e-3, val_ratio=0.2,
        **({"draft_vocab_size": 150} if draft == "eagle3" else {}),
    )  # fmt: skip
    assert run_training(options) == 0
    layout = next(iter(DRAFT_FAMILIES[draft].layouts))
    exported = export(tmp_path / "base", tmp_path / "run", tmp_path / "export", layout)[layout]
    words = ["--base-path", tmp_path / "base", "--draft-path", exported, "--tmpdir", store, "--num_prompts", 1]
    words += ["--trained-path", tmp_path / "run", "--val_ratio", 0.2, "--dtype", "float32", "--max_new_tokens", 48]
    for name, code in (("plain", 0), ("system", 1)):
        more = ["--chat_template", template[name], "--output", tmp_path / f"{name}.json"]
        assert run(lambda more=more: verify.main([str(word) for word in [*words, *more]])) == code
        print(capsys.readouterr().out)
    sound, wrong = (json.loads((tmp_path / f"{name}.json").read_text())["gate"] for name in ("plain", "system"))
    assert sound["engine"] == sound["predicted"] and 0.1 < sound["engine"]["rates"][0] < 1
    assert [one["name"] for one in wrong["causes"]] == ["system prompt"]
