"""The requirements files and pyproject.toml say the same: what is needed, from which version on, and for what."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from eagle.device_facts import OLDEST, OTHERS
from eagle.train.options import TRACKERS
from eagle.versions import dotted

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def parse(lines: list[str]) -> dict[str, Requirement]:
    """Requirements by name, of which none comes twice."""
    requirements = [Requirement(line) for line in lines]
    assert len({requirement.name for requirement in requirements}) == len(requirements)
    return {requirement.name: requirement for requirement in requirements}


def in_file(name: str) -> dict[str, Requirement]:
    """A file's own requirements, without those of a file that it includes."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    return parse([line for line in lines if line and not line.startswith("-r ")])


def lowest(requirement: Requirement) -> Version:
    """The oldest version that is allowed; 0 where any is."""
    bounds = [Version(part.version) for part in requirement.specifier if part.operator in (">=", "==", "~=")]
    return max(bounds, default=Version("0"))


DEPENDENCIES, EXTRAS = parse(PROJECT["dependencies"]), PROJECT["optional-dependencies"]


def test_the_check_of_a_machine_asks_for_all_of_them():
    asked = OLDEST | OTHERS
    assert list(asked) == list(DEPENDENCIES)
    assert all(Version(dotted(asked[name]) or "0") == lowest(DEPENDENCIES[name]) for name in asked)


def test_tested_versions_are_allowed_ones():
    tested = in_file("requirements.txt")
    assert set(tested) == set(DEPENDENCIES)
    for name, requirement in tested.items():
        assert lowest(DEPENDENCIES[name]) <= lowest(requirement), name


def test_older_versions_are_allowed_ones():
    older = in_file("requirements-older.txt")
    assert set(DEPENDENCIES) <= set(older)
    for name, dependency in DEPENDENCIES.items():
        for part in older[name].specifier:
            if part.operator == "==":
                assert dependency.specifier.contains(part.version), name


def test_the_second_environment_has_the_oldest_transformers_and_accelerate():
    older = in_file("requirements-older.txt")
    for name in ("transformers", "accelerate"):
        assert lowest(older[name]).release[:2] == lowest(DEPENDENCIES[name]).release[:2], name


def test_development():
    assert parse(EXTRAS["dev"]) == in_file("requirements-dev.txt")
    assert "-r requirements.txt" in (ROOT / "requirements-dev.txt").read_text(encoding="utf-8")


def test_npu():
    """torch_npu's release equals torch's."""
    assert in_file("requirements-npu.txt")["torch_npu"].specifier == in_file("requirements.txt")["torch"].specifier


CONTAINER, CONTAINER_OLDER = "requirements-container.txt", "requirements-container-older.txt"


@pytest.mark.parametrize("name", [CONTAINER, CONTAINER_OLDER])
def test_lists_for_containers_leave_torch_alone(name):
    listed, text = in_file(name), (ROOT / name).read_text(encoding="utf-8")
    assert set(listed) == set(DEPENDENCIES) - {"torch"}
    assert "-r " not in [line[:3] for line in text.splitlines()], "of another list, which may hold a torch"
    assert f"pip install -r {name} -c image.txt" in text, "and neither does what these need, with that"
    for package, requirement in listed.items():
        assert lowest(DEPENDENCIES[package]) <= lowest(requirement) or not requirement.specifier, package
    assert not listed["numpy"].specifier, "or it would contradict an image.txt"


def test_a_container_with_a_new_torch_gets_what_the_tests_run_with():
    tested = in_file("requirements.txt")
    del tested["torch"]
    images_own = {name: Requirement(name) for name in ("numpy", "protobuf")}
    assert in_file(CONTAINER) == tested | images_own


def test_a_container_with_an_old_torch_gets_what_the_second_run_has():
    listed, tested = in_file(CONTAINER_OLDER), in_file("requirements-older.txt")
    for name in ("transformers", "accelerate"):
        assert lowest(listed[name]) == lowest(tested[name]), name
        assert not listed[name].specifier.contains("4.57") and not listed[name].specifier.contains("1.0"), name


def test_the_second_run_has_the_oldest_torch():
    assert lowest(in_file("requirements-older.txt")["torch"]).release[:2] == lowest(DEPENDENCIES["torch"]).release[:2]


def test_extras():
    assert set(EXTRAS) == {"vllm", "plots", "trackers", "parquet", "dev"}
    assert set(parse(EXTRAS["trackers"])) == set(TRACKERS) - {"none"}


def test_environment_script_looks_for_what_is_needed():
    script = (ROOT / "runs" / "environment.sh").read_text(encoding="utf-8")
    (names,) = [line for line in script.splitlines() if line.strip().startswith("for package in torch ")]
    assert names.partition(" in ")[2].partition(";")[0].split() == list(DEPENDENCIES)


def test_commands():
    for name, target in PROJECT["scripts"].items():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function)), name


def test_a_container_with_vllm_keeps_its_transformers_too():
    listed = in_file("requirements-container-vllm.txt")
    assert set(listed) == set(DEPENDENCIES) - {"torch", "transformers"}
    assert lowest(listed["accelerate"]) >= Version("1.6"), "the first with FSDP version 2"
