"""Step 3 with vLLM's engine: the features are transformers', whatever the engine cuts, shares and batches."""

from __future__ import annotations

import json
import time

import pytest
import torch

from eagle.store.manifest import MANIFEST
from eagle.store.reader import FeatureStore
from eagle.target.features import HIDDEN_STATE
from tests.e2e.commands import command, start
from tests.families import ROWS, make_row, row_named
from tests.tiny import conversations, write_sharegpt
from tests.vllm.engines import run_child
from tests.vllm.extracted import distance
from tests.vllm.test_quickstart import MODEL

#: Times the dtype's own noise, which is another in every order of adding up. Another model's, position's or layer's
#: features are more than ten times as far off.
NOISE = 3.0
#: Of the largest value, of two sources in float32.
EXACT = 1e-4
FEATURES = [HIDDEN_STATE, "aux_2_4_5"]
#: Prompts are cut into chunks, and several are computed at once.
CHUNKED = {"max_num_batched_tokens": 96, "max_num_seqs": 4}


def ask(folder, row="llama", dtype="float32", features=FEATURES, tensor_parallel_size=1, **more):
    model = folder / row
    if not model.is_dir() and "model" not in more:
        make_row(model, row_named(row))
    engine = {"tensor_parallel_size": tensor_parallel_size, "arguments": CHUNKED}
    return {"model": str(model), "dtype": dtype, "features": features, "engine": engine} | more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("extracted")


@pytest.fixture(scope="module")
def found(folder):
    return run_child(
        "tests.vllm.extracted",
        folder,
        {
            "llama": ask(folder, leaves_out=True),
            "bfloat16": ask(folder, dtype="bfloat16", features=[HIDDEN_STATE]),
            "gemma3": ask(folder, "gemma3_text"),
            # One of real size and weights, where the quickstart has fetched it.
            **({"real": ask(folder, model=str(MODEL))} if (MODEL / "config.json").is_file() else {}),
        },
    )


@pytest.mark.parametrize("name", ["llama", "gemma3", "real"])
def test_as_transformers_in_float32(found, name):
    if name not in found:
        pytest.skip(f"the quickstart has not run: no {MODEL}/config.json")
    assert isinstance(found[name], dict), found[name]
    assert all(found[name][feature] < NOISE for feature in FEATURES), found[name]


def test_within_the_noise_of_bfloat16(found):
    assert isinstance(found["bfloat16"], dict), found["bfloat16"]
    assert found["bfloat16"][HIDDEN_STATE] < NOISE, found["bfloat16"]


def test_a_position_that_is_left_out_is_noticed(found):
    assert found["llama"]["left out"] == 1


@pytest.mark.long
def test_every_kind_of_target(folder):
    rows = [row.name for row in ROWS if row.is_known_here()]
    found = run_child("tests.vllm.extracted", folder, {row: ask(folder, row) for row in rows})
    wrong = {row: far for row, far in found.items() if isinstance(far, str) or max(far.values()) >= NOISE}
    print(json.dumps(found, indent=1))
    assert not wrong, "\n".join(f"{row}: {far}" for row, far in wrong.items())


@pytest.mark.long
def test_over_several_cards(folder):
    found = run_child("tests.vllm.extracted", folder, {"two": ask(folder, tensor_parallel_size=2)})["two"]
    assert isinstance(found, dict), found
    assert max(found.values()) < NOISE


@pytest.fixture(scope="module")
def words(folder):
    if not (folder / "llama").is_dir():
        make_row(folder / "llama", row_named("llama"))
    data = write_sharegpt(folder / "data.json", conversations(24, seed=3))
    return [
        *("allocation.py", "--model_name", folder / "llama", "--data_path", data, "--device", "cpu"),
        *("--dtype", "float32", "--draft", "eagle3", "--shard_mb", 1, "--batch_tokens", 1500),
    ]


def test_a_store_whose_worker_was_killed(folder, words):
    """The engine's store is the one of transformers, also where it took two runs."""
    command(*words, "--outdir", folder / "theirs")
    own = folder / "own"
    engine = ["--outdir", own, "--feature_source", "vllm"]
    killed = start(*words, *engine)
    deadline = time.monotonic() + 240
    while not list(own.glob("0/shard-*.safetensors")):
        assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    finished = len(list(own.glob("0/shard-*.safetensors")))
    assert not json.loads((own / MANIFEST).read_text())["complete"]
    command(*words, *engine)
    assert json.loads((own / MANIFEST).read_text())["engine"]["vllm"]
    assert 0 < finished < len(list(own.glob("0/shard-*.safetensors")))
    mine, theirs = FeatureStore(own), FeatureStore(folder / "theirs")
    assert len(mine) == len(theirs) > 0
    for index in range(len(theirs)):
        one, other = mine[index], theirs[index]
        assert one.conversation == other.conversation
        assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.loss_mask, other.loss_mask)
        assert one.more.keys() == other.more.keys() and one.more
        for name in one.more:
            assert distance(one.more[name], other.more[name]) < EXACT
        assert distance(one.hidden_state, other.hidden_state) < EXACT
    answer = command(*words, "--outdir", own, code=2)
    assert "feature_source was 'vllm', now None" in answer.error


def test_an_engine_that_does_not_start_says_why(folder, words):
    arguments = json.dumps({"load_format": "no such format"})
    outdir = folder / "none"
    answer = command(*words, "--outdir", outdir, "--feature_source", "vllm", "--engine_args", arguments, code=1)
    assert "vLLM did not start" in answer.error and "no such format" in answer.error
    assert not outdir.exists()
