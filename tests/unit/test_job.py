"""A data-generation request, resolved: cards, shares, and what a rerun is compared with."""

import json
from pathlib import Path

import pytest
import torch

from eagle.data.tokens import key_of
from eagle.errors import RequestError
from eagle.files import ROOT
from eagle.generate import job
from eagle.generate.dealing import node_share
from eagle.generate.job import claim_outdir, resolve
from eagle.generate.request import GenerationRequest, parse_engine_args, parse_indices
from eagle.store.manifest import DONE, MANIFEST
from eagle.store.record import Record
from eagle.store.shard import shard_name, write_shard
from eagle.target.config import load_config
from tests.tiny import conversations, make_target, write_sharegpt

BUILT_IN = ROOT / "eagle" / "data" / "templates"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return make_target(folder / "model"), write_sharegpt(folder / "data.json", conversations(20))


def request(inputs, outdir: Path, **changes) -> GenerationRequest:
    model, data = inputs
    return GenerationRequest(
        **{"outdir": outdir, "model_name": str(model), "data_path": data, "device": "cpu"} | changes
    )


@pytest.mark.parametrize(
    ("text", "indices"),
    [("0", (0,)), ("0,1, 2", (0, 1, 2)), ("7,3", (7, 3)), ("GPU-5d5b, 1", ("GPU-5d5b", 1))],
)
def test_indices(text, indices):
    assert parse_indices(text) == indices


@pytest.mark.parametrize(
    ("text", "says"), [("0,x", "'x'"), ("", "''"), ("0,-1", "'-1'"), ("0,1,0", "repeats 0"), ("٣", "'٣'")]
)
def test_wrong_indices(text, says):
    with pytest.raises(RequestError, match=says):
        parse_indices(text)


@pytest.mark.parametrize(
    ("cards", "each", "groups"),
    [
        (range(8), 8, [tuple(range(8))]),
        (range(8), 1, [(i,) for i in range(8)]),
        (range(8), 4, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ((5, 2), 1, [(5,), (2,)]),
    ],
)
def test_card_groups(tmp_path, inputs, cards, each, groups):
    assert request(inputs, tmp_path, npu_indices=tuple(cards), used_npus=each).card_groups() == groups


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"npu_indices": (0, 1, 2), "used_npus": 2}, "does not divide"),
        ({"used_npus": 0}, "does not divide"),
        ({"end_num": 0}, "--end_num 0"),
        ({"max_length": 2}, "--max_length 2"),
        ({"dtype": "int3"}, "--dtype int3"),
        ({"model_type": "gpt2"}, "--model_type gpt2"),
        ({"batch_tokens": 0}, "--batch_tokens 0"),
        ({"seed": -1}, "--seed -1: expected 0 to 4,294,967,295"),
        ({"seed": 2**32}, "--seed 4294967296: expected"),
        ({"npu_indices": (0, 1), "used_npus": 2, "compile": "on"}, "--compile on would do nothing with --used_npus 2"),
        ({"npu_indices": ("MIG-a", "MIG-b"), "used_npus": 2}, "one MIG instance only"),
        ({"feature_source": "trunk"}, "expected one of transformers, vllm"),
        ({"tensor_parallel_size": 2}, "--tensor_parallel_size is about an engine"),
        ({"engine_args": {"seed": 1}}, "--engine_args is about an engine"),
        ({"feature_source": "vllm", "tensor_parallel_size": 2}, "take 2 cards, .* Use --used_npus 2"),
        ({"feature_source": "vllm", "pipeline_parallel_size": 0}, "--pipeline_parallel_size 0"),
        ({"feature_source": "vllm", "pipeline_parallel_size": 2}, "take 2 cards"),
        ({"feature_source": "vllm", "compile": "on"}, "the engine decides"),
        ({"feature_source": "vllm", "engine_args": {"dtype": "half"}}, "dtype is decided by the job. Use --dtype"),
        ({"feature_source": "vllm", "engine_args": {"enable_prefix_caching": True}}, "Leave it out"),
    ],
)
def test_wrong_options(tmp_path, inputs, changes, says):
    with pytest.raises(RequestError, match=says):
        request(inputs, tmp_path, **changes)


@pytest.mark.parametrize("source", ["transformers", "vllm"])
def test_no_record_is_longer_than_a_dynamic_rope_is_steady(tmp_path, inputs, monkeypatch, source):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model, data = make_target(tmp_path / "model", rope_parameters=rope), inputs[1]
    monkeypatch.setattr(job, "vllm_of", lambda *_: "0.32.0")
    most = load_config(model).max_position_embeddings
    wanted = {"feature_source": source, "max_length": most}
    assert resolve(request((model, data), tmp_path / "store", **wanted)).manifest["options"]["max_length"] == most
    with pytest.raises(RequestError, match=f"--max_length {most + 1}: .* 'dynamic'.*Use --max_length {most}\\.$"):
        resolve(request((model, data), tmp_path / "store", **wanted | {"max_length": most + 1}))


@pytest.mark.parametrize("text", ["[1]", "{", "enforce_eager=0", ""])
def test_wrong_engine_args(text):
    with pytest.raises(RequestError, match="is no JSON object"):
        parse_engine_args(text)


def test_an_engine_takes_the_cards_of_its_worker(tmp_path, inputs):
    both = request(inputs, tmp_path, feature_source="vllm", npu_indices=tuple(range(8)), used_npus=4)
    assert both.engine.tensor_parallel_size == 4 and len(both.card_groups()) == 2


