"""The feature source of an engine, with something in the engine's place: what it makes of what comes back."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from eagle.errors import RequestError, WorkError
from eagle.generate import vllm_source
from eagle.generate.engine_check import check_engine, check_engine_args, shaping, vllm_of
from eagle.generate.handover import Folder, Handover, _take_away
from eagle.generate.source_options import EngineOptions, SourceOptions
from eagle.generate.sources import open_source
from eagle.target.config import load_config
from eagle.target.features import HIDDEN_STATE
from tests.stub_engine import Engine
from tests.tiny import make_target

LAYERS, FEATURES = 4, (HIDDEN_STATE, "aux_1_3")
SEQUENCES = [np.array(ids, dtype=np.int32) for ids in ([5, 6, 7, 8, 9], [5, 6], [300])]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("target") / "model", layers=LAYERS)


@pytest.fixture
def options(model):
    return SourceOptions(model, torch.float32, torch.device("cpu"), FEATURES, longest=5)


@pytest.fixture(params=[1, 2], ids=["one process", "files"])
def source(request, options, model, monkeypatch):
    vllm = ModuleType("vllm")
    vllm.SamplingParams = lambda **given: SimpleNamespace(**given)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    for name in vllm_source.ENVIRONMENT | vllm_source._IN_PROCESS:
        monkeypatch.setenv(name, "0")  # put back afterwards
    started = {}
    monkeypatch.setattr(vllm_source, "_start", started.update)
    options = SourceOptions(
        options.model, options.dtype, options.device, FEATURES, longest=5, engine=EngineOptions(request.param)
    )
    source = open_source(options, "vllm")
    folder = started["kv_transfer_config"]["kv_connector_extra_config"].get("eagle_folder")
    assert (folder is not None) == (request.param > 1)
    source.engine = Engine(model, started, Handover(source.handover.folder))
    return source


def test_features_are_transformers(source, options):
    for _ in range(2):
        own, theirs = source.features(SEQUENCES), open_source(options).features(SEQUENCES)
        assert own.keys() == theirs.keys() == set(FEATURES)
        for name in FEATURES:
            for row, sequence in enumerate(SEQUENCES):
                at = (row, slice(len(sequence)))
                torch.testing.assert_close(own[name][at], theirs[name][at], rtol=1e-4, atol=1e-5)
    assert not source.handover.folder or not list(source.handover.folder.iterdir())


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda states: None, "without handing over"),
        (lambda states: states[:-1], "expected .* positions"),
        (lambda states: states[:, :-1], "expected .* layers"),
        (lambda states: states.bfloat16(), "bfloat16"),
        (lambda states: states * (torch.arange(len(states)) != 1)[:, None, None], "left hidden states of some"),
        (lambda states: 1 / 0, "ended while .* ZeroDivisionError"),
    ],
)
def test_what_is_wrong_is_no_feature(source, spoil, says):
    source.engine.spoil = spoil
    with pytest.raises(WorkError, match=says):
        source.features(SEQUENCES)


def test_folders_of_killed_processes_are_taken_away(tmp_path):
    old = tmp_path / "eagle-states-old"
    old.mkdir()
    (old / "7").write_bytes(b"states")
    held = Folder()
    for folder in (old, held.path):
        _take_away(folder)
    assert not old.exists() and held.path.is_dir()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("""{"version": null, "able": false, "stages": false, "cards": false}""", "has no vLLM.*--engine_python"),
        ("""{"version": "0.9.1", "able": false, "stages": false, "cards": false}""", "0.9.1 .* does not hand over"),
        ("""{"version": "0.32.0", "able": true, "stages": false, "cards": false}""", "Use --tensor_parallel_size 4"),
        ("""{"version": "0.32.0", "able": true, "stages": true, "cards": true}""", "sees GPUs"),
        ("hello", "is no python"),
    ],
)
def test_a_python_that_will_not_do(tmp_path, answer, says):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{answer}'\n")
    python.chmod(0o755)
    with pytest.raises(RequestError, match=says):
        vllm_of(python, EngineOptions(2, 2), "cpu")


@pytest.mark.parametrize(
    ("gpus", "torch_npu", "sees"),
    [
        (False, None, False),
        (True, None, True),
        (True, "raise RuntimeError('no CANN')", True),
        (False, "raise RuntimeError('no CANN')", False),
        (False, "import torch; torch.npu = torch.Cards(False)", False),
        (False, "import torch; torch.npu = torch.Cards(True)", True),
    ],
)
def test_an_engine_whose_cards_this_python_does_not_see_is_refused(tmp_path, gpus, torch_npu, sees):
    """It would put all engines on the first of them."""
    site = tmp_path / "site"
    handed = "vllm/distributed/kv_transfer/kv_connector/v1/example_hidden_states_connector.py"
    for name in ("vllm/__init__.py", "vllm/model_executor/models/extract_hidden_states.py", handed):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).touch()
    (site / "vllm-0.32.0.dist-info").mkdir()
    (site / "vllm-0.32.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    cards = "class Cards:\n    def __init__(self, there): self.is_available = lambda: there\n"
    (site / "torch.py").write_text(f"{cards}cuda = Cards({gpus})\n")
    if torch_npu is not None:
        (site / "torch_npu.py").write_text(torch_npu)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    if not sees:
        assert vllm_of(python, EngineOptions(), "cpu") == "0.32.0"
        return
    with pytest.raises(RequestError, match="sees GPUs or NPUs"):
        vllm_of(python, EngineOptions(), "cpu")
    assert vllm_of(python, EngineOptions(), "npu") == "0.32.0"


def test_a_python_that_is_not_there(tmp_path):
    with pytest.raises(RequestError, match="cannot be run"):
        vllm_of(tmp_path / "python", EngineOptions(), "cpu")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="this environment has one")
def test_this_environment_has_no_engine():
    with pytest.raises(RequestError, match="has no vLLM"):
        vllm_of(Path(sys.executable), EngineOptions(), "cpu")


@pytest.mark.parametrize(
    ("rope", "most"),
    [
        (None, 64),
        ({"rope_type": "linear", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}, 32),
        ({"rope_type": "dynamic", "factor": 2.0}, 64),  # whose table has a row a position, and no more
    ],
)
def test_no_record_is_longer_than_the_table_of_angles(model, rope, most):
    config = replace(load_config(model), max_position_embeddings=64, rope_scaling=rope)
    check_engine(config, {}, most, "--max_length")
    with pytest.raises(RequestError, match=f"--max_length {most + 1}: the base model has {most} positions"):
        check_engine(config, {}, most + 1, "--max_length")


def test_options_of_an_engine():
    """Those that compute something else are refused, those that may are part of the store."""
    assert shaping({"gpu_memory_utilization": 0.5, "kv_cache_dtype": "fp8"}) == {"kv_cache_dtype": "fp8"}
    for wrong in ({"load_format": "dummy"}, {"hf_config_path": "x"}, {"model_impl": "transformers"}, {"dtype": "half"}):
        with pytest.raises(RequestError, match="--engine_args: .*" + next(iter(wrong))):
            check_engine_args(wrong)


def test_the_release_is_told(tmp_path):
    python = tmp_path / "python"
    python.write_text("""#!/bin/sh\necho '{"version": "0.32.0", "able": true, "stages": false, "cards": true}'\n""")
    python.chmod(0o755)
    assert vllm_of(python, EngineOptions(8), "cuda") == "0.32.0"
