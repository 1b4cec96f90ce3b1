"""The train/serve gate without a vLLM: predictions against our own decoding, and the tests of single causes."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle.decode.drafter import StaticDrafter
from eagle.decode.fitting_draft import load_fitting_draft
from eagle.decode.generate import SpeculativeDecoder, generate_alone
from eagle.decode.sampling import Sampling
from eagle.decode.target import load_target
from eagle.decode.tree import chain_paths
from eagle.drafts.families import DRAFT_FAMILIES
from eagle.drafts.saved import load_draft
from eagle.errors import RequestError
from eagle.files import ROOT
from eagle.store.reader import FeatureStore
from eagle.target.check import check_target
from eagle.target.features import features_of
from eagle.vllm import causes, verify
from eagle.vllm.as_exported import trained_draft
from eagle.vllm.capture import Watched, assembled
from eagle.vllm.conversations import HeldOut
from eagle.vllm.export import export
from eagle.vllm.gate import Gate, GateOptions, Verdict, check_store, gate_lines, judge, split_of
from eagle.vllm.prediction import Counts, Predictor, differing, served
from tests.oracle import Shape, random_prompts, write_pair
from tests.oracle3 import write_oracle
from tests.tiny import conversations, write_sharegpt
from tests.vllm.damage import edit_config, edit_tensors
from tests.vllm.planted import (
    Pair,
    altered,
    damaged,
    data_file,
    eagle1_pair,
    eagle3_pair,
    gate_of,
    make_store,
    write_templates,
)

CPU, K, NEW = torch.device("cpu"), 3, 40


@pytest.mark.parametrize("kind", ["eagle1", "eagle3"])
def test_rounds_are_those_of_our_own_decoding(tmp_path: Path, kind: str) -> None:
    if kind == "eagle1":
        base, draft = write_pair(tmp_path, Shape(kv_heads=2))
        tensors = load_file(draft / "model.safetensors")  # shaken, so that it is neither always nor never right
        noise = torch.randn(tensors["fc.weight"].shape, generator=torch.Generator().manual_seed(0))
        tensors["fc.weight"] += 0.006 * noise
        save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
    else:
        oracle = write_oracle(tmp_path, Shape(kv_heads=2))
        base, draft = oracle.target, oracle.draft
    target = load_target(base, torch.float32, CPU)
    network = load_fitting_draft(draft, base, target)
    decoder = SpeculativeDecoder(target, network, StaticDrafter(chain_paths(K), CPU, Sampling()), Sampling())
    predictor = Predictor(network, target.head, K)
    seen_accepted = set()
    for prompt in random_prompts(3, 40):
        reply = decoder.generate(prompt, NEW, [])
        tokens = torch.tensor([*prompt, *reply.tokens])
        with torch.inference_mode():
            features = features_of(target.trunk, (network.reads,), input_ids=tokens[None], use_cache=False)
        seen = Watched(tokens, len(prompt), features[network.reads][0], torch.empty(0), torch.empty(0, K))
        lengths, own = predictor.rounds(seen), [step.accepted for step in reply.steps if step.tried]
        # What both see of the last round is cut by the end of the reply.
        assert len(lengths) in (len(own), len(own) + 1) and lengths[: len(own) - 1] == own[:-1]
        seen_accepted |= set(lengths)
    assert {0, 1} <= seen_accepted


def test_counts_that_differ() -> None:
    one = Counts.of([3, 1, 0, 2] * 50, 3)
    assert one == Counts(200, (150, 100, 50)) and one.rates() == [0.75, 0.5, 0.25]
    assert one.error(1) == pytest.approx((0.25 / 200) ** 0.5)
    assert one.shown() == "0.75 0.50 0.25 (+-0.04)"
    assert differing(one, one) == []
    assert differing(one, Counts(200, (140, 92, 50))) == [], "as chance has it"
    assert differing(one, Counts(200, (150, 60, 10))) == [1, 2]
    assert differing(Counts(10**6, (500000,)), Counts(10**6, (510000,))) == [], "too little to be of interest"
    assert differing(one, Counts(0, (0, 0, 0))) == []


def test_a_sequence_is_put_together_from_calls() -> None:
    """A prompt of 4 in two parts; then two rounds, the first with a rejected row, which the second computes again."""

    def call(positions: list[int], last: int, drafted: list[int], scale: float = 1.0) -> dict[str, torch.Tensor]:
        states = torch.tensor(positions, dtype=torch.float)[:, None] * scale
        return {
            "target_positions": torch.tensor(positions),
            "target_hidden_states": states,
            "next_token_ids": torch.tensor([0]),
            "last": torch.tensor([last]),
            "drafted": torch.tensor([drafted]),
        }

    calls = [call([0, 1], 1, [9, 9]), call([2, 3], 1, [11, 12]), call([4, 5, 6], 1, [13, 14], 1.0)]
    calls.append(call([6, 7, 8], 2, [15, 16]))
    seen = assembled(calls, [1, 2, 3, 4], [10, 11, 70, 13, 14, 15])
    assert seen.features.flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert seen.starts.tolist() == [3, 5, 8] and seen.drafted.tolist() == [[11, 12], [13, 14], [15, 16]]
    assert served(seen, 2) == [1, 2]
    nothing = assembled([], [1, 2], [3, 4, 5])
    assert len(nothing.features) == 0 and served(nothing, 2) == [0, 0]


def evidence(stored: list[int], serving: list[int], **more: Any) -> Any:
    """What the tests of a prompt look at."""
    given = {"prompts": (stored, serving), "manifest": {}, "variables": None, "template": "t", "decode": str}
    given["is_of_variables"] = True
    return SimpleNamespace(**(given | more))


QUESTION = [7, 8, 9, 10, 11, 12]


@pytest.mark.parametrize(
    ("stored", "serving", "name"),
    [
        ([*QUESTION, 1, 2], QUESTION, "generation prompt"),
        (QUESTION, [*QUESTION, 1, 2], "generation prompt"),
        (QUESTION, [7, 50, 51, 7, *QUESTION[1:]], "system prompt"),
        ([50, 51, *QUESTION], QUESTION, "system prompt"),
        (QUESTION, [60, *QUESTION[1:-1], 61], "chat template"),
    ],
)
def test_what_differs_in_a_prompt(stored: list[int], serving: list[int], name: str) -> None:
    found = evidence(stored, serving)
    named = [cause.name for cause in causes.CAUSES if cause.part == causes.PREFIX and cause.find(found)]
    assert named[0] == name


def test_variables_come_first_and_equal_ones_are_no_cause() -> None:
    told = {"options": {"chat_template_kwargs": '{"enable_thinking": false}'}}
    (first, *_) = causes.CAUSES
    other = first.find(evidence([1, 2], [1], manifest=told))
    assert other and "is told nothing" in other and "false" in other
    same = evidence([1, 2], [1], manifest=told, variables={"enable_thinking": False})
    assert first.find(same) is None
    assert first.find(evidence([1, 2], [1], manifest=told, is_of_variables=False)) is None, "the template is at fault"


def found_of(name: str, **seen: Any) -> str | None:
    (cause,) = [one for one in causes.CAUSES if one.name == name]
    return cause.find(SimpleNamespace(**seen))


def test_what_is_left_when_nothing_else_differs() -> None:
    assert "shares 3 of the engine's 40 guesses" in (found_of("draft logits", same=(3, 40)) or "")
    assert found_of("draft logits", same=(39, 40)) is None and found_of("draft logits", same=(0, 0)) is None
    other = {"dtype": "float16", "computed_in": "bfloat16"}
    assert "computed in bfloat16" in (found_of("dtype", differs={causes.FEATURES}, **other) or "")
    assert found_of("dtype", differs={causes.DRAFT}, **other) is None, "it costs nothing"
    assert "same base model" in (found_of("features of the engine", is_target=True, apart=0.5, tolerance=0.2) or "")
    assert found_of("features of the engine", is_target=False, apart=0.5, tolerance=0.2) is None
    unsaid = {"is_target": False, "manifest": {}, "tolerance": 0.2, "differs": {causes.FEATURES}}
    assert "does not say of which" in (found_of("another base model", apart=0.5, **unsaid) or "")
    assert found_of("another base model", apart=0.1, **unsaid) is None
    assert found_of("another base model", apart=0.1, **unsaid | {"manifest": {"target": {}}}) is None
    assert found_of("another base model", apart=0.1, **unsaid | {"manifest": {"target": {"name": "another"}}})
    foreign = {"apart": 0.0, "tolerance": 0.1, "trained": SimpleNamespace(accuracy=None)}
    assert "in 1.0%" in (found_of("draft and store", first=0.01, **foreign) or "")
    assert found_of("draft and store", first=0.2, **foreign) is None
    assert found_of("draft and store", first=None, **foreign) is None
    # What the run says of itself goes before what any draft should have learned.
    foreign["trained"] = SimpleNamespace(accuracy=0.05)
    assert found_of("draft and store", first=0.04, **foreign) is None
    foreign["trained"] = SimpleNamespace(accuracy=0.6)
    said = found_of("draft and store", first=0.2, **foreign)
    assert said and "is right in 20.0%, where the training's validation had 60.0%" in said


def test_every_cause_has_a_cure_and_a_name_of_its_own() -> None:
    names = [cause.name for cause in causes.CAUSES]
    assert len(set(names)) == len(names) >= 10
    assert all(cause.cure.endswith(".") and cause.part in causes.PARTS for cause in causes.CAUSES)
    parts = [cause.part for cause in causes.CAUSES]
    assert parts == sorted(parts, key=list(causes.PARTS).index)


# The whole gate, with our own decoding in the engine's place.


def engine(gate: Gate, pair: Pair, exported: Path) -> list[Watched]:
    """What an engine would make of the gate's questions with the draft in that folder."""
    target = load_target(pair.target, torch.float32, CPU)
    network = load_draft(exported, target.embedding, target.config, lambda: target.head)
    predictor, found = Predictor(network.float(), target.head, gate.depth), []
    for prompt, new in gate.watched():
        tokens = torch.tensor([*prompt, *generate_alone(target, prompt, new, Sampling()).tokens])
        with torch.inference_mode():
            features = features_of(target.trunk, (network.reads,), input_ids=tokens[None], use_cache=False)
        known = features[network.reads][0, :-1]
        guesses = predictor.guesses(tokens[1:], known, torch.ones(len(known), dtype=torch.bool))
        starts = torch.arange(len(prompt) - 1, len(known))
        drafted = torch.stack([guesses[at, (starts + at).clamp_max(len(known) - 1)] for at in range(gate.depth)], 1)
        found.append(Watched(tokens, len(prompt), known, starts, drafted))
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class Made:
    pair: Pair
    data: Path
    templates: dict[str, Path]
    store: Path

    def verdict(self, exported: Path | None = None, dtype: str = "float32", **gate: Any) -> Verdict:
        folder = exported or self.pair.exported
        asked = gate_of(self.pair, gate.pop("store", self.store), gate.pop("template", self.templates["plain"]), folder)
        return judge(asked, engine(asked, self.pair, folder), dtype)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("gate")
    pair, data, templates = eagle1_pair(root / "pair"), data_file(root), write_templates(root)
    return Made(pair, data, templates, make_store(root / "store", pair.target, data, templates["plain"], "eagle1"))


