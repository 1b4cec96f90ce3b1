"""Several data paths with and without weights: the shares that come out, the order, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from eagle.data.mixture import choose, counts_of, most_of, open_data, read_weights
from eagle.errors import RequestError, WorkError
from eagle.generate import main as allocation
from eagle.generate.dealing import node_share
from eagle.generate.job import claim_outdir, encode_job, finish, mixture, resolve
from eagle.generate.main import mixed
from eagle.generate.request import GenerationRequest
from eagle.store import reshard
from eagle.train.live_features import LiveFeatures, LiveSource
from eagle.train.options import TrainOptions, idle_flags
from tests.e2e.commands import ask
from tests.tiny import conversations, cpu_worker, make_target, write_sharegpt
from tests.unit.test_job import finish_a_shard

SHARES = [[0.7, 0.3], [0.5, 0.5], [0.6, 0.3, 0.1], [1 / 3] * 3, [0.999, 0.001]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model, and 40 long conversations, 30 short ones, 5 more."""
    folder = tmp_path_factory.mktemp("inputs")
    files = [("long.json", 40, 4), ("short.json", 30, 1), ("few.json", 5, 1)]
    paths = [write_sharegpt(folder / name, conversations(n, turns, n)) for name, n, turns in files]
    return make_target(folder / "model"), *paths


def request(inputs, outdir: Path, *words: object, **changes) -> GenerationRequest:
    options = {"outdir": outdir, "model_name": str(inputs[0]), "data_path": tuple(map(str, words)), "device": "cpu"}
    return GenerationRequest(**options | changes)


@pytest.mark.parametrize("shares", SHARES)
def test_counts_are_the_shares_to_the_conversation(shares):
    before = [0] * len(shares)
    for count in [*range(1, 200), 1000, 12345]:
        counts = counts_of(shares, count)
        assert sum(counts) == count
        assert all(abs(own - share * count) < 1 for own, share in zip(counts, shares, strict=True))
        assert all(own >= old for own, old in zip(counts, before, strict=True))  # a larger count keeps what it has
        before = counts
    assert counts_of([0.7, 0.3], 1000) == [700, 300] and counts_of([0.29, 0.71], 100) == [29, 71]


def test_the_largest_mixture():
    assert most_of([0.7, 0.3], [700, 5000]) == 1000
    for shares, sizes in (([0.7, 0.3], [7, 50]), ([0.5, 0.5], [3, 3]), ([0.6, 0.3, 0.1], [100, 9, 40])):
        most = most_of(shares, sizes)
        assert all(own <= size for own, size in zip(counts_of(shares, most), sizes, strict=True))
        assert any(own > size for own, size in zip(counts_of(shares, most + 1), sizes, strict=True))
    assert counts_of([52 / 59, 7 / 59], 59) == [52, 7]  # by size: all of each


@pytest.mark.parametrize("seed", [0, 42])
def test_whatever_comes_first_has_the_shares(seed):
    sizes, shares = [700, 900, 500], [0.6, 0.3, 0.1]
    order = choose(seed, sizes, 1000, shares)
    assert len(set(order.tolist())) == 1000
    source = np.searchsorted([700, 1600], order, side="right")
    for number, share in enumerate(shares):
        taken = np.cumsum(source == number)
        assert np.abs(taken - share * np.arange(1, 1001)).max() < 1.5
        # Dealt out in turn, nobody gets one source alone.
        for workers in (2, 3, 8):
            parts = [(source[worker::workers] == number).mean() for worker in range(workers)]
            assert max(parts) - min(parts) < 0.25
    smaller = choose(seed, sizes, 400, shares)
    assert set(smaller.tolist()) < set(order.tolist())
    # Of each source those that it alone would give.
    alone = np.random.RandomState(seed).permutation(900)[:300]
    assert set(order[source == 1] - 700) == set(alone)


def test_one_source_is_the_permutation_of_ever():
    assert choose(42, [20], 13).tolist() == np.random.RandomState(42).permutation(20)[:13].tolist()
    assert choose(42, [20], 13)[:5].tolist() == [0, 17, 15, 1, 8]


