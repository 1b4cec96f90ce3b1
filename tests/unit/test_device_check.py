"""What ``python -m eagle.device`` says of machines that have what the work needs, and of those that lack some of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eagle import ascend, device_cards, device_check, device_facts
from eagle.device_facts import MISSING, NOTE, OK, Fact
from eagle.files import ROOT
from tests.cards import HIDDEN, install_torch_npu


@pytest.mark.parametrize(
    ("name", "version", "with_torch", "status", "says"),
    [
        ("torch", None, None, MISSING, "not installed"),
        ("torch", "2.0.1", "2.0.1", MISSING, "2.1 or newer"),
        ("torch", "2.1.0a0+git", "2.1.0a0+git", OK, ""),
        ("transformers", "4.45.2", "2.1.0", OK, ""),
        ("transformers", "5.16.1", "2.3.1", MISSING, "needs torch 2.5 or newer; this is 2.3.1"),
        ("transformers", "5.16.1", "2.5.1+cpu", OK, ""),
        ("transformers", "5.2.0", "2.3.1", OK, ""),
        ("accelerate", "0.30", "2.5.1", MISSING, "0.34 or newer"),
    ],
)
def test_packages(name, version, with_torch, status, says):
    fact = device_facts.package_fact(name, version, with_torch)
    assert fact.status == status and says in fact.found and bool(fact.cure) == (status == MISSING)


def test_all_packages_that_are_needed_are_asked_for(monkeypatch, capsys):
    assert not [fact for fact in device_facts.other_facts() if fact.status == MISSING]
    found = {"psutil": None, "jinja2": "3.0.3"}
    monkeypatch.setattr(device_facts, "installed", lambda name: found.get(name, "99"))
    there, *missing = device_facts.other_facts()
    assert there.found == "safetensors 99, numpy 99, tqdm 99, sentencepiece 99, protobuf 99"
    assert missing == [
        Fact(MISSING, "jinja2", "3.0.3; 3.1 or newer is needed", "pip install 'jinja2>=3.1'"),
        Fact(MISSING, "psutil", "not installed", "pip install 'psutil'"),
    ]
    assert device_check.main(["--device", "cpu"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("missing: jinja2, psutil.")


def test_a_containers_torch_is_not_replaced():
    cures = [device_facts.package_fact("transformers", None, torch).cure for torch in ("2.1.0", "2.6.0+cpu", None)]
    assert cures == [
        "pip install 'transformers==4.45.2'", "pip install 'transformers>=5.16.1,<5.20'",
        "pip install -r requirements.txt",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("version", "with_torch", "failure", "status", "says", "cure"),
    [
        (None, "2.5.1+cpu", None, MISSING, "not installed", "pip install torch_npu==2.5.1"),
        ("2.5.1.post1", "2.5.1+cpu", None, OK, "2.5.1.post1, published for CANN 8.2.RC1", ""),
        ("2.5.1.post1.dev20250528", "2.5.1+cpu", None, OK, "published for CANN 8.2.RC1", ""),
        ("2.5.1+git1a2b3c4", "2.5.1+cpu", None, OK, "published for CANN 8.1.RC1", ""),
        ("2.1.0.post3", "2.5.1", None, MISSING, "another torch than 2.5.1", "torch_npu==2.5.1, or torch==2.1.0"),
        ("2.5.1", "2.5.1", "libhccl.so: no. In this shell run 'source x'", MISSING, "libhccl.so: no", "run 'source x'"),
    ],
)
def test_torch_npu(version, with_torch, failure, status, says, cure):
    fact = device_facts.torch_npu_fact(version, with_torch, failure)
    assert fact.status == status and says in fact.found and cure in fact.cure


@pytest.fixture
def cann(tmp_path: Path) -> Path:
    """CANN 8.2.RC1 as its installer leaves it."""
    home = tmp_path / "ascend-toolkit" / "latest"
    (home / "aarch64-linux").mkdir(parents=True)
    info = "package_name=Ascend-cann-toolkit\nversion=8.2.RC1\ninnerversion=V100R001C22SPC001B231\narch=aarch64\n"
    (home / "aarch64-linux" / "ascend_toolkit_install.info").write_text(info)
    return home


def test_cann(cann, monkeypatch):
    sourced = {"ASCEND_TOOLKIT_HOME": str(cann), "LD_LIBRARY_PATH": f"/usr/lib:{cann}/lib64"}
    assert device_facts.cann_facts("2.5.1.post1", sourced) == [
        Fact(OK, "CANN", f"8.2.RC1, {cann}"), Fact(OK, "set_env.sh", "sourced")
    ]  # fmt: skip
    drivers = {"ASCEND_HOME_PATH": str(cann), "LD_LIBRARY_PATH": "/usr/local/Ascend/driver/lib64:/usr/local/lib"}
    assert device_facts.cann_facts("2.5.1.post1", drivers)[1].status == NOTE, "images name the driver's by themselves"
    other, script = device_facts.cann_facts("2.1.0", {"ASCEND_HOME_PATH": str(cann), "LD_LIBRARY_PATH": ""})
    assert other.status == NOTE and "torch_npu 2.1.0 is published for 7.0.0" in other.found
    assert script.status == NOTE and script.cure.startswith("source /")
    (cann / "aarch64-linux" / "ascend_toolkit_install.info").unlink()
    assert device_facts.cann_version(cann) is None
    (cann / "version.cfg").write_text("# version: 1.0\nruntime_running_version=[7.7.0.1.231:8.2.RC1]\n")
    assert device_facts.cann_version(cann) == "8.2.RC1"
    monkeypatch.setattr(device_facts, "CANN_HOMES", (f"{cann}/set_env.sh",))
    assert device_facts.cann_home({}) == cann, "where installers put it"
    monkeypatch.setattr(device_facts, "CANN_HOMES", ())
    assert [fact.status for fact in device_facts.cann_facts(None, {})] == [MISSING]


LISTED = """
\tTotal Count                    : 2

