"""`eagle.vllm.step_costs` without a vLLM: what it asks of engines, what it keeps and refuses; and verify with it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from eagle.decode.step_costs import Shape as DraftShape
from eagle.decode.step_costs import read_step_costs
from eagle.device import describe
from eagle.drafts.saved import load_draft
from eagle.entry import run
from eagle.target.identity import Identity
from eagle.target.weights import Weights
from eagle.vllm import step_costs
from eagle.vllm import verify as verify_vllm
from eagle.vllm.engine import EngineError, EngineRequest, EngineResult
from eagle.vllm.export import export
from eagle.vllm.timing import Timing, time_steps
from tests.costs import shape, write_costs
from tests.oracle import Shape, write_pair
from tests.oracle3 import write_oracle
from tests.unit.test_verify_vllm import RESULT, engines


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target of seven layers, and an exported EAGLE-3 draft of it that chooses among 400 of 512 tokens."""
    root = tmp_path_factory.mktemp("costs")
    oracle = write_oracle(root, Shape())
    return oracle.target, export(oracle.target, oracle.draft, root / "export", "plain")["plain"]


class Engines:
    """In the engines' place. A step of batch b takes b ms, and 1 ms more a drafted token, and `hurry` times as long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[EngineRequest] = []
        self.shapes: list[tuple[str, int]] = []
        self.hurry, self.fails_at, self.dtype = 1.0, 0, "float32"
        monkeypatch.setattr(step_costs, "check_vllm", lambda: "0.32.0+cpu")  # as the package is called
        monkeypatch.setattr(step_costs, "choose_kind", lambda: "cpu")
        monkeypatch.setattr(step_costs, "run_engines", self.run)

    def run(self, requests: list[EngineRequest], *, in_process: bool) -> Iterator[EngineResult]:
        assert requests  # none is one too few for the child that runs them
        for request in requests:
            self.asked.append(request)
            if len(self.asked) == self.fails_at:
                raise EngineError("vLLM did not run")
            tokens = request.num_speculative_tokens if request.draft else 0
            assert request.timing and len(request.prompts) >= max(request.timing.batch_sizes)
            times = [[self.hurry * (batch + tokens)] * 3 for batch in request.timing.batch_sizes]
            yield dataclasses.replace(RESULT, outputs=[], step_ms=times, dtype=self.dtype)


def call(base: Path, output: Path, *arguments: object) -> int:
    argv = ["--base-path", base, "--output", output, *arguments]
    return run(lambda: step_costs.main([str(argument) for argument in argv]))


SIZES = ("--draft_vocab_sizes", 64, 256, 512, "--aux_layers", "1,3,5", "--num_speculative_tokens", 4)


def test_shapes_tokens_and_batches_are_measured(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    engine, output = Engines(monkeypatch), tmp_path / "costs.json"
    made: list[tuple[str, int, int]] = []
    whole = engine.run

    def look(requests: list[EngineRequest], *, in_process: bool) -> Iterator[EngineResult]:
        for request in requests:
            if request.draft:
                ids = load_draft(request.draft, torch.empty(512, 128)).ids
                made.append((request.method, 512 if ids is None else len(ids), request.num_speculative_tokens))
        return whole(requests, in_process=in_process)

    monkeypatch.setattr(step_costs, "run_engines", look)
    assert call(pair[0], output, *SIZES, "--draft-path", pair[1], "--rounds", 2) == 0
    by_shape = {(method, size): [k for *one, k in made if tuple(one) == (method, size)] for method, size, _ in made}
    assert by_shape == {
        ("eagle3", 400): [1, 2, 3, 4] * 2,  # the user's own
        ("eagle", 512): [1, 2, 3, 4] * 2,
        ("eagle3", 256): [1, 2, 3, 4] * 2,
        ("eagle3", 64): [1, 2, 4] * 2,
        ("eagle3", 512): [1, 2, 4] * 2,
    }
    assert [one.draft is None for one in engine.asked].count(True) == 2
    costs = read_step_costs(output)
    assert costs.batch_sizes == [1, 4, 16] and costs.alone(4).ms == 4.0
    (eagle1,) = [shape for shape in costs.shapes if shape.family == "eagle1"]
    assert costs.cost(eagle1, 3, 16).ms == 19.0
    content = json.loads(output.read_text())
    assert content["is_finished"] and content["engine"]["dtype"] == "float32" and content["made_by"]["argv"]
    assert Identity(pair[0], Weights(pair[0])).is_named(content["target"])
    shown = capsys.readouterr().out
    assert "eagle3, 64 tokens" in shown and "19.00" in shown


def test_what_is_there_is_not_measured_again(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    engine, output = Engines(monkeypatch), tmp_path / "costs.json"
    asked = ("--drafts", "eagle1", "--num_speculative_tokens", 3, "--batch_sizes", 1, 2, "--rounds", 1)
    engine.fails_at = 3
    assert call(pair[0], output, *asked) == 1
    assert [one["num_speculative_tokens"] for one in json.loads(output.read_text())["measured"]] == [0, 0, 1, 1]
    assert not json.loads(output.read_text())["is_finished"]
    engine.fails_at = 0
    assert call(pair[0], output, *asked) == 0
    assert [one.num_speculative_tokens for one in engine.asked[3:]] == [2, 3]
    before = len(engine.asked)
    assert call(pair[0], output, *asked) == 0 and len(engine.asked) == before
    assert "measured already" in capsys.readouterr().out
    # More of the same: another batch size, a further K.
    more = ("--drafts", "eagle1", "--num_speculative_tokens", 4, "--batch_sizes", 1, 8, "--rounds", 1)
    assert call(pair[0], output, *more) == 0
    new = engine.asked[before:]
    assert [(one.num_speculative_tokens, one.timing.batch_sizes) for one in new if one.draft and one.timing] == [
        (1, [8]), (2, [8]), (3, [8]), (4, [1, 8]),
    ]  # fmt: skip


def test_a_file_is_finished_once_every_request_is(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    engine, output = Engines(monkeypatch), tmp_path / "costs.json"
    first = ("--drafts", "eagle1", "--num_speculative_tokens", 2, "--batch_sizes", 1, "--rounds", 1)
    engine.fails_at = 3
    assert call(pair[0], output, *first) == 1  # its K 2 is missing
    engine.fails_at = 0
    other = ("--drafts", "eagle3", "--draft_vocab_sizes", 64, "--aux_layers", "1,3,5", "--rounds", 1)
    other = (*other, "--num_speculative_tokens", 1, "--batch_sizes", 1)
    assert call(pair[0], output, *other) == 0
    shown = capsys.readouterr().out
    assert "is not finished: an earlier request, which was interrupted, also wanted eagle1, 512 tokens, K 2" in shown
    assert not json.loads(output.read_text())["is_finished"] and "give it to eagle.evaluate" not in shown
    assert call(pair[0], output, *first) == 0
    assert json.loads(output.read_text())["is_finished"]
    assert {one.family for one in read_step_costs(output).shapes} == {"eagle1", "eagle3"}
    # A file that does not say what was wanted is finished with its last request.
    content = json.loads(output.read_text())
    del content["wanted"]
    output.write_text(json.dumps(content | {"is_finished": False}))
    assert call(pair[0], output, *other) == 0 and json.loads(output.read_text())["is_finished"]


def test_rounds_that_are_left_are_missing_too(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every point was measured once, and the engine fails in the second round."""
    engine, output = Engines(monkeypatch), tmp_path / "costs.json"
    first = ("--drafts", "eagle1", "--num_speculative_tokens", 1, "--batch_sizes", 1)
    engine.fails_at = 4
    assert call(pair[0], output, *first) == 1
    engine.fails_at = 0
    assert call(pair[0], output, *first, "--batch_sizes", 2) == 0
    assert not json.loads(output.read_text())["is_finished"]
    assert call(pair[0], output, *first, "--rounds", 1) == 0  # which is what is wanted of them now
    assert json.loads(output.read_text())["is_finished"]