def test_what_is_sound_is_said_to_be(made: Made) -> None:
    verdict = made.verdict()
    assert verdict.is_sound and verdict.wrong() is None, gate_lines(verdict)
    assert verdict.predicted == verdict.engine and verdict.believed == verdict.measured
    assert "accepts what training makes expect" in gate_lines(verdict)[-1]
    assert "6 of 6 served prompts are the stored ones" in "\n".join(gate_lines(verdict))


def test_a_damaged_export(made: Made, tmp_path: Path) -> None:
    def damage(folder: Path) -> None:
        edit_config(folder, lambda config: config.update(rope_theta=10000.0, rope_parameters=None))

    verdict = made.verdict(damaged(made.pair, tmp_path / "damaged", damage))
    assert [one.name for one in verdict.causes] == ["rotary settings"] and verdict.differs["draft"]
    assert "rope_theta is 10000.0 in the export and should be 500.0" in "\n".join(gate_lines(verdict))
    assert "otherwise than training makes expect: rotary settings" in (verdict.wrong() or "")
    written = json.loads(json.dumps(verdict.to_json()))
    assert written["causes"][0]["cure"] and not written["is_sound"]
    # What is wrong with the export is not put down to a store of another dtype.
    verdict = made.verdict(tmp_path / "damaged", dtype="bfloat16")
    assert [one.name for one in verdict.causes] == ["rotary settings"]


