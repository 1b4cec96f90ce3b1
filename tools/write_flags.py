"""Write the tables of all flags, docs/flags.md and docs/flags.zh-CN.md, from the commands' own parsers.

    python tools/write_flags.py            writes both
    python tools/write_flags.py --check    writes nothing; exit code 1 where one of them is stale

The Chinese texts come from docs/flags_zh.json: for every flag its help text (``en``) and the translation of that text
(``zh``). So a flag without a translation is found, one that is gone, and one whose help text has changed since.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# A script in tools/ does not have the repository root on its path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eagle.data.sharegpt.main
import eagle.data.viewer
import eagle.decode.evaluate
import eagle.device_check
import eagle.generate.main
import eagle.regenerate.main
import eagle.store.reshard
import eagle.store.verify
import eagle.train.arguments
import eagle.vllm.convert
import eagle.vllm.step_costs
import eagle.vllm.verify
from eagle.entry import run
from eagle.errors import WorkError
from eagle.files import ROOT, read_json

DOCS = ROOT / "docs"
TRANSLATIONS = "flags_zh.json"
DESCRIPTION = "description"


@dataclass(frozen=True, slots=True)
class Command:
    """A command line. name: the word of it that says which command it is. example: as users type it.

    installed: what it is called where the package was installed with pip.
    """

    name: str
    make_parser: Callable[[], argparse.ArgumentParser]
    titles: dict[str, str]
    example: str
    installed: str = ""


COMMANDS = (
    Command(
        "tools/sharegpt_convert.py",
        eagle.data.sharegpt.main.make_parser,
        {"en": "Step 2: other formats to ShareGPT", "zh": "步骤 2：其他格式转为 ShareGPT"},
        "python tools/sharegpt_convert.py --input alpaca.json chats.jsonl qa.csv --output sharegpt.json",
        "eagle-sharegpt-convert",
    ),
    Command(
        "allocation.py",
        eagle.generate.main.make_parser,
        {"en": "Step 3: features of the base model", "zh": "步骤 3：基座模型的特征"},
        'python allocation.py --outdir ./features --end_num 68000 --npu_indices "0,1,2,3,4,5,6,7" --used_npus 1 \\\n'
        "    --model_type llama --model_name ./llama-2-7b-chat --data_path ./sharegpt.json \\\n"
        "    --seed 42 --max_length 2048 --dtype bfloat16",
        "eagle-allocation",
    ),
    Command(
        "reassign_data_num.py",
        eagle.store.reshard.make_parser,
        {"en": "Step 3b: reshard the features", "zh": "步骤 3b：重新切分特征"},
        "python reassign_data_num.py --old_folder ./features --new_folder ./features_tp8 --tp 8",
        "eagle-reassign",
    ),
    Command(
        "eagle.train.main",
        lambda: eagle.train.arguments.make_parser([]),
        {"en": "Step 4: train the draft", "zh": "步骤 4：训练草稿"},
        "accelerate launch -m --mixed_precision=bf16 eagle.train.main --tmpdir ./features --cpdir ./checkpoints \\\n"
        "    --configpath configs/llama_2_chat_7B_config.json --basepath ./llama-2-7b-chat --bs 4",
        "eagle-train",
    ),
    Command(
        "convert_eagle_ckpt_to_vllm_compatible.py",
        eagle.vllm.convert.make_parser,
        {"en": "Step 5: the folder vLLM loads", "zh": "步骤 5：vLLM 可加载的文件夹"},
        "python convert_eagle_ckpt_to_vllm_compatible.py --base-path ./llama-2-7b-chat --draft-path ./checkpoints \\\n"
        "    --base-weight-name model.safetensors.index.json --draft-weight-name model.safetensors --layout v1",
        "eagle-convert",
    ),
    Command(
        "tools/regenerate.py",
        eagle.regenerate.main.make_parser,
        {"en": "The base model's own replies", "zh": "基座模型自己的回答"},
        "python tools/regenerate.py --server http://localhost:8000/v1 --model_name ./llama-2-7b-chat \\\n"
        "    --data_path ./sharegpt.json --temperature 0.8 --output ./own.jsonl",
        "eagle-regenerate",
    ),
    Command(
        "eagle.evaluate",
        eagle.decode.evaluate.make_parser,
        {"en": "Evaluate a draft", "zh": "评估草稿"},
        "python -m eagle.evaluate --base-path ./llama-2-7b-chat --draft-path ./checkpoints --mode chain \\\n"
        "    --num_draft_tokens 5 --output ./evaluation",
        "eagle-evaluate",
    ),
    Command(
        "eagle.vllm.verify",
        eagle.vllm.verify.make_parser,
        {"en": "Verify a draft in vLLM", "zh": "在 vLLM 中验证草稿"},
        "python -m eagle.vllm.verify --base-path ./llama-2-7b-chat --draft-path ./checkpoints-vllm \\\n"
        "    --num_speculative_tokens 3 --dtype float32",
        "eagle-verify",
    ),
    Command(
        "eagle.vllm.step_costs",
        eagle.vllm.step_costs.make_parser,
        {"en": "What a step costs in vLLM", "zh": "vLLM 中一步的开销"},
        "python -m eagle.vllm.step_costs --base-path ./llama-2-7b-chat --output costs.json",
        "eagle-step-costs",
    ),
    Command(
        "eagle.store.verify",
        eagle.store.verify.make_parser,
        {"en": "Verify a store", "zh": "校验特征库"},
        "python -m eagle.store.verify ./features",
        "eagle-verify-store",
    ),
    Command(
        "eagle.data.viewer",
        eagle.data.viewer.make_parser,
        {"en": "See what is trained on", "zh": "查看哪些 token 参与训练"},
        "python -m eagle.data.viewer --model_name ./llama-2-7b-chat --data_path ./sharegpt.json --num 3",
        "eagle-view",
    ),
    Command(
        "eagle.device",
        eagle.device_check.make_parser,
        {"en": "What this machine has and lacks", "zh": "检查本机环境"},
        "python -m eagle.device",
        "eagle-device",
    ),
)


@dataclass(frozen=True, slots=True)
class Page:
    """What is not of one command. default: how a help text names its default. installed: what pip calls a command."""

    file: str
    language: str
    head: str
    columns: tuple[str, str, str]
    required: str
    off: str
    none: str
    default: re.Pattern[str]
    also: str
    installed: str


PAGES = (
    Page(
        "flags.md",
        "en",
        "# All flags\n\nWritten by `python tools/write_flags.py` from the commands themselves; every command prints "
        "its own with `--help`.\n\n中文：[flags.zh-CN.md](flags.zh-CN.md)\n",
        ("flag", "default", "meaning"),
        "required",
        "off",
        "none",
        re.compile(r" ?\(default: ([^()]*)\)"),
        "Also accepted: {}.",
        "Installed with pip, the command is `{}`.",
    ),
    Page(
        "flags.zh-CN.md",
        "zh",
        "# 全部参数\n\n本页由 `python tools/write_flags.py` 根据各命令自身生成；"
        "每条命令也可用 `--help` 查看自己的参数。\n\n"
        "English: [flags.md](flags.md)\n",
        ("参数", "默认值", "含义"),
        "必填",
        "关",
        "无",
        re.compile(r"（默认：([^（）]*)）"),
        "也可以写作 {}。",
        "用 pip 安装后，命令为 `{}`。",
    ),
)


def help_texts(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The English text of the command and of every argument, by its first name."""
    found = {DESCRIPTION: parser.description or ""}
    return found | {name_of(action): (action.help or "") % vars(action) for action in arguments(parser)}


def arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]


def name_of(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)


def spelling(action: argparse.Action) -> str:
    """A flag with what may follow it."""
    name = name_of(action)
    if not action.option_strings:
        return f"`{name}`"
    if action.choices:
        name += " {" + ",".join(map(str, action.choices)) + "}"
    elif action.metavar:
        name += f" {action.metavar}"
    return f"`{name} ...`" if action.nargs == "+" else f"`{name}`"


def default_of(action: argparse.Action, text: str, page: Page) -> str:
    """What a reader wants to know: whether it is needed, what the help text says, or the value."""
    said = page.default.search(text)
    if action.required:
        return page.required
    if said:
        return said.group(1)
    if action.default is None:
        return page.none
    if action.default is False:
        return page.off
    return f"{action.default:g}" if isinstance(action.default, float) else str(action.default)


def marked_up(text: str) -> str:
    """Flags, and words that Markdown would not leave alone, as code."""
    text = text.replace("|", "\\|")
    return re.sub(r"--[a-z][a-z_-]*|[A-Za-z0-9_./-]*[<*][A-Za-z0-9_./<>*-]*", lambda found: f"`{found.group()}`", text)


def section(command: Command, page: Page, texts: dict[str, str]) -> str:
    """One command's part of a page. texts: as `help_texts`, in the page's language."""
    parser = command.make_parser()
    lines = [f"## {command.titles[page.language]}", "", "```bash", command.example, "```", ""]
    lines += [marked_up(texts[DESCRIPTION]), ""]
    if command.installed:
        lines += [page.installed.format(command.installed), ""]
    lines += [row(page.columns), row(["---"] * len(page.columns))]
    for action in arguments(parser):
        text = texts[name_of(action)]
        meaning = page.default.sub("", text)
        lines.append(row([spelling(action), marked_up(default_of(action, text, page)), marked_up(meaning)]))
    others = [name for action in arguments(parser) for name in action.option_strings[1:]]
    if others:
        lines += ["", page.also.format(", ".join(f"`{name}`" for name in others))]
    return "\n".join(lines) + "\n"


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def wrong_translations(commands: Sequence[Command], translations: dict[str, dict[str, dict[str, str]]]) -> list[str]:
    """What docs/flags_zh.json lacks, has too much of, or has for another text than today's."""
    english, chinese = PAGES
    wrong = []
    for command in commands:
        texts, translated = help_texts(command.make_parser()), translations.get(command.name, {})
        for name, text in texts.items():
            entry = translated.get(name)
            if entry is None:
                wrong.append(f"{command.name} {name}: it has no translation")
            elif entry["en"] != text:
                wrong.append(
                    f"{command.name} {name}: its text is now {text!r}; the translation is of {entry['en']!r}. "
                    "Translate it again and put the new text beside it"
                )
            elif bool(english.default.search(text)) != bool(chinese.default.search(entry["zh"])):
                wrong.append(f"{command.name} {name}: text and translation must both name a default, or neither")
        wrong += [f"{command.name} {name}: there is no such flag" for name in translated if name not in texts]
    known = {command.name for command in commands}
    wrong += [f"{name}: there is no such command" for name in translations if name not in known]
    return [f"docs/{TRANSLATIONS}: {message}." for message in wrong]


