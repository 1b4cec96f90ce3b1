"""The search behind the defaults: what its rows come to for a base model and a store."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import judging, recipes
from benchmarks.recipe_rows import FAMILIES, LAYERS, ROWS, NotHere, Row
from benchmarks.recipe_stores import HELD_OUT, Source
from eagle.drafts.choices import DraftChoices
from eagle.drafts.eagle3.draft_config import draft_config_for
from eagle.drafts.eagle3.family import Eagle3
from eagle.errors import RequestError, WorkError
from eagle.files import write_json
from eagle.store.manifest import MANIFEST
from eagle.store.reader import FeatureStore
from eagle.store.record import Record
from eagle.store.writer import ShardWriter
from eagle.target.config import load_config
from eagle.target.features import aux_name
from tests.tiny import make_target

WIDTH, DEPTH, RECORDS = 32, 16, 40
EVERY = (2, 4, 8, 12, 13, 15)
#: As the tiny base model has fewer tokens than the family takes.
EAGLE3 = ["--draft", "eagle3", "--draft_vocab_size", "424"]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("target"), layers=DEPTH)


def store(folder: Path, layers: tuple[int, ...], store_dtype: str = "same") -> Path:
    writer = ShardWriter(folder / "0", store_dtype=store_dtype)
    for number in range(RECORDS):
        generator = torch.Generator().manual_seed(number)
        hidden = torch.randn(12, WIDTH, generator=generator)
        states = {layer: torch.randn(12, WIDTH, generator=generator) for layer in EVERY}
        ids, mask = torch.arange(12, dtype=torch.int32), torch.ones(12, dtype=torch.uint8)
        aux = torch.cat([states[layer] for layer in layers], -1)
        writer.add(Record(number, ids, mask, hidden, {aux_name(layers): aux}))
    writer.close_shard()
    data = {"digest": "0" * 16, "records": RECORDS}
    write_json(folder / MANIFEST, {"format_version": 1, "target": {}, "data": data, "complete": True})
    return folder


def asked(target: Path, workdir: Path, **more: object) -> argparse.Namespace:
    given = {"basepath": target, "workdir": workdir, "tokens": 200, "bs": 4, "max_len": 512, **more}
    return argparse.Namespace(**given)


def row(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("default", (2, 15, 27)), ("early", (2, 7, 15)), ("late", (15, 22, 27)), ("with-last", (2, 15, 29)),
     ("two", (15, 27)), ("four", (2, 15, 22, 27))],
)  # fmt: skip
def test_layers_of_a_model_of_thirty(name, layers):
    assert LAYERS[name](30) == layers


def test_every_choice_of_layers_is_one_or_is_none(target):
    """Whatever the depth: in order, each once and there; or the row is left out in words."""
    config = load_config(target)
    for count in range(1, 100):
        object.__setattr__(config, "num_hidden_layers", count)
        for one in (one for one in ROWS if one.layers):
            try:
                found = one.aux_layers(config)
            except NotHere as error:
                assert count < 13 and one.name in str(error) and f"{count} layers" in str(error)
            else:
                draft_config_for(config, None, DraftChoices(found))


def test_rows_that_name_no_layers_read_the_default_ones(target, tmp_path, capsys):
    """Where the store holds more; the others read theirs, and EAGLE-1 reads none."""
    rows = [row(name) for name in ("family/eagle1", "family/eagle3", "layers/eagle3-default", "layers/eagle3-four")]
    wide, usual = (Source(store(tmp_path / name, of), "--store", 512) for name, of in
                   (("wide", EVERY), ("usual", (2, 8, 13))))  # fmt: skip
    args = asked(target, tmp_path)
    first, second, third, fourth = (one.flags for one in recipes.plans_of(rows, args, {"--store": wide}))
    assert "--store holds more layers; rows that name none read 2,8,13" in capsys.readouterr().out
    assert "--aux_layers" not in first
    assert second == third == [*EAGLE3, "--aux_layers", "2,8,13"]
    assert fourth[-2:] == ["--aux_layers", "2,8,12,13"]
    plans = recipes.plans_of(rows[:3], args, {"--store": usual})
    assert [one.flags for one in plans] == [["--draft", "eagle1"], EAGLE3, EAGLE3]
    with pytest.raises(RequestError, match=r"layers 2,8,13.*eagle3-four: 12.*--draft eagle3 --aux_layers 2,8,12,13"):
        recipes.plans_of(rows, args, {"--store": usual})


def test_sizes_of_the_draft(target, tmp_path):
    """Of the base model's config; a size that is its own anyway is no row."""
    base = load_config(target)
    for name, sizes in (("mlp-double", (2 * base.intermediate_size, base.num_key_value_heads)),
                        ("all-keys", (base.intermediate_size, base.num_attention_heads))):  # fmt: skip
        config = row(f"sizes/eagle3-{name}").draft_config(base)
        (tmp_path / "config.json").write_text(json.dumps(config))
        draft = draft_config_for(base, tmp_path / "config.json", DraftChoices((2, 8, 13)))
        assert (draft.intermediate_size, draft.num_key_value_heads) == sizes
    object.__setattr__(base, "num_key_value_heads", base.num_attention_heads)
    with pytest.raises(NotHere, match=r"sizes/eagle3-all-keys.*the base model's own size"):
        row("sizes/eagle3-all-keys").draft_config(base)


