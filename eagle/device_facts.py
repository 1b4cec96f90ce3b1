"""What this machine has, as far as that can be told without torch: packages, CANN, the driver, the environment.

CANN's versions and the files that name them: `ascend_toolkit_install.info` beside the libraries of the processor's
kind; `version.cfg` where that one is missing.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from eagle import ascend
from eagle.versions import dotted, installed, release

OK, NOTE, MISSING = "ok", "note", "missing"

#: The oldest that the code runs from.
OLDEST = {"torch": (2, 1), "transformers": (4, 45), "accelerate": (0, 34)}

#: What else is needed, with the oldest where that matters.
OTHERS: dict[str, tuple[int, ...]] = {
    "safetensors": (), "numpy": (), "tqdm": (), "jinja2": (3, 1), "psutil": (), "sentencepiece": (), "protobuf": (),
}  # fmt: skip

#: The first transformers that leaves an older torch alone, and the torch that it asks for.
NEW_TRANSFORMERS, ITS_TORCH = (5, 16), (2, 5)

#: Releases that were run together: with such a torch or a newer one, and with an older one.
FITTING = {
    "torch": (">=2.1", ">=2.1"),
    "transformers": (">=5.16.1,<5.20", "==4.45.2"),
    "accelerate": (">=1.15", "==0.34.2"),
}

#: CANN that a release of torch_npu is published for (the tables of Ascend Extension for PyTorch).
CANN_OF = {
    "2.1.0": "7.0.0", "2.1.0.post3": "8.0.RC1", "2.1.0.post6": "8.0.RC2", "2.1.0.post8": "8.0.RC3",
    "2.1.0.post10": "8.0.0", "2.1.0.post12": "8.1.RC1", "2.1.0.post13": "8.2.RC1", "2.1.0.post17": "8.3.RC1",
    "2.2.0": "8.0.RC1", "2.2.0.post2": "8.0.RC2", "2.3.1": "8.0.RC2", "2.3.1.post2": "8.0.RC3",
    "2.3.1.post4": "8.0.0", "2.3.1.post6": "8.1.RC1", "2.4.0": "8.0.RC3", "2.4.0.post2": "8.0.0",
    "2.4.0.post4": "8.1.RC1", "2.5.1": "8.1.RC1", "2.5.1.post1": "8.2.RC1", "2.6.0": "8.2.RC1",
    "2.6.0.post3": "8.3.RC1", "2.6.0.post5": "8.5.0", "2.7.1": "8.3.RC1", "2.7.1.post2": "8.5.0",
    "2.7.1.post4": "9.0.0", "2.7.1.post8": "9.1.0", "2.8.0": "8.3.RC1", "2.8.0.post2": "8.5.0",
    "2.8.0.post4": "9.0.0", "2.9.0": "8.5.0", "2.9.0.post2": "9.0.0", "2.9.0.post6": "9.1.0", "2.10.0": "9.0.0",
    "2.10.0.post4": "9.1.0", "2.11.0": "9.1.0", "2.12.0": "9.1.0",
}  # fmt: skip

#: Where CANN is when no variable says so.
CANN_HOMES = tuple(script.replace("ascend-toolkit/", "ascend-toolkit/latest/") for script in ascend.SET_ENV)

DRIVER = Path("/usr/local/Ascend/driver/version.info")


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of the report. status: `OK`, `NOTE` or `MISSING`, by which the work cannot run. cure: what to do."""

    status: str
    name: str
    found: str
    cure: str = ""


def python_fact() -> Fact:
    return Fact(OK, "python", f"{platform.python_version()}, {sys.executable}")  # an older one cannot read this file


def package_fact(name: str, version: str | None, torch_version: str | None) -> Fact:
    """Whether torch, transformers or accelerate is there and new enough; transformers not too new for torch."""
    oldest, is_old = dotted(OLDEST[name]), torch_version is not None and release(torch_version)[:2] < ITS_TORCH
    # By name, where torch is there: a list of requirements that names torch would replace a container's.
    cure = f"pip install '{name}{FITTING[name][is_old]}'" if torch_version else "pip install -r requirements.txt"
    if version is None:
        return Fact(MISSING, name, "not installed", cure)
    if release(version)[:2] < OLDEST[name]:
        return Fact(MISSING, name, f"{version}; {oldest} or newer is needed", cure)
    if name == "transformers" and is_old and release(version)[:2] >= NEW_TRANSFORMERS:
        found = f"{version}, which needs torch {dotted(ITS_TORCH)} or newer; this is {torch_version}"
        return Fact(MISSING, name, found, cure)
    return Fact(OK, name, version)


