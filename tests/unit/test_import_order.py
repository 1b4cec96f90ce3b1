"""Imports run one way: from late stages to early ones, never back, never in a circle, never hidden in a function.

The sources are read, not run. A module right in the package comes before all stages, except the commands, which come
after them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "eagle"
STAGES = ("target", "data", "store", "drafts", "generate", "train", "decode", "vllm", "regenerate")
COMMANDS = ("evaluate", "console")


@dataclass(frozen=True, slots=True)
class Import:
    """One module that another one imports. hidden: in a function, or where only a type checker looks."""

    file: str
    line: int
    importer: str
    imported: str
    hidden: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.imported}"


def modules(package: Path) -> dict[str, Path]:
    """The package's modules by dotted name; a folder's is its ``__init__.py``."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def statements(node: ast.AST, hidden: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import statement below a node, and whether it is hidden."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, hidden
        else:
            is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            is_for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from statements(child, hidden or is_function or is_for_types)


def targets(statement: ast.Import | ast.ImportFrom, importer: str, is_folder: bool) -> list[str]:
    """The dotted names that a statement may mean, relative ones resolved."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    base = statement.module or ""
    if statement.level:
        parts = importer.split(".")
        parts = parts[: len(parts) - statement.level + is_folder]
        base = ".".join([*parts, base] if base else parts)
    return [f"{base}.{alias.name}" for alias in statement.names]


def imports(package: Path) -> list[Import]:
    """What the package's modules import of each other."""
    known, found = modules(package), []
    for importer, path in known.items():
        file = path.relative_to(package.parent).as_posix()
        for statement, hidden in statements(ast.parse(path.read_text(encoding="utf-8"))):
            names = targets(statement, importer, path.name == "__init__.py")
            # `from eagle.files import ROOT` means the module eagle.files, `from eagle import files` does too.
            meant = {name if name in known else name.rpartition(".")[0] for name in names}
            found += [
                Import(file, statement.lineno, importer, name, hidden)
                for name in sorted(meant)
                if name == package.name or name.startswith(f"{package.name}.")
            ]
    return found


def place(module: str, package: Path) -> int:
    """Where a module comes in the order. Raises: ValueError for a folder that is no stage."""
    first = module.split(".")[1] if "." in module else ""
    if first in COMMANDS:
        return len(STAGES) + 1
    if (package / first).is_dir() and first:
        return STAGES.index(first) + 1
    return 0


def circles(edges: list[Import]) -> Iterator[str]:
    """Every circle that is left when the ones before it are cut open, told from its first module by name."""
    left = {(edge.importer, edge.imported): edge for edge in edges if edge.importer != edge.imported}
    while True:
        graph: dict[str, list[str]] = {}
        for importer, imported in left:
            graph.setdefault(importer, []).append(imported)
        try:
            TopologicalSorter(graph).prepare()
            return
        except CycleError as error:
            *circle, _ = reversed(error.args[1])  # graphlib lists what is needed before what needs it
        first = circle.index(min(circle))
        circle = [*circle[first:], *circle[: first + 1]]
        yield f"{left.pop((circle[0], circle[1]))}, which leads back: {' -> '.join(circle)}"


def violations(package: Path) -> list[str]:
    edges = imports(package)
    found = [
        f"{folder.name}/ is no stage; expected one of {', '.join(STAGES)}"
        for folder in sorted(package.iterdir())
        if folder.is_dir() and any(folder.glob("*.py")) and folder.name not in STAGES
    ]
    if found:
        return found
    forward = []
    for edge in edges:
        if place(edge.imported, package) > place(edge.importer, package):
            found.append(f"{edge}, which comes later")
        else:
            forward.append(edge)
        if edge.hidden:
            found.append(f"{edge} where it is hidden: in a function or under TYPE_CHECKING")
    # Without the edges that are named already, a circle can only be inside one stage.
    return [*found, *circles(forward)]


def test_package():
    found = violations(PACKAGE)
    assert not found, "\n".join(["", *found])