SCALED = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("change", "thetas"),
    [
        # transformers 5 takes the rope_theta that stands by itself, and 10000 for none, where there is rope_scaling.
        ({"rope_theta": 10000.0, "rope_scaling": SCALED, "rope_parameters": {**SCALED, "rope_theta": 500.0}},
         "500.0 or 10000.0"),
        ({"rope_theta": None, "rope_scaling": SCALED, "rope_parameters": {**SCALED, "rope_theta": 500.0}},
         "500.0 or 10000.0"),
        ({"rope_theta": 500.0, "rope_scaling": SCALED, "rope_parameters": {**SCALED, "rope_theta": 7.0}},
         "7.0 or 500.0"),
        ({"rope_theta": 500.0, "rope_scaling": SCALED, "rope_parameters": {**SCALED, "rope_theta": 500.0}}, None),
        ({"rope_theta": 500, "rope_scaling": None, "rope_parameters": None}, None),
        ({"rope_theta": None, "rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
         None),
    ],
)  # fmt: skip
def test_a_theta_counts_wherever_it_is_given(made: Made, tmp_path: Path, change: dict[str, Any], thetas: str) -> None:
    folder = damaged(made.pair, tmp_path / "damaged", lambda at: edit_config(at, lambda config: config.update(change)))
    checked = check_target(made.pair.target, "--base-path")
    asked = (checked.weights, checked.config, DRAFT_FAMILIES["eagle1"])
    found = [str(one) for one in trained_draft(folder, made.pair.draft, *asked).differences if one.name == "rope_theta"]
    assert found == ([f"rope_theta is {thetas} in the export and should be 500.0"] if thetas else [])