def test_rounds_end_where_two_agree(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = Engines(monkeypatch)
    asked = ("--drafts", "eagle1", "--num_speculative_tokens", 1, "--batch_sizes", 1)
    assert call(pair[0], tmp_path / "quiet.json", *asked) == 0
    assert len(engine.asked) == 4  # of two engines two rounds
    whole = engine.run

    def slower(requests: list[EngineRequest], *, in_process: bool) -> Iterator[EngineResult]:
        engine.hurry *= 1.5
        return whole(requests, in_process=in_process)

    assert read_step_costs(tmp_path / "quiet.json")  # which is finished
    monkeypatch.setattr(step_costs, "run_engines", slower)
    assert call(pair[0], tmp_path / "busy.json", *asked) == 0
    assert len(engine.asked) == 4 + 8
    assert read_step_costs(tmp_path / "busy.json").alone(1).spread == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--batch_sizes", 0), "--batch_sizes 0: expected 1 or more"),
        (("--dtype", "int3"), "--dtype int3: unknown dtype"),
        (("--context", 2000), "the base model has 1024. Lower --context"),
        (("--draft_vocab_sizes", 9999, "--aux_layers", "1,3,5"), "--draft_vocab_size 9999: expected 1 to 512"),
        (("--drafts",), "There is no draft to measure. Name a kind with --drafts, or one with --draft-path."),
        (
            ("--drafts", "eagle1", "--draft_vocab_sizes", 64, 256, "--aux_layers", "1,3,5"),
            "--draft_vocab_sizes 64 256 would do nothing: it is of eagle3 drafts, and --drafts names none. Leave it "
            "out, or name them there. --aux_layers 1,3,5 would do nothing: it is of eagle3 drafts",
        ),
        (("--aux_layers", "1,3,5", "--drafts"), "--aux_layers 1,3,5 would do nothing"),
    ],
)
def test_wrong_requests(pair, monkeypatch, capsys, tmp_path, arguments, said) -> None:
    engine = Engines(monkeypatch)
    assert call(pair[0], tmp_path / "costs.json", *arguments) == 2
    assert said in " ".join(capsys.readouterr().err.split()) and not engine.asked


