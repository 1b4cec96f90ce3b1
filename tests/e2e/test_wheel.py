"""What pip installs: the package, its files and its commands, without the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import eagle
from tests.e2e.commands import ENVIRONMENT, ROOT, Answer, command

pytest.importorskip("setuptools", minversion="70.1")

COMMANDS = {
    "eagle-sharegpt-convert", "eagle-allocation", "eagle-reassign", "eagle-train", "eagle-convert", "eagle-evaluate",
    "eagle-verify", "eagle-verify-store", "eagle-view", "eagle-device", "eagle-regenerate",
    "eagle-step-costs",
}  # fmt: skip

#: Every command's help, through the metadata that pip makes the commands from; one process, or torch loads nine times.
HELP = """
import sys
from importlib.metadata import distribution

found = distribution("eagle-draft-heads")
for entry in found.entry_points:
    assert entry.group == "console_scripts"
    sys.argv = [entry.name, "--help"]
    try:
        entry.load()()
    except SystemExit as end:
        print("command", entry.name, end.code)
print("version", found.version)
"""

DATA = """
import json
import eagle
from eagle.data.chat_template import BUILT_IN_TEMPLATES, TEMPLATE_FOLDER
from eagle.data.prompts import load_prompts

templates = [name for name in BUILT_IN_TEMPLATES if (TEMPLATE_FOLDER / f"{name}.jinja").read_text()]
print(json.dumps([eagle.__file__, len(load_prompts()), sorted(templates), sorted(BUILT_IN_TEMPLATES)]))
"""


def pip(*words: object) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, words)],
        check=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools leaves its work beside the sources."""
    source = tmp_path_factory.mktemp("source")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.toml"), *ROOT.glob("*.md"), *ROOT.glob("*.txt")]:
        shutil.copy(path, source)
    for folder in ("eagle", "configs", "tests", "tools", "benchmarks"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path_factory.mktemp("wheels")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("installed") / "site"
    pip("install", "--no-deps", "--no-index", "--target", site, wheel)
    return site


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def installed(site: Path, cwd: Path, name: str, *words: object, code: int = 0) -> Answer:
    """Run one of the commands that pip made."""
    return command(site / "bin" / name, *words, cwd=cwd, code=code, PYTHONPATH=str(site))


def test_only_the_package_is_in_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"eagle", f"eagle_draft_heads-{eagle.__version__}.dist-info"}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "eagle").rglob("*") if path.is_file()}
    assert {name for name in names if name.startswith("eagle/")} == {
        name for name in sources if "__pycache__" not in name
    }


def test_the_version_is_read_without_importing(wheel):
    """What builds a wheel has no torch."""
    assert wheel.name.startswith(f"eagle_draft_heads-{eagle.__version__}-")
    code = "import sys, eagle.console; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **ENVIRONMENT}, check=True)


def test_help_of_every_command(site, empty):
    out = command("-c", HELP, cwd=empty, PYTHONPATH=str(site)).out
    assert {line for line in out.splitlines() if line.startswith("command ")} == {f"command {c} 0" for c in COMMANDS}
    assert out.count("usage: ") == len(COMMANDS)
    assert f"version {eagle.__version__}" in out


def test_help_as_a_module(site, empty):
    assert "usage: " in command("-m", "eagle.train.main", "--help", cwd=empty, PYTHONPATH=str(site)).out


def test_files_of_the_package(site, empty):
    file, prompts, templates, built_in = json.loads(command("-c", DATA, cwd=empty, PYTHONPATH=str(site)).out)
    assert Path(file).is_relative_to(site)
    assert prompts > 0
    assert templates == built_in


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("eagle-allocation", ["--outdir", "out", "--model_name", "nowhere", "--data_path", "nowhere.json"]),
        ("eagle-reassign", ["--old_folder", "nowhere", "--new_folder", "new", "--tp", "2"]),
        ("eagle-train", ["--tmpdir", "nowhere", "--cpdir", "out", "--basepath", "nowhere"]),
        ("eagle-verify-store", ["nowhere"]),
    ],
)
def test_wrong_request(site, empty, name, words):
    err = installed(site, empty, name, *words, code=2).err
    assert err.startswith("error: ")
    assert "nowhere" in err
    assert "\n\n" not in err
    assert "Traceback" not in err
    assert not list(empty.iterdir())


def test_whole_job(site, empty, llama, data):
    """Workers and what accelerate starts find the installed package, from where there is no checkout."""
    installed(
        site, empty, "eagle-allocation", "--outdir", "store", "--model_name", llama, "--data_path", data, "--end_num", 8
    )
    training = ["--tmpdir", "store", "--basepath", llama, "--bs", 4, "--max_steps", 1, "--init", "random"]
    installed(site, empty, "eagle-train", *training, "--cpdir", "one")
    command(
        "accelerate launch", "--cpu", "--num_processes", 1, "--num_machines", 1, "--dynamo_backend", "no", "-m",
        "--mixed_precision=no", "eagle.train.main", *training, "--cpdir", "two", cwd=empty, PYTHONPATH=str(site),
    )  # fmt: skip
    assert (empty / "one" / "last").exists()
    assert (empty / "two" / "last").exists()


def test_dry_run_where_it_was_installed_to(site, llama, data):
    """The folder of the libraries is also the working directory, for the command and the probe that it starts."""
    job = ["--outdir", "store", "--model_name", llama, "--data_path", data, "--end_num", 2, "--dry_run"]
    assert "tokens/s" in installed(site, site, "eagle-allocation", *job).out
