"""Nothing is installed and nobody's folder is imported in place of a library, wherever a command is started.

People keep ``datasets/`` and clones of libraries beside their work. Whoever imports one of these three notices.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.commands import ROOT, command
from tests.tiny import conversations, write_sharegpt

SCRIPTS = (
    "allocation.py",
    "reassign_data_num.py",
    "convert_eagle_ckpt_to_vllm_compatible.py",
    "tools/sharegpt_convert.py",
    "tools/get_quickstart_data.py",
    "benchmarks/decode.py",
    "benchmarks/store_dtype.py",
)
MODULES = ("eagle.train.main", "eagle.store.verify")

#: accelerate's own console script: unlike ``python -m accelerate...`` it does not look for libraries in the working
#: directory. What that one imports before our process begins is not ours to choose.
ACCELERATE = "import sys; sys.path.remove(''); from accelerate.commands.launch import main; main()"


def plant(folder: Path) -> Path:
    """Put folders there that are called like a library that is installed, one that may be, and one that is not."""
    for name in ("peft", "tqdm"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise RuntimeError('{name} of the user')\n")
    (folder / "datasets").mkdir()
    (folder / "datasets" / "notes.txt").write_text("what I trained on")
    return folder


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toolkit as somebody unpacked it, among folders of theirs."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("eagle", "tools", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "data/made_by*"))
    for script in ROOT.glob("*.py"):
        shutil.copy(script, copy)
    return plant(copy)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(params=("copy", "elsewhere"))
def cwd(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script(script, copy, cwd):
    assert "usage: " in command(copy / script, "--help", cwd=cwd).out


@pytest.mark.parametrize("module", MODULES)
def test_module(module, copy, cwd):
    assert "usage: " in command("-m", module, "--help", cwd=cwd, PYTHONPATH=str(copy)).out


def test_module_in_the_checkout(copy):
    assert "usage: " in command("-m", "eagle.train.main", "--help", cwd=copy).out


@pytest.fixture
def job(copy: Path, llama: Path, tmp_path: Path) -> list[object]:
    data = write_sharegpt(tmp_path / "data.json", conversations(12, turns=1))
    job = [copy / "allocation.py", "--outdir", tmp_path / "store", "--model_name", llama, "--data_path", data]
    return [*job, "--dtype", "float32", "--npu_indices", "0,1"]


def test_features(job, cwd):
    """Workers are processes of their own."""
    assert "12 records" in command(*job, cwd=cwd).out


def test_dry_run(job, elsewhere):
    """So is what measures the speed."""
    assert "tokens/s" in command(*job, "--dry_run", cwd=elsewhere).out


def test_training(copy, llama, store, tmp_path):
    """From the checkout only: where PYTHONPATH names it, accelerate looks for its own libraries there too."""
    command(
        "-c", ACCELERATE, "--cpu", "--num_processes", 1, "--num_machines", 1, "--dynamo_backend", "no",
        "-m", "--mixed_precision=no", "eagle.train.main", "--tmpdir", store, "--cpdir", tmp_path / "checkpoints",
        "--basepath", llama, "--bs", 4, "--max_steps", 2, "--init", "random", cwd=copy,
    )  # fmt: skip
    assert (tmp_path / "checkpoints" / "last").exists()


def test_a_program_that_imports_the_package_keeps_its_path(tmp_path):
    """Its modules lie in the working directory, also where it is run with ``-m``."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").write_text("import eagle")
    (tmp_path / "theirs" / "__main__.py").write_text("import beside\nprint(beside.WORD)")
    (tmp_path / "beside.py").write_text("WORD = 'found'")
    assert command("-m", "theirs", cwd=tmp_path, PYTHONPATH=str(ROOT)).out == "found\n"


def test_where_pip_installed_to_is_kept(tmp_path):
    """`pip install --target .` makes the working directory a place of libraries."""
    shutil.copytree(ROOT / "eagle", tmp_path / "eagle", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "eagle" / "__main__.py").write_text("import sys\nprint(*sys.path, sep='\\n')")
    paths = [sys.executable, "-m", "eagle"]
    bare = subprocess.run(paths, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    assert str(tmp_path) not in bare
    (tmp_path / "eagle-1.0.dist-info").mkdir()
    kept = subprocess.run(paths, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    assert str(tmp_path) in kept