def test_an_export_of_other_weights_is_not_told_by_its_head_alone(made: Made, tmp_path: Path) -> None:
    def damage(folder: Path) -> None:
        edit_tensors(folder, lambda tensors: [tensor.mul_(2) for tensor in tensors.values()])

    verdict = made.verdict(damaged(made.pair, tmp_path / "damaged", damage))
    named = {one.name: one.words for one in verdict.causes}
    assert {"norms", "weights or config"} <= named.keys()
    assert re.search(r"fc.weight .*; and \d+ more", named["weights or config"])


def test_where_nothing_is_compared_nothing_is_called_sound(made: Made) -> None:
    """Chains as long as no stored reply."""
    pair, plain = made.pair, made.templates["plain"]
    asked = gate_of(pair, made.store, plain)
    longer = dataclasses.replace(asked, depth=400)
    verdict = judge(longer, engine(longer, pair, pair.exported), "float32")
    assert not verdict.believed.chains and not verdict.causes and not verdict.is_sound
    assert "no stored reply is as long as a chain of 400 tokens" in gate_lines(verdict)[-1]
    assert "The gate had nothing to compare" in (verdict.wrong() or "") and verdict.to_json()["nothing_compared"]


def test_prompts_that_the_engine_has_no_room_for_are_counted(made: Made) -> None:
    checked = check_target(made.pair.target, "--base-path")
    plain, context = made.templates["plain"], checked.config.max_position_embeddings
    whole = gate_of(made.pair, made.store, plain).held_out
    prompts = sorted(len(one.stored) for one in whole.conversations)

    def held(room: int) -> HeldOut:
        return gate_of(made.pair, made.store, plain, new_tokens=context - made.pair.depth - 2 - room).held_out

    some = held(prompts[-1])
    assert 0 < some.too_long == len(whole.conversations) - len(some.conversations)
    with pytest.raises(RequestError, match=f"prompts of its {len(prompts)} held-out .* longer than the 1 tokens"):
        held(1)
    with pytest.raises(RequestError, match="leaves no room for a prompt"):
        held(0)