@pytest.mark.parametrize("store_dtype", ["same", "int8"])
def test_several_epochs_are_of_a_part(tmp_path, store_dtype):
    source = Source(store(tmp_path / "store", EVERY, store_dtype), "--store", 512)
    wanted = 100
    part = FeatureStore(source.write_part(wanted, (2, 8, 13), tmp_path / "part"))
    held = part.supervised().sum() * (1 - HELD_OUT)
    assert wanted <= held < wanted + 20 and part.identity() == source.store.identity()
    chosen = source.part(wanted)
    assert len(part) == len(chosen) < RECORDS and np.array_equal(part.groups, np.arange(len(part)))
    for ours, index in zip(part.stored(range(len(part))), chosen.tolist(), strict=True):
        (theirs,) = source.store.stored([index])
        assert ours.conversation == theirs.conversation and list(ours.features) == ["hidden_state", "aux_2_8_13"]
        assert torch.equal(ours.features["aux_2_8_13"].unpack(), theirs.feature("aux_2_8_13").unpack())
    assert source.write_part(wanted, (2, 8, 13), tmp_path / "part") == tmp_path / "part", "it is kept"


def test_what_was_trained_is_found_again(target, tmp_path, monkeypatch):
    """By what decides it, whatever row it was for; the store, the sizes and the layers are among that."""
    commands: list[list[str]] = []

    def trained(command: list[str], log: Path) -> None:
        commands.append(command)
        Path(command[-1]).mkdir(parents=True)

    monkeypatch.setattr(recipes, "call", trained)
    source, args = Source(store(tmp_path / "store", EVERY), "--store", 512), asked(target, tmp_path / "work")
    names = ["family/eagle3", "layers/eagle3-default", "token-loss/eagle3-token_loss-lk_hybrid", "layers/eagle3-late",
             "sizes/eagle3-mlp-half", "sizes/eagle3-mlp-double", "epochs/eagle3-2-of-0.5"]  # fmt: skip
    plans = recipes.plans_of([row(name) for name in names], args, {"--store": source})
    args.workdir.mkdir()
    found = [recipes.train(one, 0, args) for one in plans]
    assert found[0] == found[1] and len(set(found)) == len(commands) == len(names) - 1
    assert re.fullmatch(r"family-eagle3-[0-9a-f]{8}-0", found[0].name)
    assert all("--save_every" in command for command in commands), "else an interrupted row begins anew"
    assert [recipes.train(one, 0, args) for one in plans] == found and len(commands) == len(names) - 1
    assert recipes.train(plans[0], 1, args) != found[0]
    spelled = dataclasses.replace(plans[0], flags=[*plans[0].flags, "--ttt_decay", "0.8"])
    assert recipes.train(spelled, 0, args) == found[0], "a default is the same, said or not"
    monkeypatch.setattr(Eagle3, "learning_rate", 2e-3)
    assert recipes.train(plans[0], 0, args) != found[0], "with another default it is another run"
    monkeypatch.undo()
    monkeypatch.setattr(recipes, "call", trained)
    twice = commands[len(names) - 2]
    told = {word: twice[at + 1] for at, word in enumerate(twice) if word.startswith("--") and at + 1 < len(twice)}
    assert told["--num_epochs"] == "3" and told["--max_steps"] == str(plans[0].steps), "as many steps as once through"
    assert told["--init_positions"] == "100" and len(FeatureStore(told["--tmpdir"])) < RECORDS
    sizes = [json.loads(Path(command[command.index("--configpath") + 1]).read_text())["intermediate_size"]
             for command in commands if "--configpath" in command]  # fmt: skip
    assert sizes[1] == 4 * sizes[0]