def test_another_requests_file_is_not_gone_on_with(pair, monkeypatch, capsys, tmp_path) -> None:
    engine, output = Engines(monkeypatch), tmp_path / "costs.json"
    asked = ("--drafts", "eagle1", "--num_speculative_tokens", 1, "--rounds", 1)
    assert call(pair[0], output, *asked) == 0
    assert call(pair[0], output, *asked, "--context", 64) == 2
    assert "another request's measurements: asked is" in " ".join(capsys.readouterr().err.split())
    engine.dtype = "bfloat16"
    assert call(pair[0], output, *asked, "--batch_sizes", 2) == 2
    assert "is of another engine" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(step_costs, "check_vllm", lambda: "0.33.0")
    assert call(pair[0], output, *asked) == 2  # where there is nothing left to measure
    assert "vLLM is 0.32.0 there and 0.33.0 here" in " ".join(capsys.readouterr().err.split())


def test_steps_count_once_all_sequences_are_decoded() -> None:
    """An engine that prefills one sequence a step; the warm-up is left out, and so are steps of some of them."""
    steps: list[set[str]] = []

    @dataclasses.dataclass
    class Output:
        request_id: str

    class Engine:
        def __init__(self) -> None:
            self.waiting: list[str] = []
            self.running: list[str] = []

        def add_request(self, number: str, prompt: dict, sampling: object) -> None:
            self.waiting.append(number)

        def has_unfinished_requests(self) -> bool:
            return bool(self.waiting or self.running)

        def abort_request(self, numbers: list[str]) -> None:
            self.running = []

        def step(self) -> list[Output]:
            if self.waiting:
                self.running.append(self.waiting.pop(0))
                steps.append({self.running[-1]})
            else:
                steps.append(set(self.running))
            return [Output(number) for number in steps[-1]]

    class LLM:
        llm_engine = Engine()

    found = time_steps(LLM(), [[1], [2], [3]], Timing([1, 3], 16), None)
    assert [len(windows) for windows in found] == [2, 2]
    # 1 prefill and 3 + 16 steps; 3 of them, and the same.
    assert len(steps) == (1 + 19) + (3 + 19)
    assert all(ms > 0 for windows in found for ms in windows)


def test_a_batch_that_is_never_decoded_at_once_is_said() -> None:
    """An engine whose cache holds two sequences."""

    @dataclasses.dataclass
    class Output:
        request_id: str

    class Engine:
        def __init__(self) -> None:
            self.left: dict[str, int] = {}

        def add_request(self, number: str, prompt: dict, sampling: object) -> None:
            self.left[number] = 40

        def has_unfinished_requests(self) -> bool:
            return bool(self.left)

        def abort_request(self, numbers: list[str]) -> None:
            self.left = {}

        def step(self) -> list[Output]:
            running = list(self.left)[:2]
            for number in running:
                self.left[number] -= 1
                if not self.left[number]:
                    del self.left[number]
            return [Output(number) for number in running]

    class LLM:
        llm_engine = Engine()

    assert len(time_steps(LLM(), [[1] * 9] * 2, Timing([1, 2], 16), None)) == 2
    said = "of a batch of 3 sequences vLLM decoded at most 2 at once.*context of 9 tokens.*VLLM_CPU_KVCACHE_SPACE"
    with pytest.raises(RuntimeError, match=said):
        time_steps(LLM(), [[1] * 9] * 3, Timing([1, 3], 16), None)