def test_another_template_and_another_store(made: Made, tmp_path: Path) -> None:
    verdict = made.verdict(template="llama2")
    assert [one.name for one in verdict.causes] == ["chat template"] and not verdict.is_sound
    assert verdict.wrong() is not None
    shifted = altered(made.store, tmp_path / "shifted", lambda states: states.roll(1, 0))
    verdict = made.verdict(store=shifted)
    assert [one.name for one in verdict.causes] == ["features shifted"]
    assert "are the engine's at the last one" in verdict.causes[0].words
    noisy = altered(made.store, tmp_path / "noisy", lambda states: states + states.roll(7, 1))
    verdict = made.verdict(store=noisy)
    assert [one.name for one in verdict.causes] == ["features of the engine"], "the model is the same"
    # Classic dumps do not say of which model they are.
    gate = gate_of(made.pair, noisy, made.templates["plain"], made.pair.exported)
    unnamed = dataclasses.replace(gate, held_out=dataclasses.replace(gate.held_out, manifest={}))
    verdict = judge(unnamed, engine(gate, made.pair, made.pair.exported), "float32")
    assert [one.name for one in verdict.causes] == ["another base model"]
    assert "does not say of which base model it is" in verdict.causes[0].words


def test_replies_that_are_not_trained_belong_to_the_prompt(made: Made, tmp_path: Path) -> None:
    """A conversation of which only the last reply is trained is served up to that one."""
    records = conversations(24, turns=2, seed=3)
    for record in records:
        roles = ("user", "assistant") * 2
        said = [
            {"role": role, "content": turn["value"]}
            for role, turn in zip(roles, record.pop("conversations"), strict=True)
        ]
        said[1]["weight"] = 0
        record["messages"] = said
    data = write_sharegpt(tmp_path / "messages.json", records)
    store = make_store(tmp_path / "store", made.pair.target, data, made.templates["plain"], "eagle1")
    verdict = made.verdict(store=store)
    assert verdict.is_sound, gate_lines(verdict)
    assert "6 of 6 served prompts are the stored ones" in "\n".join(gate_lines(verdict))
    verdict = made.verdict(store=store, template=made.templates["no header"])
    assert [one.name for one in verdict.causes] == ["generation prompt"]


def test_a_first_reply_that_gives_no_row(made: Made, tmp_path: Path) -> None:
    """It lacks the reasoning that the prompt begins; the first row is of the second reply, and so is the prompt."""
    opens = tmp_path / "opens.jinja"
    opens.write_text(made.templates["plain"].read_text().replace("assistant\\n'", "assistant\\n<think>\\n'"))
    assert opens.read_text() != made.templates["plain"].read_text()
    records = conversations(24, turns=2, seed=3)
    for record in records:
        record["conversations"][3]["value"] = f"<think>\nabc\n</think>\n\n{record['conversations'][3]['value']}"
    data = write_sharegpt(tmp_path / "talks.json", records)
    store = make_store(tmp_path / "store", made.pair.target, data, opens, "eagle1")
    assert len(FeatureStore(store)) > 20
    gate = gate_of(made.pair, store, opens)
    assert all(one.served == one.as_told == one.stored for one in gate.held_out.conversations)
    verdict = made.verdict(store=store, template=opens)
    assert verdict.is_sound, gate_lines(verdict)
    # Another template is still found out, behind the same turns.
    gate = gate_of(made.pair, store, made.templates["plain"])
    cut = [one.stored[: len(one.served or [])] == one.served for one in gate.held_out.conversations]
    assert all(cut) and all(len(one.served or []) < len(one.stored) for one in gate.held_out.conversations)