def render(page: Page, commands: Sequence[Command], translations: dict[str, dict[str, dict[str, str]]]) -> str:
    """A whole page. The translations have to be right: see `wrong_translations`."""
    parts = [page.head]
    for command in commands:
        texts = help_texts(command.make_parser())
        if page.language == "zh":
            texts = {name: translations[command.name][name]["zh"] for name in texts}
        parts.append(section(command, page, texts))
    return "\n".join(parts)


def stale(commands: Sequence[Command], folder: Path) -> list[str]:
    """Which pages in `folder` are not what `write` would write, and what is wrong with the translations."""
    translations = read_json(folder / TRANSLATIONS, "the translations of the help texts")
    wrong = wrong_translations(commands, translations)
    pages = []
    for page in PAGES:
        if page.language == "zh" and wrong:
            continue  # it cannot be rendered
        path = folder / page.file
        if not path.is_file() or path.read_text(encoding="utf-8") != render(page, commands, translations):
            pages.append(f"docs/{page.file} is stale: run python tools/write_flags.py.")
    return wrong + pages


def write(commands: Sequence[Command], folder: Path) -> list[str]:
    """Write the pages. Returns what is wrong with the translations; the Chinese page is left as it is then."""
    translations = read_json(folder / TRANSLATIONS, "the translations of the help texts")
    wrong = wrong_translations(commands, translations)
    for page in PAGES:
        if page.language == "en" or not wrong:
            (folder / page.file).write_text(render(page, commands, translations), encoding="utf-8")
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/write_flags.py", description="Write the tables of all flags.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where something is stale")
    args = parser.parse_args(argv)
    wrong = (stale if args.check else write)(COMMANDS, DOCS)
    if wrong:
        raise WorkError("\n".join(wrong))
    print(f"{' and '.join('docs/' + page.file for page in PAGES)}: {'up to date' if args.check else 'written'}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