def test_there_is_room_for_all_that_is_decoded_at_once() -> None:
    # While the last of sixteen long prompts is read, the first ones grow.
    few, many = (Timing([16], 24).room(1, context) for context in (64, 32768))
    assert many - few >= 2 * (16 * 32768 / 2048 - 1)
    request = EngineRequest("base", [[1] * 128], batch_size=16, max_new_tokens=64, cache_bytes=512 << 10)
    assert request.cache_gib() == 2  # 16 x 196 x 512 KiB: 1.53 GiB
    assert EngineRequest("base", [[1]]).cache_gib() == 1


def test_verify_weighs_the_draft(pair, monkeypatch, capsys, tmp_path) -> None:
    engines(monkeypatch, RESULT, RESULT)
    base, draft = pair
    words = ["--base-path", base, "--draft-path", draft, "--num_prompts", 2, "--output", tmp_path / "report.json"]

    def verify(*more: object) -> int:
        return run(lambda: verify_vllm.main([str(word) for word in (*words, *more)]))

    assert verify() == 0
    assert "python -m eagle.vllm.step_costs --base-path" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "report.json").rename(tmp_path / "other.json")
    mine = DraftShape(**report["shape"])
    assert (mine.family, mine.draft_vocab_size) == ("eagle3", 400)
    one = {mine: {1: {1: 12.0, 2: 13.0, 3: 14.0}}}
    here = describe(torch.device("cpu"))
    costs = write_costs(tmp_path / "costs.json", {1: 10.0}, one, report["target"], hardware=here)
    assert verify("--step_costs", costs, "--against", tmp_path / "other.json") == 0
    shown = capsys.readouterr().out
    # 3, 2 and 1 of 4 drafts were accepted so far: 1.75 / 1.2, 2.25 / 1.3, 2.5 / 1.4.
    assert "Best: eagle3 of 400, K 3: 1.79 times." in shown and "step_costs --base-path" not in shown
    (choice,) = json.loads((tmp_path / "report.json").read_text())["serving"]["batches"]
    assert choice["speedup"] == pytest.approx(2.5 / 1.4) and len(choice["curves"]) == 2
    # Before an engine starts, what is known then; behind it, the rest, and the report is there.
    (tmp_path / "report.json").unlink()
    assert verify("--step_costs", costs, "--dtype", "bfloat16") == 2
    assert "dtype is float32 there and bfloat16 here" in " ".join(capsys.readouterr().err.split())
    assert verify("--step_costs", costs, "--tensor_parallel_size", 2) == 2
    assert verify("--against", tmp_path / "other.json") == 2
    assert not (tmp_path / "report.json").exists()
    capsys.readouterr()
    write_costs(costs, {1: 10.0}, one, report["target"])
    assert verify("--step_costs", costs) == 2
    assert "hardware is a machine there and cpu " in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "report.json").exists()
    write_costs(costs, {1: 10.0}, one, report["target"], hardware=here, device="another", dtype="bfloat16", vllm="0.1")
    assert verify("--step_costs", costs) == 2
    assert "vllm is 0.1 there and 0.32.0 here; device is another there and cpu here" in " ".join(
        capsys.readouterr().err.split()
    )
    assert "serving" not in json.loads((tmp_path / "report.json").read_text())
    write_costs(costs, {1: 10.0}, one, "all-of-another")
    assert verify("--step_costs", costs) == 2
    assert "is of another model" in " ".join(capsys.readouterr().err.split())


def test_an_unknown_shape_is_refused_before_an_engine_starts(tmp_path, monkeypatch, capsys) -> None:
    target, draft = write_pair(tmp_path, Shape())
    exported = export(target, draft, tmp_path / "export", "v1")["v1"]
    asked = engines(monkeypatch, RESULT, RESULT)
    named = Identity(target, Weights(target)).current
    here = describe(torch.device("cpu"))
    costs = write_costs(tmp_path / "costs.json", {1: 10.0}, {shape(): {1: {1: 12.0}}}, named, hardware=here)
    words = ["--base-path", target, "--draft-path", exported, "--num_prompts", 2, "--step_costs", costs]
    assert run(lambda: verify_vllm.main([str(word) for word in words])) == 2
    assert "does not say what a draft like this costs: eagle1, 512 tokens" in " ".join(capsys.readouterr().err.split())
    assert not asked
