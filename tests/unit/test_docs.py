"""What README and docs/ point at is there: links, files, modules, commands, flags; and the Chinese twins agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from eagle.files import ROOT
from tests.pages import FENCE, blocks, commands
from tools import plan_scale
from tools.write_flags import COMMANDS

DOCS = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Also about what is to come, or is gone: only their links have to resolve.
OTHERS = [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
TWINS = [(page, twin) for twin in DOCS if (page := twin.with_name(twin.name.replace(".zh-CN", ""))) != twin]

#: Flags of commands that are not ours.
FOREIGN_FLAGS = {
    "--help", "--check", "--multi_gpu", "--cpu", "--num_processes", "--num_cpu_threads_per_process", "--config_file",
    "--mixed_precision", "--standalone", "--nproc_per_node", "--speculative-config",
    "--num_machines", "--machine_rank", "--main_process_ip", "--main_process_port",
    "--rm", "--name", "--network", "--shm-size", "--model", "--speculative-model", "--num-speculative-tokens",
    "--use-v2-block-manager", "--tensor-parallel-size", "--compilation-config", "--version", "--tokenizer-mode",
    "--repo-type", "--local-dir",
    "--model-impl", "--max-model-len",
    "--default-chat-template-kwargs",
    "--nnodes", "--node-rank", "--node_rank", "--master-addr", "--master_addr", "--master_port", "--headless", "--host",
    "--port", "--distributed-executor-backend", "--pipeline-parallel-size", "--head", "--address",
    "--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--kill-on-bad-exit",
}  # fmt: skip

_LINK = re.compile(r"\[[^\]\[]*\]\(([^()\s]+)\)")


def by_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_links(path: Path) -> list[str]:
    """The relative links of a page that lead nowhere."""
    text, missing = path.read_text(encoding="utf-8"), []
    for link in _LINK.findall(FENCE.sub("", text)):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            missing.append(link)
    return missing


def missing_names(text: str) -> list[str]:
    """Modules, files and scripts of this repository that a text names and that are not there."""
    modules = {name for name in re.findall(r"\beagle(?:\.\w+)+\b", text) if not name.endswith(".md")}
    missing = [name for name in modules if not is_module(name)]
    folders = "allocation|reassign_data_num|convert_eagle_ckpt_to_vllm_compatible"
    files = re.findall(
        rf"(?<![\w./])(?:(?:eagle|tools|runs|configs|benchmarks|tests|docs)/[\w./-]*|(?:{folders})\.py)", text
    )
    return sorted(missing + [file for file in set(files) if not (ROOT / file.rstrip(".")).exists()])


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def own_command(words: list[str]):
    """Which of `COMMANDS` a command line runs, and its arguments."""
    return next(((c, words[words.index(c.name) + 1 :]) for c in COMMANDS if c.name in words), None)


def without_comments(language: str, content: str) -> list[str]:
    """The part of a block that is the same in every language."""
    separator = r"(?:^|\s+)#.*" if language else r"(?<=\S)\s{2,}.*"
    return [re.sub(separator, "", line).rstrip() for line in content.splitlines()]


@pytest.mark.parametrize("path", DOCS + OTHERS, ids=by_name)
def test_relative_links_lead_somewhere(path):
    assert missing_links(path) == []


@pytest.mark.parametrize("path", DOCS, ids=by_name)
def test_named_modules_and_files_exist(path):
    assert missing_names(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", DOCS, ids=by_name)
def test_commands_are_ones_that_our_parsers_take(path):
    for words in commands(path.read_text(encoding="utf-8")):
        found = own_command(words)
        if found and "..." not in words:
            command, arguments = found
            command.make_parser().parse_args(arguments)  # ends the test where it does not


@pytest.mark.parametrize("path", DOCS, ids=by_name)
def test_named_flags_exist(path):
    known = {name for c in COMMANDS for action in c.make_parser()._actions for name in action.option_strings}
    sources = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "benchmarks").glob("*.py"))
    known |= FOREIGN_FLAGS | set(re.findall(r'"(--\w+)"', sources))
    named = re.findall(r"(?<![\w-])--[a-z][\w-]*", path.read_text(encoding="utf-8"), re.ASCII)
    assert sorted(set(named) - known) == []


def test_the_readme_is_short_and_has_every_step_and_every_page():
    for name in ("README.md", "README.zh-CN.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 150 and len(text.split()) < 1000, name
        shown = [found[0].name for words in commands(text) if (found := own_command(words))]
        in_order = [command.name for command in COMMANDS if command.name in shown]
        assert shown == in_order and len(in_order) == 7, name
        linked = {link.partition("#")[0] for link in _LINK.findall(text)}
        chinese = ".zh-CN" in name
        pages = [path for path in DOCS if path.parent == ROOT / "docs" and (".zh-CN" in path.name) == chinese]
        assert {f"docs/{path.name}" for path in pages} <= linked, name
    assert {command.example for command in COMMANDS[:5]} <= {
        content.rstrip("\n") for _, content in blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    }


def test_the_tree_in_the_readme_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (tree,) = [content for language, content in blocks(text) if not language]
    folder = ROOT
    for line in tree.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith("  ") else ROOT
        assert (folder / name).exists(), line
        folder = ROOT / name if not line.startswith("  ") and name.endswith("/") else folder


def test_every_chinese_page_has_its_english_one():
    assert TWINS and all(path.is_file() for path, _ in TWINS)


@pytest.mark.parametrize(("path", "twin"), TWINS, ids=lambda path: path.name)
def test_twins_have_the_same_code_and_the_same_sections(path, twin):
    english, chinese = (page.read_text(encoding="utf-8") for page in (path, twin))
    ours, theirs = (
        [(kind, without_comments(kind, code)) for kind, code in blocks(text)] for text in (english, chinese)
    )
    assert ours == theirs
    levels = [re.findall(r"^(#+) ", FENCE.sub("", text), re.MULTILINE) for text in (english, chinese)]
    assert levels[0] == levels[1]
    tables = [len(re.findall(r"^\s*\|", text, re.MULTILINE)) for text in (english, chinese)]
    assert tables[0] == tables[1]
    assert twin.name in _LINK.findall(english) and path.name in _LINK.findall(chinese)


def test_the_tables_of_scale_are_what_the_tool_prints(capsys):
    """Disk and network at hidden sizes 4096 and 8192, each row in both languages."""
    assert plan_scale.main([]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\| [\d,]+", line)]
    assert len(printed) == 12
    for name in ("scale.md", "scale.zh-CN.md"):
        written = (ROOT / "docs" / name).read_text(encoding="utf-8").splitlines()
        assert [line for line in written if re.match(r"\| [\d,]+", line)] == printed, name


def test_what_is_not_there_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One heading: here\n[a](page.md#one-heading-here) [b](#gone) [c](gone.md) [d](https://example.org/gone)\n"
        "```bash\n[e](gone.md)\n```\n",
        encoding="utf-8",
    )
    assert missing_links(page) == ["#gone", "gone.md"]
    named = (
        "`python -m eagle.evaluate`, `eagle.verify_vllm`, `python allocation.py`, tools/gone.py, runs/tests.sh, docs/."
    )
    assert missing_names(named) == ["eagle.verify_vllm", "tools/gone.py"]
    shell = "```bash\nexport N=3  # three\n```\n```bash\npython allocation.py --outdir x \\\n    --end_num $N\n```\n"
    assert commands(shell)[1:] == [["python", "allocation.py", "--outdir", "x", "--end_num", "3"]]