def test_words(tmp_path):
    for name in ("a.json", "b.json", "odd:0.5"):
        (tmp_path / name).write_text("[1]")

    def read(*words: str) -> list:
        return [(one.path.name, one.weight) for one in read_weights(tuple(f"{tmp_path}/{word}" for word in words))]

    assert read("a.json") == [("a.json", None)]
    assert read("a.json", "b.json") == [("a.json", None), ("b.json", None)]
    assert [weight for _, weight in read("a.json:7", "b.json:3.0")] == [7, 3]
    assert read("odd:0.5") == [("odd:0.5", None)]  # it is there as it is typed
    assert read("odd:0.5:.25", "a.json:1")[0][0] == "odd:0.5"
    for words, says in (
        (["a.json:0.7"], "this is the only one"),
        (["a.json:0.7", "b.json"], "b.json has no weight"),
        (["a.json", "b.json", "a.json"], "more than once"),
        (["a.json:1", "b.json:0"], "'0' is no number above 0"),
        (["a.json:1", "b.json:x"], "'x' is no number above 0"),
        (["a.json:1", "b.json:-1"], "'-1' is no number above 0"),
        (["a.json:1", "b.json:nan"], "'nan' is no number above 0"),
        (["a.json:1", "b.json:"], "'' is no number above 0"),
    ):
        with pytest.raises(RequestError, match=says):
            read(*words)


def test_weights_are_relative(inputs):
    _, long, short, _ = inputs
    for words in ((f"{long}:0.75", f"{short}:0.25"), (f"{long}:3", f"{short}:1"), (f"{long}:30", f"{short}:10.0")):
        data = open_data(words, None)
        assert data.shares == [0.75, 0.25] and data.conversations == 53
    assert open_data((f"{long}:1", f"{short}:1"), 20).conversations == 20


def test_shares_that_cannot_be_had(inputs, tmp_path):
    _, long, short, few = inputs
    for words, end_num, says in (
        ((f"{long}:0.7", f"{few}:0.3"), 50, r"15 conversations of .*few.json, which holds 5. .* at most 18 fit"),
        ((f"{long}:0.99", f"{few}:0.01"), 10, "a share of 1.0% of 10 conversations is none. .*--end_num"),
        ((long, f"{tmp_path}/nowhere.json"), None, "nowhere.json: no such file"),
    ):
        with pytest.raises((RequestError, FileNotFoundError), match=says):
            open_data(tuple(map(str, words)), end_num)
    assert open_data((f"{long}:0.7", f"{few}:0.3"), 18).conversations == 18
    copy = write_sharegpt(tmp_path / "copy.json", json.loads(long.read_text()))
    with pytest.raises(RequestError, match="hold the same"):
        open_data((str(long), str(short), str(copy)), None)


def test_without_weights_all_of_each_are_used(inputs, tmp_path):
    _, long, short, few = inputs
    job = resolve(request(inputs, tmp_path, long, short, few))
    assert job.conversations == 75 and sorted(node_share(job.manifest)) == list(range(75))
    cut = resolve(request(inputs, tmp_path, long, short, few, end_num=15)).manifest
    assert [source["conversations"] for source in cut["data"]["sources"]] == [8, 6, 1]
    more = resolve(request(inputs, tmp_path, long, short, few, end_num=99))
    assert any("the files hold 75 conversations; all are used" in note for note in more.notes)


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_job_and_its_manifest(inputs, tmp_path, nodes):
    _, long, short, _ = inputs
    words = [f"{long}:0.5", f"{short}:0.5"]
    jobs = [resolve(request(inputs, tmp_path, *words, end_num=40, num_nodes=nodes, node_rank=n)) for n in range(nodes)]
    indices = sorted(index for job in jobs for index in node_share(job.manifest))
    assert len(set(indices)) == 40 and sum(index < 40 for index in indices) == 20
    manifest = jobs[0].manifest
    assert manifest["data"]["records"] == 70 and manifest["options"]["shares"] == [0.5, 0.5]
    assert [(Path(s["path"]).name, s["records"], s["share"]) for s in manifest["data"]["sources"]] == [
        ("long.json", 40, 0.5), ("short.json", 30, 0.5),
    ]  # fmt: skip
    found = [mixture(encode_job(job, save=False), job.manifest) for job in jobs]
    assert sum(one.usable for own in found for one in own) == 40
    long_tokens, short_tokens = (sum(own[number].tokens for own in found) for number in range(2))
    assert long_tokens > 2 * short_tokens > 0
    if nodes == 1:
        lines = mixed(jobs[0], encode_job(jobs[0], save=False))
        assert "20 conversations, 50.0% of all (asked: 50.0%)" in lines[0] and "tokens, " in lines[1]