@pytest.mark.parametrize("nodes", [1, 2, 3, 8])
def test_shares_cover_the_same_conversations_whatever_the_nodes(tmp_path, inputs, nodes):
    def share(**changes):
        return node_share(resolve(request(inputs, tmp_path, end_num=13, **changes)).manifest)

    shares = [share(num_nodes=nodes, node_rank=rank) for rank in range(nodes)]
    everything = sorted(index for share in shares for index in share)
    assert len(everything) == 13 == len(set(everything))
    assert everything == sorted(share())
    assert everything != sorted(share(seed=1))


def test_end_num_grows_by_adding(tmp_path, inputs):
    """A larger --end_num keeps the conversations of a smaller one."""
    few, more = (node_share(resolve(request(inputs, tmp_path, end_num=n)).manifest) for n in (5, 12))
    assert more[:5] == few


def test_end_num_beyond_the_file_uses_all(tmp_path, inputs):
    job = resolve(request(inputs, tmp_path, end_num=99))
    assert job.conversations == 20
    assert any("all are used" in note for note in job.notes)


def finish_a_shard(outdir: Path) -> None:
    (outdir / "0").mkdir()
    nothing = torch.zeros(1, 32)
    ids = torch.zeros(1, dtype=torch.int32)
    write_shard(outdir / "0" / shard_name(0), [Record(0, ids, ids.to(torch.uint8), nothing)])


def test_same_job_continues_and_another_is_refused(tmp_path, inputs):
    outdir = tmp_path / "store"
    claim_outdir(resolve(request(inputs, outdir)))
    finish_a_shard(outdir)
    before = (outdir / MANIFEST).read_bytes()
    for changes in ({}, {"npu_indices": (0, 1)}, {"batch_tokens": 7, "shard_mb": 1, "compile": "off"}):
        claim_outdir(resolve(request(inputs, outdir, **changes)))
        assert (outdir / MANIFEST).read_bytes() == before
    for changes, says in (
        ({"seed": 7}, "seed was 42, now 7"),
        ({"max_length": 100}, "max_length was 2048, now 100"),
        ({"dtype": "float32"}, "dtype was bfloat16, now float32"),
        ({"chat_template": "vicuna"}, "tokenizer digest was"),
    ):
        with pytest.raises(RequestError, match=says):
            claim_outdir(resolve(request(inputs, outdir, **changes)))
    assert (outdir / MANIFEST).read_bytes() == before


def test_a_template_file_may_be_called_otherwise(tmp_path, inputs, monkeypatch):
    """Its text is what decides, for whoever goes on: the parent and the workers find the same tokens."""
    (tmp_path / "t.jinja").write_text((BUILT_IN / "chatml.jinja").read_text())
    monkeypatch.chdir(tmp_path)
    outdir = tmp_path / "store"
    first = resolve(request(inputs, outdir, chat_template="t.jinja"))
    claim_outdir(first)
    finish_a_shard(outdir)
    before = (outdir / MANIFEST).read_bytes()
    again = resolve(request(inputs, outdir, chat_template=str(tmp_path / "t.jinja")))
    claim_outdir(again)
    assert (outdir / MANIFEST).read_bytes() == before and key_of(again.manifest) == key_of(first.manifest)
    (tmp_path / "t.jinja").write_text((BUILT_IN / "vicuna.jinja").read_text())
    with pytest.raises(RequestError, match="tokenizer digest was"):
        claim_outdir(resolve(request(inputs, outdir, chat_template="t.jinja")))


@pytest.mark.parametrize("named", [".", "train", "part-0.jsonl"])
def test_a_store_among_the_data_is_refused(tmp_path, inputs, named):
    """It would be taken for the data's, by the next command or node."""
    model, data = inputs
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [json.dumps(record) for record in json.loads(data.read_text())]
    for name in ("part-0.jsonl", "train-00000-of-00001.jsonl") if named != "." else ("part-0.jsonl",):
        (folder / name).write_text("\n".join(lines))
    asked = request((model, folder / named), folder / "store")
    if named == "part-0.jsonl":  # beside the one file that is named
        assert resolve(asked).conversations == 20
        return
    with pytest.raises(RequestError, match=r"--outdir .* lies in --data_path .*Name another"):
        resolve(asked)
    assert not (folder / "store").exists()


def test_a_job_that_finished_no_shard_does_not_bind_another(tmp_path, inputs, capsys):
    """What a kill -9 before the first shard leaves: its claim, and a worker's word that it had nothing to do."""
    outdir = tmp_path / "store"
    claim_outdir(resolve(request(inputs, outdir, npu_indices=(0, 1))))
    (outdir / "1").mkdir()
    (outdir / "1" / DONE).write_text(
        '{"records": 0, "tokens": 0, "supervised_tokens": 0, "dropped": {}, "repaired": {}}'
    )
    claim_outdir(resolve(request(inputs, outdir, npu_indices=(0, 1), max_length=100)))
    assert "finished no shard; this one takes its place" in capsys.readouterr().out
    assert json.loads((outdir / MANIFEST).read_text())["options"]["max_length"] == 100
    assert not (outdir / "1" / DONE).exists()


def test_foreign_folder_is_left_alone(tmp_path, inputs):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RequestError, match="is not empty"):
        claim_outdir(resolve(request(inputs, tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_manifest_says_what_made_it(tmp_path, inputs):
    outdir = tmp_path / "store"
    claim_outdir(resolve(request(inputs, outdir, max_length=77)))
    manifest = json.loads((outdir / MANIFEST).read_text())
    assert manifest["options"]["max_length"] == 77
    assert manifest["target"]["hidden_size"] == 32
    assert manifest["data"]["records"] == 20
    assert manifest["complete"] is False
