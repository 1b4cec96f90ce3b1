"""The simulated device for every test here, or a skip that says why there is none (with NEED_SIMULATED_NPU a failure);
targets, data, stores and runs."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from eagle.drafts.families import DRAFT_FAMILIES
from tests.npu.commands import GUIDE, TARGETS, of_family, on_npu, to_train
from tests.npu.simulated import NotHere, library
from tests.tiny import conversations, make_target, write_sharegpt

RECORDS = 24
#: So many that accelerate gives two cards a part each.
LAYERS = 4

Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of every family on every target: a family on one of them, by turns; on the others they are long ones."""
    families = list(DRAFT_FAMILIES)
    for item in items:
        chosen = getattr(getattr(item, "callspec", None), "params", {})
        if "npu" in item.path.parts and {"family", "target"} <= chosen.keys():
            turn = families.index(chosen["family"]) % len(TARGETS)
            if chosen["target"] != TARGETS[turn]:
                item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session", autouse=True)
def device() -> Path:
    """Its library, built by the first of the processes that run the tests."""
    try:
        return library()
    except NotHere as why:
        if os.environ.get("NEED_SIMULATED_NPU"):
            pytest.fail(f"NEED_SIMULATED_NPU is set, but {why}")
        pytest.skip(str(why))


@pytest.fixture(scope="session")
def once(device: Path, tmp_path_factory: pytest.TempPathFactory) -> Once:
    """`once(name, make)`: the folder that `make(folder)` fills in the first of the test processes to ask for it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "npu"
    shared.mkdir(exist_ok=True)

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder = shared / name
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                making = shared / f"{name}.made"
                shutil.rmtree(making, ignore_errors=True)  # where another process failed to
                making.mkdir()
                make(making)
                making.rename(folder)
        return folder

    return get


@pytest.fixture(scope="session")
def llama(once: Once) -> Path:
    """One safetensors file, tied embeddings, grouped queries."""
    return once("llama", lambda folder: make_target(folder, tied=True, layers=LAYERS))


@pytest.fixture(scope="session")
def qwen(once: Once) -> Path:
    """Sharded safetensors, untied, grouped queries, biases on q, k and v."""
    return once("qwen", lambda folder: make_target(folder, "qwen2", max_shard_size="50KB", seed=2, layers=LAYERS))


@pytest.fixture(scope="session")
def data(once: Once) -> Path:
    name = "sharegpt.json"
    return once("data", lambda folder: write_sharegpt(folder / name, conversations(RECORDS, turns=1))) / name


@pytest.fixture(scope="session")
def stores(once: Once, data: Path, request: pytest.FixtureRequest) -> Callable[[str, str], Path]:
    """`stores(target, family)`: the features that a family's drafts of "llama" or "qwen" learn from, float32."""

    def get(target: str, family: str) -> Path:
        model = request.getfixturevalue(target)

        def make(folder: Path) -> None:
            words = ["--model_name", model, "--data_path", data, "--dtype", "float32", "--device", "npu"]
            on_npu("allocation.py", "--outdir", folder / "store", *words, *of_family(family))

        return once(f"store-{target}-{family}", make) / "store"

    return get


@pytest.fixture(scope="session")
def store(stores: Callable[[str, str], Path]) -> Path:
    """Llama's features for the documented commands' draft, float32, one worker of one card."""
    return stores("llama", "eagle1")


@pytest.fixture(scope="session", params=DRAFT_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every draft family there is, one after the other."""
    return request.param


@pytest.fixture(scope="session")
def runs(once: Once, stores: Callable[[str, str], Path], request: pytest.FixtureRequest) -> Callable[[str, str], Path]:
    """`runs(target, family)`: a short training of a family's draft of "llama" or "qwen", as the guide starts it on a
    machine with one card."""

    def get(target: str, family: str) -> Path:
        model, features = request.getfixturevalue(target), stores(target, family)

        def make(folder: Path) -> None:
            words = ["--tmpdir", features, "--cpdir", folder / "run", "--basepath", model, "--bs", 4]
            more = ["--num_epochs", 2, "--lr", 1e-3, *to_train(family)]
            on_npu(*GUIDE, *words, *more, cards=1, log=folder / "log")

        return once(f"run-{target}-{family}", make) / "run"

    return get