def other_facts() -> list[Fact]:
    """The other packages: one line for all that are there, one for each that is not."""
    found = {name: installed(name) for name in OTHERS}
    there = {name: version for name, version in found.items() if version and release(version)[:2] >= OTHERS[name]}
    facts = [Fact(OK, "other packages", ", ".join(f"{name} {version}" for name, version in there.items()))]
    for name in [name for name in OTHERS if name not in there]:
        needed = f">={dotted(OTHERS[name])}" if OTHERS[name] else ""
        says = f"{found[name]}; {dotted(OTHERS[name])} or newer is needed" if found[name] else "not installed"
        facts.append(Fact(MISSING, name, says, f"pip install '{name}{needed}'"))
    return facts if there else facts[1:]


def torch_npu_fact(version: str | None, torch_version: str | None, failure: str | None) -> Fact:
    """failure: what importing it said; see `ascend.failure`."""
    name = "torch_npu"
    if version is None and not ascend.is_installed() and failure is None:
        cure = f"pip install torch_npu=={dotted(release(torch_version))}" if torch_version else "install torch first"
        return Fact(MISSING, name, "not installed", cure)
    if (pair := ascend.wrong_pair(version, torch_version)) is not None:
        return Fact(MISSING, name, pair[0].removeprefix("is torch_npu "), pair[1])
    if failure is not None:
        why, _, cure = failure.partition(". In this shell ")
        return Fact(MISSING, name, f"{version or ''} cannot be imported: {why}".strip(), cure)
    cann = published_for(version)
    return Fact(OK, name, (version or "without a version") + (f", published for CANN {cann}" if cann else ""))


def published_for(torch_npu: str | None) -> str | None:
    """The CANN for a torch_npu's version, of which '.dev20250528' and '+gitb1c2d3' do not count; None where unknown."""
    return CANN_OF.get(re.sub(r"(\.dev|\+).*", "", torch_npu or ""))