def test_the_split_is_the_runs(tmp_path: Path) -> None:
    """What is said to be held out is what the trained run held out."""
    checkpoint = tmp_path / "run" / "state_3"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run" / "best").write_text("state_3")
    split = {"val_ratio": 0.2, "seed": 7, "max_len": 512}
    (checkpoint / "state.json").write_text(json.dumps({"step": 3, "run": split | {"bs": 4}}))
    assert split_of(tmp_path / "run") == split_of(checkpoint) == split
    assert split_of(None) == split_of(tmp_path) == {}

    def options(*more: str) -> GateOptions | None:
        words = ["--base-path", "base", "--draft-path", "draft", "--tmpdir", "store", *more]
        return verify.gate_options(verify.make_parser().parse_args(words))

    run = ("--trained-path", str(tmp_path / "run"))
    assert options(*run, "--seed", "7") == GateOptions(Path("store"), Path(run[1]), is_split_known=True, **split)
    assert options("--seed", "7") == GateOptions(Path("store"), seed=7)
    with pytest.raises(RequestError, match=r"--seed 42: the run of --trained-path .*run had 7.*Leave it out"):
        options(*run, "--seed", "42")
    with pytest.raises(RequestError, match="--seed -1: expected 0 to 4,294,967,295"):
        options("--seed", "-1")


def test_a_store_that_the_run_was_not_trained_on_is_refused(made: Made, tmp_path: Path) -> None:
    """Its split is not what the run held out."""
    store = FeatureStore(made.store)
    run = {"records": len(store), "tokens": store.tokens, "conversations": store.records_digest()}
    for name, other in ((None, None), ("tokens", 7), ("conversations", "sha256 1")):
        shutil.copytree(made.pair.draft, tmp_path / str(name))
        (tmp_path / str(name) / "state.json").write_text(json.dumps({"run": run | {name: other} if name else run}))
        if name is None:
            check_store(store, tmp_path / str(name))
            continue
        with pytest.raises(RequestError, match=f"is not the store that --trained-path .*{name} .* there"):
            gate_of(made.pair, made.store, made.templates["plain"], trained=tmp_path / str(name))


def test_conversations_that_are_not_there_are_said_to_be_untested(made: Made) -> None:
    made.data.rename(made.data.with_name("moved.json"))
    try:
        verdict = made.verdict(template="llama2")
        assert verdict.is_sound
        assert f"not the served prompts: {made.data} is not there" in "\n".join(gate_lines(verdict))
        assert verdict.to_json()["not_tested"]
    finally:
        made.data.with_name("moved.json").rename(made.data)


def test_stores_of_several_data_files(made: Made, tmp_path: Path) -> None:
    """Every conversation is looked for in the file that it is of."""
    data = write_sharegpt(tmp_path / "other.json", conversations(24, turns=1, seed=6))
    both = tmp_path / "both"
    shutil.copytree(made.store, both / "a")
    make_store(both / "b", made.pair.target, data, made.templates["plain"], "eagle1")
    gate = gate_of(made.pair, both, made.templates["plain"], conversations=40)
    found = gate.held_out.conversations
    assert len(found) > 12 and not gate.held_out.unknown
    assert all(one.served == one.stored for one in found)


