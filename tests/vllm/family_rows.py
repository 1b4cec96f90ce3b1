"""A row of `tests.families` through the product's commands, up to the engines that are asked about it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from eagle.drafts.choices import DraftChoices
from eagle.drafts.families import DRAFT_FAMILIES
from eagle.drafts.interface import DraftFamily
from eagle.drafts.saved import save_draft
from eagle.files import read_json, write_json
from eagle.generate import main as generation
from eagle.store.reader import FeatureStore
from eagle.store.record import Record
from eagle.target.config import ModelConfig, load_config
from eagle.target.families import TARGET_FAMILIES
from eagle.target.trunk import has_long_rope
from eagle.target.weights import Weights, read_embedding
from eagle.vllm import convert
from eagle.vllm.engine import EngineRequest
from eagle.vllm.serving import serving_of
from tests.families import Row, make_row
from tests.tiny import conversations, cpu_worker, write_sharegpt

#: Draft steps: the first over the whole prompt, the others each from the draft's own state.
DEPTH = 4
#: Tokens of the longest record at most, and of the prompt at least: longer than any window of the rows.
LONGEST, SHORTEST = 256, 64
#: Of the target's tokens, those that an EAGLE-3 draft chooses among.
DRAFTED = 100


@dataclass(slots=True)
class Served:
    """A row's target with what steps 3 and 5 made for it.

    record: of its store, computed in a batch with longer ones; its tokens are the engines' prompt. drafts: the exported
    folders, by vLLM's method; those that the family table says can be served.
    """

    row: Row
    target: Path
    config: ModelConfig
    record: Record
    drafts: dict[str, Path] = field(default_factory=dict)

    @property
    def prompt(self) -> list[int]:
        return self.record.input_ids.tolist()

    def as_served(self) -> Path:
        """The target's folder; of one with longrope a copy that has only the long factors, as vLLM computes it."""
        raw = read_json(self.target / "config.json", "the target's config")
        if not has_long_rope(self.config):
            return self.target
        copy = Path(shutil.copytree(self.target, self.target.with_name("long")))
        raw["rope_parameters"]["short_factor"] = raw["rope_parameters"]["long_factor"]
        write_json(copy / "config.json", raw)
        return copy

    def request(self, method: str) -> EngineRequest:
        """Prefills the prompt and drafts a chain."""
        serving = serving_of(self.config, FAMILY_OF[method])
        return EngineRequest(
            str(self.target),
            [self.prompt],
            str(self.drafts[method]),
            method=method,
            num_speculative_tokens=DEPTH,
            max_new_tokens=8,
            dtype="float32",
            warm_up=False,
            model_impl=serving.model_impl,
            least_context=serving.least_context,
        )


#: The draft families by vLLM's method, and what a user chooses of them.
FAMILY_OF: dict[str, DraftFamily] = {family.method: family for family in DRAFT_FAMILIES.values()}
CHOICES = {"eagle": DraftChoices(), "eagle3": DraftChoices(draft_vocab_size=DRAFTED)}


def make_served(folder: Path, row: Row) -> Served:
    """Steps 3 and 5, with random drafts in place of trained ones: every tensor of theirs matters."""
    target = make_row(folder / "target", row)
    config = load_config(target)
    assert config.window == row.window
    record = make_record(folder, target, row)
    served = Served(row, target, config, record)
    for method, family in FAMILY_OF.items():
        if method not in TARGET_FAMILIES[config.family].serves:
            continue
        save_random_draft(folder / method, family, target, config)
        layout = next(iter(family.layouts))
        words = ["--base-path", target, "--draft-path", folder / method, "--output-path", folder / f"{method}-vllm"]
        assert convert.main([str(word) for word in [*words, "--layout", layout]]) == 0
        served.drafts[method] = folder / f"{method}-vllm"
    return served


def make_record(folder: Path, target: Path, row: Row) -> Record:
    """Step 3 for both families of drafts, its worker in this process."""
    data = write_sharegpt(folder / "data.json", conversations(12, turns=1, seed=5))
    words: list[object] = ["--outdir", folder / "store", "--model_name", target, "--model_type", row.family]
    words += ["--data_path", data, "--draft", "eagle3", "--dtype", "float32", "--device", "cpu"]
    words += ["--max_length", LONGEST, "--chat_template", "chatml"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "run_workers", work_here)
        assert generation.main([str(word) for word in words]) == 0
    store = FeatureStore(folder / "store")
    lengths = sorted(int(length) for length in store.lengths)
    wanted = next(length for length in lengths if length >= SHORTEST)
    assert wanted < lengths[-1] <= LONGEST
    return store[store.lengths.tolist().index(wanted)]


def work_here(job, tokens: int, lock: int) -> None:
    """In place of `eagle.generate.launch.run_workers`."""
    assert len(job.groups) == 1
    (job.request.folder / "0").mkdir(exist_ok=True)
    list(cpu_worker(job.request.folder, 0).work(1 << 20))


def save_random_draft(folder: Path, family: DraftFamily, target: Path, config: ModelConfig) -> None:
    torch.manual_seed(1)
    draft = family.build(
        family.config(config, None, CHOICES[family.method]), read_embedding(Weights(target), config).float()
    )
    if draft.ids is not None:
        draft.choose(torch.randperm(config.vocab_size)[:DRAFTED].sort().values)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name != "embed_tokens.weight":
                parameter.normal_(std=0.5 if name.endswith(".bias") else 0.1)
    save_draft(draft, folder)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, of the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