def test_one_path_is_no_mixture(inputs, tmp_path):
    """Its manifest and its choice are those of a path that is given alone."""
    job = resolve(request(inputs, tmp_path, inputs[1], end_num=9))
    plain = resolve(GenerationRequest(tmp_path, str(inputs[0]), inputs[1], end_num=9, device="cpu"))
    for manifest in (job.manifest, plain.manifest):
        assert list(manifest["data"]) == ["path", "digest", "records", "damage"] and "shares" not in manifest["options"]
        assert node_share(manifest) == np.random.RandomState(42).permutation(40)[:9].tolist()
    assert job.manifest["data"] == plain.manifest["data"] and mixture(encode_job(job, save=False), job.manifest) == []


def test_a_job_goes_on_with_the_same_sources_and_weights_only(inputs, tmp_path):
    _, long, short, few = inputs
    outdir = tmp_path / "store"
    words = [f"{long}:0.5", f"{short}:0.5"]
    claim_outdir(resolve(request(inputs, outdir, *words)))
    finish_a_shard(outdir)
    for same in (words, [f"{long}:1", f"{short}:1"]):
        claim_outdir(resolve(request(inputs, outdir, *same)))
    for other, says in (
        ([f"{long}:0.6", f"{short}:0.4"], r"shares was \[0.5, 0.5\], now \[0.6, 0.4\]"),
        (words[::-1], "data digest was"),
        ([long], "data digest was"),
        ([long, short], r"shares was \[0.5, 0.5\], now \[0.57"),
        ([f"{long}:0.5", f"{few}:0.5"], "data digest was"),
    ):
        with pytest.raises(RequestError, match=says):
            claim_outdir(resolve(request(inputs, outdir, *other)))


def test_a_source_of_another_format_is_refused_beside_good_ones(inputs, tmp_path):
    alpaca = tmp_path / "alpaca.json"
    alpaca.write_text(json.dumps([{"instruction": "a", "output": "b"}] * 20))
    with pytest.raises(RequestError, match=r"alpaca.json is of another format \(alpaca\)"):
        resolve(request(inputs, tmp_path / "store", f"{inputs[1]}:0.5", f"{alpaca}:0.5"))


def test_a_source_of_which_nothing_can_be_used(inputs, tmp_path):
    bad = write_sharegpt(tmp_path / "bad.json", [{"conversations": []}] * 20)
    job = resolve(request(inputs, tmp_path / "store", inputs[1], bad))
    with pytest.raises(WorkError, match=r"bad\.json: none of its 20 conversations can be used"):
        mixed(job, encode_job(job, save=False))


def test_a_node_that_can_use_nothing_of_a_small_source(inputs, tmp_path):
    """What another node can use is no reason to refuse; what none can is, on every node."""
    alpaca, none = {"instruction": "a", "output": "b"}, {"conversations": []}
    for name, bad in (("bad", none), ("alpaca", alpaca)):
        good = json.loads(inputs[3].read_text())
        mixed_up = write_sharegpt(tmp_path / f"{name}.json", [good[0], bad, good[1], bad])
        lines = []
        for rank in range(4):
            more = {"num_nodes": 4, "node_rank": rank}
            job = resolve(request(inputs, tmp_path / "store", inputs[1], mixed_up, **more))
            lines.append(mixed(job, encode_job(job, save=False))[1])
        assert sorted(line.split(": ", 1)[1].split(" conv")[0] for line in lines) == ["0", "0", "1", "1"]
        assert sum("0 conversations (1 more are left out)" in line for line in lines) == 2
        assert all(line.endswith("; other nodes can use some") == (": 0 conv" in line) for line in lines)
    useless = write_sharegpt(tmp_path / "useless.json", [none] * 4)
    for rank in range(2):
        job = resolve(request(inputs, tmp_path / "store", inputs[1], useless, num_nodes=2, node_rank=rank))
        with pytest.raises(WorkError, match=r"useless\.json: none of its 2 conversations can be used"):
            mixed(job, encode_job(job, save=False))


def test_what_is_left_out_or_there_twice_is_said(inputs, tmp_path):
    records = json.loads(inputs[2].read_text())
    other = write_sharegpt(tmp_path / "other.json", [*records[:3], {"conversations": []}, *conversations(4, seed=99)])
    job = resolve(request(inputs, tmp_path / "store", inputs[2], other))
    tokens = encode_job(job, save=False)
    lines = mixed(job, tokens)
    assert "7 conversations (1 more are left out)" in lines[1] and "3 are in a path before it too" in lines[1]
    assert "left out" not in lines[0] and "before it" not in lines[0]
    assert tokens.first["empty_conversation"] == (33, f"record 3 of {other}")