def test_a_store_of_a_split_and_one_of_several_paths(made: Made, tmp_path: Path) -> None:
    """The conversations are found where the store says, and where they were moved to."""
    plain, target = made.templates["plain"], made.pair.target
    files = [write_sharegpt(tmp_path / f"{seed}.json", conversations(16, turns=1, seed=seed)) for seed in (5, 6)]
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "train-00000-of-00001.jsonl").write_bytes(
        b"".join(json.dumps(talk).encode() + b"\n" for talk in json.loads(files[0].read_bytes()))
    )
    of_split = make_store(tmp_path / "a", target, tmp_path / "split" / "train", plain, "eagle1")
    of_two = make_store(tmp_path / "b", target, files[0], plain, "eagle1", "--data_path", str(files[1]))
    for store in (of_split, of_two):
        gate = gate_of(made.pair, store, plain)
        assert not gate.held_out.unknown and all(one.served == one.stored for one in gate.held_out.conversations)
    moved = tuple(file.rename(tmp_path / f"moved-{file.name}") for file in files)
    (tmp_path / "split").rename(tmp_path / "elsewhere")
    said = gate_of(made.pair, of_two, plain).held_out.unknown
    assert f"{files[0]} is not there; name all 2 with --data_path, in this order" in said
    for store, named in ((of_split, (tmp_path / "elsewhere" / "train",)), (of_two, moved)):
        assert not gate_of(made.pair, store, plain, data_path=named).held_out.unknown
    with pytest.raises(RequestError, match=r"is not what the store was made from, .*name all 2 with --data_path"):
        gate_of(made.pair, of_two, plain, data_path=moved[:1])


def test_what_is_named_wrongly_is_refused(made: Made, tmp_path: Path) -> None:
    plain = made.templates["plain"]
    for named, says in ((tmp_path / "gone.json", "is not there"), (ROOT / "README.md", "expected a JSON array")):
        with pytest.raises((RequestError, FileNotFoundError), match=says):
            gate_of(made.pair, made.store, plain, data_path=(named,))
    other = write_sharegpt(tmp_path / "other.json", conversations(24, turns=1, seed=6))
    with pytest.raises(RequestError, match=r"--data_path .* is not what the store was made from"):
        gate_of(made.pair, made.store, plain, data_path=(other,))
    checked = check_target(made.pair.target, "--base-path")
    asked = (checked.weights, checked.config, DRAFT_FAMILIES["eagle3"])
    with pytest.raises(RequestError, match=r"--trained-path .* is an EAGLE-1 draft.*Name the run that was exported"):
        trained_draft(made.pair.exported, made.pair.draft, *asked)
    with pytest.raises(FileNotFoundError, match="--trained-path"):
        gate_of(made.pair, made.store, plain, trained=tmp_path / "gone")


def test_a_store_without_what_the_draft_reads_is_refused(made: Made, tmp_path: Path) -> None:
    three = eagle3_pair(tmp_path)
    with pytest.raises(
        RequestError, match=r"holds the last hidden states, and this draft reads the inputs of the layers"
    ):
        gate_of(three, made.store, made.templates["plain"])


def test_exports_of_every_form_are_as_exporting_again_makes_them(made: Made, tmp_path: Path) -> None:
    three = eagle3_pair(tmp_path)
    folders = export(three.target, three.draft, tmp_path / "both", "both")
    assert set(folders) == {"plain", "speculators"}
    for pair, exported, name in (
        (made.pair, made.pair.exported, "eagle1"),
        *((three, folder, "eagle3") for folder in folders.values()),
    ):
        checked = check_target(pair.target, "--base-path")
        asked = (checked.weights, checked.config, DRAFT_FAMILIES[name])
        for trained in (pair.draft, None):
            found = trained_draft(exported, trained, *asked)
            assert found.differences == [] and found.by_itself == (trained is None)
    # Where this key is absent that form takes true, and the draft is one that says false.
    edit_config(folders["speculators"], lambda config: config.pop("norm_before_residual"))
    edit_tensors(folders["speculators"], lambda tensors: tensors["d2t"].add_(1))
    edit_config(folders["speculators"], lambda config: config["transformer_layer_config"].update(rms_norm_eps=0.1))
    checked = check_target(three.target, "--base-path")
    asked = (checked.weights, checked.config, DRAFT_FAMILIES["eagle3"])
    found = trained_draft(folders["speculators"], three.draft, *asked)
    assert [one.name for one in found.differences] == ["norm_before_residual", "rms_norm_eps", "d2t"]