def test_a_run_is_of_the_records_and_not_of_where_they_lie(target, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "call", lambda command, log: Path(command[-1]).mkdir(parents=True))
    args = asked(target, tmp_path / "work")
    args.workdir.mkdir()

    def trained(folder: Path, name: str) -> Path:
        source = Source(folder, "--store", 512)
        return recipes.train(recipes.plans_of([row(name)], args, {"--store": source})[0], 0, args)

    for name in ("family/eagle1", "epochs/eagle3-2-of-0.5"):
        first = trained(store(tmp_path / name / "here", (2, 8, 13)), name)
        (tmp_path / name / "here").rename(tmp_path / name / "there")
        assert trained(tmp_path / name / "there", name) == first
        manifest = tmp_path / name / "there" / MANIFEST
        manifest.write_text(manifest.read_text().replace("0" * 16, "1" * 16))
        assert trained(tmp_path / name / "there", name) != first, "of other conversations"


def test_a_judgement_is_of_the_very_weights(tmp_path, monkeypatch):
    """And a draft of which nothing is accepted has one too."""
    judge, asked_for = judging.Judge(tmp_path, 3, None, None, 8, Path("python")), []
    said = {"loaded": True, "drafted_tokens": 90, "accepted_tokens": 30, "accepted_per_position": [0.5, 0.3, 0.1]}
    said |= {"vllm": "0.32.0", "device": "cpu", "speed_ratio": 0.9}

    def call(words: list[object], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        asked_for.append(log.name)
        if "--output" in words:
            Path(str(words[words.index("--output") + 1])).write_text(json.dumps(said))
            if not said["accepted_tokens"]:
                raise WorkError("None of 90 drafted tokens was accepted")

    monkeypatch.setattr(judging, "call", call)
    monkeypatch.setattr(judging, "vllm_of", lambda python: "0.32.0")
    run = tmp_path / "run"
    run.mkdir()
    (run / "model.safetensors").write_bytes(b"first")
    assert judge.accepted(run) == judge.accepted(run) == [0.5, 0.3, 0.1] and len(asked_for) == 2
    (run / "model.safetensors").write_bytes(b"second")
    said |= {"accepted_tokens": 0, "accepted_per_position": [0.0, 0.0, 0.0]}
    assert judge.accepted(run) == judge.accepted(run) == [0.0, 0.0, 0.0] and len(asked_for) == 4
    assert judge.served(run, 2)["speed_ratio"] == judge.served(run, 2)["speed_ratio"] == 0.9 and len(asked_for) == 6
    monkeypatch.setattr(judging, "describe", lambda device: "another machine")
    judge.served(run, 2)
    assert len(asked_for) == 8, "on another machine it takes another time"
    judge.accepted(run)
    assert len(asked_for) == 8, "and accepts the same"
    (run / "model.safetensors").write_bytes(b"third")
    assert judge.engine == "vLLM 0.32.0 on cpu"
    said["device"] = "A Card"
    with pytest.raises(RequestError, match=r"holds runs of vLLM 0.32.0 on A Card and of vLLM 0.32.0 on cpu"):
        judge.accepted(run)
    judge.reports.clear()
    (run / "model.safetensors").write_bytes(b"fourth")
    said["drafted_tokens"] = 0
    with pytest.raises(WorkError):
        judge.accepted(run)


def test_what_is_timed_needs_an_engine(tmp_path):
    with pytest.raises(RequestError, match=r"--served_k 1 is timed in vLLM.*--engine_python"):
        recipes.main(
            ["--basepath", str(tmp_path), "--store", str(tmp_path), "--workdir", str(tmp_path), "--served_k", "1", "3"]
        )


def test_rows_that_are_validated_on_other_conversations_say_no_validation():
    other = {one.name for one in ROWS if not one.is_validated_alike}
    assert other == {
        "epochs/eagle1-2-of-0.5",
        "epochs/eagle3-2-of-0.5",
        "replies/eagle1-original",
        "replies/eagle3-original",
    }
    found = {"steps": 90, "tau": [[1.3]], "validation": None, "speed": {}}
    assert recipes.line(row("replies/eagle3-original"), found) == "| replies/eagle3-original | 90 | 1.300 |  |  |  |"


def test_too_few_tokens_are_said_before_anything_is_trained(target, tmp_path):
    source = Source(store(tmp_path / "store", EVERY), "--store", 512)
    with pytest.raises(RequestError, match="data/eagle1-4 takes 1,200 supervised tokens, and the store has"):
        recipes.plans_of([row("family/eagle1"), row("data/eagle1-4")], asked(target, tmp_path, tokens=300),
                         {"--store": source})  # fmt: skip
    with pytest.raises(RequestError, match="replies/eagle3-original needs --original"):
        recipes.plans_of([row("replies/eagle3-original")], asked(target, tmp_path), {"--store": source})


def test_vocabularies(target):
    """No larger than the base model's."""
    base = load_config(target)
    assert row("family/eagle3").flags_for(base) == EAGLE3
    with pytest.raises(NotHere, match="vocabulary/eagle3-2048: the base model has 424 tokens"):
        row("vocabulary/eagle3-2048").flags_for(base)
    object.__setattr__(base, "vocab_size", 49152)
    flags = row("vocabulary/eagle3-2048").flags_for(base)
    assert flags == [*FAMILIES["eagle3"], "--draft_vocab_size", "2048"] and "8192" in flags


def test_the_table_is_markdown():
    found = {"steps": 90, "tau": [[1.3, 1.4], [1.34, 1.46]], "validation": 1.55, "speed": {1: 1.1, 2: 1.25}}
    lines = [*recipes.head(2).splitlines(), recipes.line(row("family/eagle3"), found)]
    assert lines[0] == "| row | steps | τ, K = 1 | τ, K = 2 | seeds | validation | speed |"
    assert {line.count("|") for line in lines} == {8}
    assert lines[2] == "| family/eagle3 | 90 | 1.320 | 1.430 | 0.060 | 1.550 | 1.25 times, K = 2 |"
    alone = {"steps": 90, "tau": [[1.3, 1.4]], "validation": 1.5, "speed": {}}
    assert (
        recipes.line(row("start/eagle1-random"), alone) == "| start/eagle1-random | 90 | 1.300 | 1.400 |  | 1.500 |  |"
    )


def test_the_validation_that_counts_is_the_best_one(tmp_path):
    lines = [{"step": 0, "val_tau": [1.2, 1.3]}, {"step": 5, "loss": 2.0}, {"step": 9, "val_tau": [1.4, 1.6]}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert recipes.validated(tmp_path) == 1.6


def test_which_drafts_are_timed_in_an_engine():
    timed = {one.name.partition("/")[0] for one in ROWS if one.costs_its_own}
    assert timed == {"family", "vocabulary", "layers", "sizes"}