def test_it_looks_at_the_whole_package():
    edges = {(edge.importer, edge.imported) for edge in imports(PACKAGE)}
    assert ("eagle.generate.launch", "eagle.store.manifest") in edges
    assert {f"eagle.{stage}" for stage in STAGES} <= set(modules(PACKAGE))
    assert len(edges) > 200


#: A package that is in order.
SOUND = {
    "__init__.py": "",
    "errors.py": "import sys",
    "files.py": "from eagle.errors import RequestError",
    "data/__init__.py": "",
    "data/tokens.py": "import torch\nfrom eagle.files import ROOT",
    "data/viewer.py": "from .tokens import Tokens\nfrom ..errors import WorkError",
    "store/__init__.py": "",
    "store/reader.py": "from eagle import errors\nfrom eagle.data.tokens import Tokens",
    "train/__init__.py": "",
    "train/loop.py": "def fit():\n    import torch\n    from eagle_llm import baseline\n",
    "train/main.py": "import eagle.store.reader\nfrom eagle.train import loop",
    "console.py": "from eagle.train.main import main",
}

LAZY = "def read():\n    from eagle.files import ROOT\n"
TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from eagle.data.tokens import Tokens\n"
SHADE = "where it is hidden: in a function or under TYPE_CHECKING"


@pytest.mark.parametrize(
    ("planted", "expected"),
    [
        ({}, []),
        (
            {"data/tokens.py": "import torch\nfrom eagle.store.reader import Reader", "store/reader.py": ""},
            ["eagle/data/tokens.py:2 imports eagle.store.reader, which comes later"],
        ),
        (
            {"store/reader.py": "from eagle.train import loop, main"},
            ["eagle/store/reader.py:1 imports eagle.train.loop, which comes later",
             "eagle/store/reader.py:1 imports eagle.train.main, which comes later"],
        ),
        ({"errors.py": "from eagle.data import tokens", "files.py": "", "data/tokens.py": ""},
         ["eagle/errors.py:1 imports eagle.data.tokens, which comes later"]),
        ({"train/loop.py": "from eagle.console import train", "console.py": ""},
         ["eagle/train/loop.py:1 imports eagle.console, which comes later"]),
        (
            {"data/tokens.py": "from eagle.data.viewer import view", "data/viewer.py": "from eagle.data import tokens"},
            ["eagle/data/tokens.py:1 imports eagle.data.viewer, which leads back: "
             "eagle.data.tokens -> eagle.data.viewer -> eagle.data.tokens"],
        ),
        (
            {"errors.py": "from .files import ROOT"},
            ["eagle/errors.py:1 imports eagle.files, which leads back: eagle.errors -> eagle.files -> eagle.errors"],
        ),
        ({"store/reader.py": LAZY}, [f"eagle/store/reader.py:2 imports eagle.files {SHADE}"]),
        ({"store/reader.py": TYPES}, [f"eagle/store/reader.py:3 imports eagle.data.tokens {SHADE}"]),
        (
            {"store/reader.py": "class Reader:\n    def read(self):\n        import eagle.train.loop\n"},
            ["eagle/store/reader.py:3 imports eagle.train.loop, which comes later",
             f"eagle/store/reader.py:3 imports eagle.train.loop {SHADE}"],
        ),
        ({"extras/plots.py": ""}, [f"extras/ is no stage; expected one of {', '.join(STAGES)}"]),
    ],
)  # fmt: skip
def test_what_is_planted_is_found(planted, expected, tmp_path):
    package = tmp_path / "eagle"
    for name, source in (SOUND | planted).items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(source)
    assert violations(package) == expected


def test_every_circle_is_named(tmp_path):
    """Also the one that another one shares a module with, and a longer one."""
    sources = {"a": "bc", "b": "a", "c": "d", "d": "a", "e": "a"}
    package = tmp_path / "eagle"
    (package / "data").mkdir(parents=True)
    for name, imported in sources.items():
        text = "\n".join(f"from eagle.data import {other}" for other in imported)
        (package / "data" / f"{name}.py").write_text(text)
    found = violations(package)
    assert len(found) == 2
    named = [set(line.partition("leads back: ")[2].replace("eagle.data.", "").split(" -> ")) for line in found]
    assert sorted(map(sorted, named)) == [["a", "b"], ["a", "c", "d"]]