\tNPU ID                         : 0
\tChip Count                     : 1

\tNPU ID                         : 1
\tChip Count                     : 1
"""


@pytest.mark.parametrize(
    ("smi", "code", "nodes", "status", "says"),
    [
        (LISTED, 0, 2, OK, "npu-smi shows 2 card(s); 2 card(s) in"),
        (LISTED.replace("Total Count", "Count"), 0, 2, OK, "npu-smi shows 2 card(s)"),
        ("dcmi module initialize failed. ret is -8005", 1, 0, MISSING, "initialize failed. ret is -8005"),
        (None, 0, 2, NOTE, "npu-smi is not on PATH; 2 card(s) in"),
        (None, 0, 0, MISSING, "npu-smi is not on PATH; 0 card(s) in"),
    ],
)
def test_the_driver(tmp_path, monkeypatch, smi, code, nodes, status, says):
    for name in ["davinci_manager", *(f"davinci{number}" for number in range(nodes))]:
        (tmp_path / name).touch()
    if smi is not None:
        (tmp_path / "npu-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{smi}\nEND\nexit {code}\n")
        (tmp_path / "npu-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    fact = device_facts.driver_fact(tmp_path)
    assert fact.status == status and says in fact.found


@pytest.mark.parametrize(
    ("kind", "environment", "name", "status", "says"),
    [
        ("npu", {}, ascend.VISIBLE, OK, "not set: all cards"),
        ("npu", {ascend.VISIBLE: "0,1"}, ascend.VISIBLE, OK, "0,1"),
        ("npu", {ascend.VISIBLE: "1,0"}, ascend.VISIBLE, MISSING, f"export {ascend.VISIBLE}=0,1"),
        ("npu", {ascend.VISIBLE: ""}, ascend.VISIBLE, MISSING, "hides every card"),
        ("npu", {"INF_NAN_MODE_ENABLE": "0"}, "INF_NAN_MODE_ENABLE", NOTE, "unset INF_NAN_MODE_ENABLE"),
        ("npu", {}, "PYTORCH_NPU_ALLOC_CONF", NOTE, "expandable_segments:True"),
        ("npu", {"PYTORCH_NPU_ALLOC_CONF": "x:y"}, "PYTORCH_NPU_ALLOC_CONF", OK, "x:y"),
        ("npu", {"HCCL_CONNECT_TIMEOUT": "600"}, "HCCL timeouts", OK, "HCCL_CONNECT_TIMEOUT 600, HCCL_EXEC"),
        ("cpu", {"EAGLE_TARIN_MODE": "1"}, "EAGLE_TARIN_MODE", NOTE, "unset EAGLE_TARIN_MODE"),
        ("cuda", {"CUDA_VISIBLE_DEVICES": "3"}, "CUDA_VISIBLE_DEVICES", OK, "3"),
    ],
)
def test_variables(kind, environment, name, status, says):
    (fact,) = [fact for fact in device_facts.variable_facts(kind, environment) if fact.name == name]
    assert fact.status == status and says in f"{fact.found}; {fact.cure}"


def test_a_machine_with_a_cpu(capsys):
    assert device_check.main(["--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said.endswith("\nThe work can run on cpu.\n") and "missing" not in said
    for name in ("python", "torch", "transformers", "accelerate", "cpu"):
        assert f"\nok       {name:<27}" in f"\n{said}"
    assert "a product in bfloat16 is right" in " ".join(said.split())


@pytest.mark.parametrize("kind", ["npu", "cuda"])
def test_a_machine_without_the_cards_that_are_asked_for(kind, capsys):
    assert device_check.main(["--device", kind]) == 1
    said = capsys.readouterr().out
    assert f"missing  {kind} cards" in said and f"The work cannot run on {kind}; missing: " in said.splitlines()[-1]


def test_what_is_folded_stands_under_itself():
    first, *others = device_check.lines([Fact(NOTE, "name", "word " * 40, "the cure")])
    assert first.startswith(f"note     {'name':<27}word") and len(others) == 2 and others[-1].endswith("; the cure")
    assert all(line.startswith(" " * 36 + "word") and len(line) <= 118 for line in others)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda place: 0.5, "0.5 off the CPU's"),
        (lambda place: float("nan"), "nan off"),
        (lambda place: 1 / 0, "fails: "),
    ],
)
def test_a_card_that_computes_something_else(monkeypatch, broken, says):
    monkeypatch.setattr(device_cards, "product_error", broken)
    (fact,) = device_cards.card_facts("cpu")
    assert fact.status == MISSING and says in fact.found
    assert device_check.main(["--device", "cpu"]) == 1


def test_packages_that_do_not_fit(monkeypatch):
    def import_module(name):
        if name == "accelerate":
            raise ImportError("cannot import name 'x'")
        return type(sys)(name) if name != "transformers" else torch  # whose version it is then

    monkeypatch.setattr(device_cards.importlib, "import_module", import_module)
    monkeypatch.setattr(torch, "is_torch_available", lambda: False, raising=False)
    takes_no_torch, broken = device_cards.library_facts()
    assert takes_no_torch.status == broken.status == MISSING
    assert "does not take torch" in takes_no_torch.found and "cannot import name 'x'" in broken.found


def python(*words: str, **environment: str) -> subprocess.CompletedProcess:
    words = (sys.executable, *words, "-m", "eagle.device")
    return subprocess.run(words, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_without_torch():
    done = python("-S")  # no packages are found
    assert done.returncode == 1 and "missing  torch  " in done.stdout and not done.stderr
    assert done.stdout.splitlines()[-1].startswith("The work cannot run on ") and "torch, transformers" in done.stdout


def test_an_older_python_is_said_to_be_one():
    def run(argv: str, code: str = "import eagle") -> subprocess.CompletedProcess:
        old = f"import sys; sys.version_info = (3, 9, 18); sys.argv = [{argv!r}]\n{code}"
        return subprocess.run([sys.executable, "-S", "-c", old], cwd=ROOT, capture_output=True, text=True, check=False)

    for command in ("-m", "allocation.py", "tools/write_flags.py"):
        done = run(command)
        assert done.returncode == 1 and done.stderr.startswith("error: Python 3.10 or newer is needed; this is ")
        assert "Traceback" not in done.stderr
    guarded = "import contextlib\nwith contextlib.suppress(ImportError): import eagle\nprint('goes on')"
    assert run("another_program.py", guarded).stdout == "goes on\n", "another program's import is not its end"


def test_where_cann_was_not_sourced(tmp_path):
    environment = install_torch_npu(tmp_path, "raise ImportError('libhccl.so: cannot open')")
    done = python(**{**dict.fromkeys(HIDDEN, ""), **environment})
    said = " ".join(done.stdout.split())
    assert done.returncode == 1 and not done.stderr
    assert (
        "missing torch_npu" in said
        and "libhccl.so: cannot open" in said
        and "The work cannot run on npu; missing: torch_npu, " in said
    )
