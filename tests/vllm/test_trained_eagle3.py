"""A trained EAGLE-3 draft in both forms, and by its folder alone: what vLLM accepts of it is what we do."""

from __future__ import annotations

import dataclasses
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from eagle.decode.acceptance_counts import Acceptance
from eagle.train.main import run_training
from eagle.train.options import TrainOptions
from eagle.vllm.engine import EngineRequest, EngineResult
from eagle.vllm.export import export
from tests.taught import teach_target
from tests.tiny import conversations, write_sharegpt
from tests.vllm.engines import run_engines
from tests.vllm.test_agreement import WITHIN, ours

#: As many as the folder proposes where it is served alone.
K, NEW = 3, 32


@dataclass(frozen=True, slots=True)
class Served:
    """folders: of the forms, by name. results: by what was served. mine: what our own decoding accepts, and says."""

    folders: dict[str, Path]
    results: dict[str, EngineResult]
    mine: Acceptance
    replies: list[list[int]]


def as_noted(folder: Path) -> dict:
    """The speculative config that the folder's README.md says to serve it with."""
    note = (folder / "README.md").read_text(encoding="utf-8")
    (line,) = [line.strip() for line in note.splitlines() if line.strip().startswith("--speculative-config")]
    return json.loads(shlex.split(line)[1])


def alone_as_noted(folder: Path) -> str:
    """The folder that its README.md says to serve in place of both."""
    note = (folder / "README.md").read_text(encoding="utf-8")
    (line,) = [line for line in note.splitlines() if "draft's folder alone," in line]
    return shlex.split(line[line.index("vllm serve") : line.rindex(")")])[2]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Trained, exported from within its folder, served from another; one child runs all engines."""
    root = tmp_path_factory.mktemp("trained")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices gain nothing from more
    prompts = teach_target(root / "base")[::2]
    data = write_sharegpt(root / "data.json", conversations(48))
    options = TrainOptions(
        root / "run", root / "base", data_path=data, dtype="float32", draft="eagle3", draft_vocab_size=150,
        init="random", num_epochs=2, lr=3e-3, ttt_steps=3, max_len=256, noise=0.0, vloss_weight=0.0,
    )  # fmt: skip
    assert run_training(options) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        folders = export(Path("base"), Path("run"), Path("export"), "both")
    folders = {name: root / folder for name, folder in folders.items()}
    asked = {
        name: EngineRequest(
            str(root / "base"), prompts, method=as_noted(folder)["method"], draft=as_noted(folder)["model"],
            num_speculative_tokens=as_noted(folder)["num_speculative_tokens"],
        )
        for name, folder in folders.items()
    }  # fmt: skip
    asked["without"] = EngineRequest(str(root / "base"), prompts)
    asked["alone"] = EngineRequest(alone_as_noted(folders["speculators"]), prompts)
    asked = {
        name: dataclasses.replace(request, max_new_tokens=NEW, dtype="float32", warm_up=False)
        for name, request in asked.items()
    }
    results = dict(zip(asked, run_engines(list(asked.values()), root), strict=True))
    mine, replies = ours(root / "base", folders["plain"], prompts, [], K, NEW)
    torch.set_num_threads(threads)
    print(f"\nby position, ours {mine.per_position()}")
    for name, result in results.items():
        rates = [round(count / max(1, result.drafts), 3) for count in result.accepted_per_position]
        print(f"{name}: tau {result.tau():.4f}, {result.accepted} of {result.drafted} accepted, {rates}")
    return Served(folders, results, mine, replies)


@pytest.mark.parametrize("form", ["plain", "speculators"])
def test_as_much_is_accepted_as_by_our_own_decoding(served: Served, form: str) -> None:
    result = served.results[form]
    assert 1.2 < result.tau() < K, "it is sometimes right, and sometimes not"
    assert served.mine.tau() == pytest.approx(result.tau(), rel=WITHIN)
    found = [count / result.drafts for count in result.accepted_per_position]
    assert served.mine.per_position() == pytest.approx(found, abs=WITHIN)


@pytest.mark.parametrize("name", ["plain", "speculators", "alone"])
def test_the_output_is_the_targets_own(served: Served, name: str) -> None:
    assert served.results[name].outputs == served.results["without"].outputs
    assert served.results["without"].drafted == 0


def test_our_own_output_is_the_same(served: Served) -> None:
    assert served.replies == served.results["without"].outputs


def test_the_folder_alone_serves_target_and_draft(served: Served) -> None:
    """It was exported by a relative path, from another working directory."""
    both, alone = served.results["speculators"], served.results["alone"]
    assert (alone.drafts, alone.drafted, alone.accepted) == (both.drafts, both.drafted, both.accepted)
    assert alone.accepted > 0