def test_damage_in_one_of_them(inputs, tmp_path):
    (tmp_path / "cut.json").write_text(inputs[2].read_text()[:-300])
    words = (inputs[1], tmp_path / "cut.json")
    with pytest.raises(RequestError, match=r"cut.json is damaged: .*--allow_truncated"):
        resolve(request(inputs, tmp_path / "store", *words))
    job = resolve(request(inputs, tmp_path / "store", *words, allow_truncated=True))
    (damage,) = job.manifest["data"]["damage"]
    assert (
        damage["file"].endswith("cut.json") and damage["record"] == job.manifest["data"]["sources"][1]["records"] < 30
    )
    assert any(f"cut.json: record {damage['record']}, from byte" in note for note in job.notes)


def test_the_store_says_what_it_is_mixed_of(inputs, tmp_path, capsys):
    """The manifest, the dry run of what is done, and a reshard of it."""
    model, long, short, _ = inputs
    outdir, words = tmp_path / "store", [f"{long}:0.5", f"{short}:0.5"]
    job = resolve(request(inputs, outdir, *words, end_num=8, dtype="float32"))
    claim_outdir(job)
    encode_job(job)
    list(cpu_worker(outdir, 0).work(1 << 20))
    manifest = finish(job)
    found = manifest["mixture"]
    assert [(Path(one["path"]), one["share"], one["usable"]) for one in found] == [(long, 0.5, 4), (short, 0.5, 4)]
    assert sum(one["tokens"] for one in found) == manifest["tokens"]
    assert finish(job) == manifest  # what is done is left as it is
    again = ["--data_path", words[0], "--data_path", words[1], "--end_num", 8, "--dtype", "float32"]
    answer = ask(
        allocation.main, capsys, "--model_name", model, "--outdir", outdir, "--device", "cpu", *again, "--dry_run"
    )
    assert answer.code == 0, answer
    assert answer.out.count("4 conversations, 50.0% of all (asked: 50.0%)") == 2 and "nothing is left" in answer.out
    assert ask(reshard.main, capsys, "--old_folder", outdir, "--new_folder", tmp_path / "new", "--tp", 2).code == 0
    assert json.loads((tmp_path / "new" / "manifest.json").read_text())["mixture"] == found


def test_nodes_have_the_mixture_together(inputs, tmp_path, capsys):
    _, long, short, _ = inputs
    for rank in range(2):
        more = {"end_num": 8, "num_nodes": 2, "node_rank": rank, "dtype": "float32"}
        job = resolve(request(inputs, tmp_path / "store", f"{long}:0.5", f"{short}:0.5", **more))
        claim_outdir(job)
        encode_job(job)
        list(cpu_worker(job.request.folder, 0).work(1 << 20))
        assert sum(one["usable"] for one in finish(job)["mixture"]) == 4
    words = ["--old_folder", tmp_path / "store", "--new_folder", tmp_path / "new", "--tp", 2]
    assert ask(reshard.main, capsys, *words).code == 0
    manifest = json.loads((tmp_path / "new" / "manifest.json").read_text())
    assert [(one["share"], one["usable"]) for one in manifest["mixture"]] == [(0.5, 4), (0.5, 4)]
    assert sum(one["tokens"] for one in manifest["mixture"]) == manifest["tokens"]


def test_training_without_a_store_trains_on_the_same(inputs, tmp_path):
    model, long, short, _ = inputs
    words = (f"{long}:0.5", f"{short}:0.5")
    job = resolve(request(inputs, tmp_path / "store", *words, end_num=8, seed=7))
    source = LiveSource(words, 8, 7, 2048, None, False, "float32")
    live = LiveFeatures(source, model, torch.device("cpu"), {"hidden_state": 32})
    assert live.conversations.tolist() == sorted(node_share(job.manifest)) and len(live) == 8
    assert live.data_digest == job.manifest["data"]["digest"]
    assert sum("4 conversations, 50.0% of all (asked: 50.0%)" in note for note in live.notes()) == 2


def test_training_takes_the_same_words(inputs, tmp_path):
    _, long, short, _ = inputs
    weighted, plain = (f"{long}:1", f"{short}:1"), (str(long), str(short))
    options = [TrainOptions(tmp_path / "c", tmp_path / "b", data_path=words) for words in (weighted, plain)]
    assert ["data_seed" in idle_flags(one) for one in options] == [False, True]  # weights choose, too
    assert json.dumps(options[0].to_json()["data_path"]) == json.dumps(weighted)
    with pytest.raises(RequestError, match="has no weight"):
        TrainOptions(tmp_path / "c", tmp_path / "b", data_path=(f"{long}:1", str(short)))