def cann_home(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Where CANN is: as its set_env.sh says, or where installers put it."""
    told = [environment[name] for name in ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH") if environment.get(name)]
    usual = [str(Path(script).expanduser().parent) for script in CANN_HOMES]
    return next((Path(folder) for folder in [*told, *usual] if Path(folder).is_dir()), None)


def cann_version(home: Path) -> str | None:
    """As its installers wrote it down: ``version=8.2.RC1``, or in version.cfg ``..._version=[7.7.0.1:8.2.RC1]``."""
    files = sorted([*home.glob("*-linux/ascend_toolkit_install.info"), *home.glob("*-linux/ascend_*_install.info")])
    for path in [*files, home / "version.cfg"]:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        found = re.search(r"^version=(\S+)$", text, re.M) or re.search(r"_version=\[[^:\]]*:([^\]]+)\]", text)
        if found:
            return found[1]
    return None


def cann_facts(torch_npu: str | None, environment: Mapping[str, str] = os.environ) -> list[Fact]:
    """CANN, and whether this shell has it. torch_npu: its version."""
    home = cann_home(environment)
    if home is None:
        return [
            Fact(MISSING, "CANN", "not found", "install CANN's toolkit and kernels, or take an image that has them")
        ]
    version, expected = cann_version(home), published_for(torch_npu)
    fact = Fact(OK, "CANN", f"{version or 'of an unknown version'}, {home}")
    if version and expected and not version.startswith(expected):
        fact = Fact(NOTE, "CANN", f"{version}, {home}; torch_npu {torch_npu} is published for {expected}")
    libraries = [Path(folder) for folder in environment.get("LD_LIBRARY_PATH", "").split(os.pathsep) if folder]
    # Of CANN, not of the driver beside it, which images name by themselves.
    if any(folder.is_relative_to(home) or folder.resolve().is_relative_to(home.resolve()) for folder in libraries):
        return [fact, Fact(OK, "set_env.sh", "sourced")]
    # Without it importing torch_npu fails, unless the system finds the libraries by itself: that line says so.
    return [fact, Fact(NOTE, "set_env.sh", "not sourced in this shell", f"source {ascend.set_env_script()}")]


def driver_fact(devices: Path = Path("/dev")) -> Fact:
    """The driver as npu-smi sees it."""
    nodes = len([node for node in devices.glob("davinci*") if node.name.removeprefix("davinci").isdigit()])
    shown = f"{nodes} card(s) in {devices}"
    if DRIVER.is_file() and (version := re.search(r"^Version=(\S+)", DRIVER.read_text(errors="replace"), re.M)):
        shown += f", driver {version[1]}"
    if shutil.which("npu-smi") is None:
        return Fact(NOTE if nodes else MISSING, "driver", f"npu-smi is not on PATH; {shown}", ascend.IN_A_CONTAINER)
    try:
        done = subprocess.run(["npu-smi", "info", "-l"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Fact(MISSING, "driver", f"npu-smi info -l fails: {error}", ascend.IN_A_CONTAINER)
    said = done.stdout + done.stderr
    total = re.search(r"Total Count\s*:\s*(\d+)", said)
    listed = int(total[1]) if total else len(re.findall(r"^\s*NPU ID\s*:\s*\d+", said, re.M))
    if done.returncode or not listed:
        words = " ".join(said.split())[-200:]
        return Fact(MISSING, "driver", f"npu-smi info -l shows no card ({words}); {shown}", ascend.IN_A_CONTAINER)
    return Fact(OK, "driver", f"npu-smi shows {listed} card(s); {shown}")


def variable_facts(kind: str, environment: Mapping[str, str] = os.environ) -> list[Fact]:
    """The variables that change what the commands do on that kind of device."""
    facts = []
    if environment.get("EAGLE_TARIN_MODE"):
        found = "exported; allocation.py's workers get it by themselves, and inference is to run without it"
        facts.append(Fact(NOTE, "EAGLE_TARIN_MODE", found, "unset EAGLE_TARIN_MODE"))
    if kind == "npu":
        return facts + _npu_variables(environment)
    if kind == "cuda":
        value = environment.get("CUDA_VISIBLE_DEVICES")
        facts.append(Fact(OK, "CUDA_VISIBLE_DEVICES", "not set: all cards" if value is None else value or "empty"))
    return facts


def _npu_variables(environment: Mapping[str, str]) -> list[Fact]:
    value = environment.get(ascend.VISIBLE)
    wrong = ascend.wrong_visible(value) if value else None
    if wrong:
        found, _, cure = wrong.partition(". ")
        facts = [Fact(MISSING, ascend.VISIBLE, found.removeprefix(f"{ascend.VISIBLE}="), cure)]
    elif value in ("", "-1"):
        facts = [Fact(MISSING, ascend.VISIBLE, f"{value!r} hides every card", f"unset {ascend.VISIBLE}")]
    else:
        facts = [Fact(OK, ascend.VISIBLE, value or "not set: all cards")]
    if hidden := ascend.hidden_overflow(environment):
        found, _, cure = hidden.removeprefix(f"{ascend.INF_NAN}=").partition(". Run ")
        facts.append(Fact(NOTE, ascend.INF_NAN, found, cure))
    name, value = "PYTORCH_NPU_ALLOC_CONF", environment.get("PYTORCH_NPU_ALLOC_CONF")
    if value:
        facts.append(Fact(OK, name, value))
    else:
        found = "not set; batches differ in length, which leaves gaps in a card's memory"
        facts.append(Fact(NOTE, name, found, f"export {name}=expandable_segments:True"))
    timeouts = {"HCCL_CONNECT_TIMEOUT": "120", "HCCL_EXEC_TIMEOUT": "1836"}
    said = ", ".join(f"{name} {environment.get(name) or f'{usual} (not set)'}" for name, usual in timeouts.items())
    facts.append(Fact(OK, "HCCL timeouts", f"seconds: {said}"))
    return facts
