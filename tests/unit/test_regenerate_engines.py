"""What answers: requests and their tries, a server's words, an engine of our own, our own decoding."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from email.utils import formatdate
from pathlib import Path

import psutil
import pytest
import torch

from eagle.decode.generate import generate_alone
from eagle.decode.sampling import Sampling
from eagle.decode.target import load_target
from eagle.errors import RequestError, WorkError
from eagle.regenerate import own_server as own_servers
from eagle.regenerate import transport
from eagle.regenerate.address import Address, proxy_to
from eagle.regenerate.dialogue import FROM_TEXT
from eagle.regenerate.engine_args import deciding
from eagle.regenerate.journal import FILTERED, LENGTH, STOP
from eagle.regenerate.own import OwnTarget
from eagle.regenerate.own_server import own_server, vllm_python
from eagle.regenerate.request import RegenerateRequest
from eagle.regenerate.served import Counted, Question, ServedTarget, cure, is_too_long
from eagle.regenerate.transport import Failed, Refused, Servers, _said
from eagle.vllm.engine import EngineError
from tests.families import make_row, row_named
from tests.serving import FakeServer, Fault, runs, write_stand_in
from tests.tiny import make_target
from tests.unit.test_regenerate_parts import KEEPS, encoder_with


def servers(*urls: str, retries: int = 3, timeout: float = 5.0, max_outage: float = 5.0) -> Servers:
    return Servers([Address(url) for url in urls], timeout, retries, max_outage, first_wait=0.01)


BODY = {"model": "target", "prompt": [5, 6], "max_tokens": 9}


def test_retry_after_is_heeded_as_seconds_and_as_a_date():
    encoder = encoder_with(KEEPS)
    for as_date in (False, True):
        value = formatdate(time.time() + 2, usegmt=True) if as_date else "1"  # a date has whole seconds
        fault = Fault(429, {"error": "slow"}, {"Retry-After": value})
        with FakeServer(encoder, fault=lambda number, body, fault=fault: None if number else fault) as server:
            began = time.monotonic()
            asked = servers(server.url)
            assert asked.call("/completions", BODY)["choices"]
            assert 0.9 < time.monotonic() - began < 4 and asked.retried == {"429": 1}


def test_a_slow_server_is_asked_again_and_a_dead_one_given_up():
    encoder = encoder_with(KEEPS)
    with FakeServer(encoder, seconds=0.4) as server:
        asked = servers(server.url, timeout=0.1, retries=1, max_outage=0.05)
        with pytest.raises(WorkError, match=r"no answer within 0.1 s .*\(2 tries"):
            asked.call("/completions", BODY)
        assert asked.retried == {"timeout": 1}
    with pytest.raises(WorkError, match="Connection refused"):
        servers(server.url).call("/models", retries=1)
    with pytest.raises(WorkError, match=r"Connection refused.*--max_outage"):
        servers(server.url, max_outage=0.05).call("/models")


def test_tries_come_ever_later_and_never_at_the_same_moment():
    asked, waits = servers("http://h/v1"), []
    asked.first_wait = 1.0
    asked.stop.wait = waits.append  # type: ignore[method-assign, assignment]
    for tries in (1, 2, 3, 4, 9):
        asked._wait(asked.addresses[0], "500", tries, None, is_named=True)
    assert all(0.5 * most <= wait <= most for wait, most in zip(waits, (1, 2, 4, 8, 60), strict=True))
    assert len(set(waits)) == 5


def test_one_that_fails_while_others_are_answered_fails_alone():
    encoder = encoder_with(KEEPS)
    with FakeServer(encoder, fault=lambda n, body: Fault(500, "bad") if body["prompt"] == [7] else None) as server:
        asked, over = servers(server.url), threading.Event()

        def others() -> None:
            while not over.is_set():
                asked.call("/completions", BODY)

        thread = threading.Thread(target=others)
        thread.start()
        try:
            with pytest.raises(Failed, match="500: bad"):
                asked.call("/completions", {**BODY, "prompt": [7]})
        finally:
            over.set()
            thread.join()


def test_where_one_of_two_rests_the_other_is_asked():
    asked = servers("http://127.0.0.1:9/v1", "http://h/v1")
    asked.addresses[0].rests_until = time.monotonic() + 60
    assert {asked._choose(None).url for _ in range(5)} == {"http://h/v1"}
    asked.addresses[0].rests_until = 0.0
    assert asked._choose(None).url == "http://127.0.0.1:9/v1"


@pytest.mark.parametrize(
    ("message", "finish", "expected"),
    [
        ({"content": "yes"}, "stop", (STOP, "yes")),
        ({"content": "yes", "reasoning_content": "hm"}, "stop", (STOP, "<think>\nhm\n</think>\n\nyes")),
        ({"content": "yes", "thinking": "hm"}, "stop", (STOP, "<think>\nhm\n</think>\n\nyes")),
        ({"content": "<think>hm</think>yes", "reasoning": "hm"}, "stop", (STOP, "<think>hm</think>yes")),
        ({"content": "hm\n</think>\n\nyes", "reasoning": "hm"}, "stop", (STOP, "hm\n</think>\n\nyes")),
        ({"content": "say </think>", "reasoning": "hm"}, "stop", (STOP, "<think>\nhm\n</think>\n\nsay </think>")),
        ({"content": None}, "stop", (STOP, "")),
        ({"content": "ye"}, "length", (LENGTH, "ye")),
        ({"content": "half \ud83d"}, "stop", (STOP, "half \ufffd")),
        ({"content": "no"}, "content_filter", (FILTERED, "no")),
        ({"content": "y"}, None, (STOP, "y")),
        ({"content": "y"}, "eos_token", (STOP, "y")),
        ({"content": "no no no"}, "repetition", (LENGTH, "no no no")),
        ({"content": "", "refusal": "I will not"}, "stop", (FILTERED, "")),
        ({"content": None, "reasoning_content": "hm\n"}, "length", (LENGTH, "<think>\nhm")),
        ({"content": "", "reasoning": "hm"}, "repetition", (LENGTH, "<think>\nhm")),
        ({"content": "ye", "thinking": "hm"}, "length", (LENGTH, "<think>\nhm\n</think>\n\nye")),
    ],
)
def test_what_a_server_says_in_words(message, finish, expected):
    served = ServedTarget(servers("http://h/v1"), "m", FROM_TEXT, 100, Sampling(), [], {})
    answer = {"choices": [{"message": message, "finish_reason": finish}], "usage": None}
    said = served._read(answer, [], 99)
    assert (said.finish, said.text) == expected and said.ids is None and said.context is None
    # As long as it may be is cut off, whatever the server calls that; shorter than that for no reason, by its context.
    said = served._read({**answer, "usage": {"completion_tokens": 99}}, [], 99)
    assert said.finish == (FILTERED if expected[0] == FILTERED else LENGTH)
    said = served._read({**answer, "usage": {"completion_tokens": 9}}, [], 99)
    assert (said.finish, said.context) == (expected[0], 0 if finish == "length" else None)


def test_reasoning_that_ends_without_an_answer_is_an_empty_reply():
    """Whether the model ended its reasoning before it ended its turn, the text does not tell."""
    served = ServedTarget(servers("http://h/v1"), "m", FROM_TEXT, 100, Sampling(), [], {})
    for content in (None, "", "\n\n"):
        message = {"content": content, "reasoning_content": "hm"}
        said = served._read({"choices": [{"message": message, "finish_reason": "stop"}]}, [], 99)
        assert (said.finish, said.text.strip()) == (STOP, "")


TGI = "Input validation error: `inputs`"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"error": f"{TGI} must have less than 1024 tokens. Given: 2000", "error_type": "validation"}, True),
        ({"error": f"{TGI} tokens + `max_new_tokens` must be <= 2048. Given: 1500 `inputs` tokens and 1024"}, True),
        ({"error": {"message": "the request exceeds the available context size, try increasing it"}}, True),
        ({"error": {"message": "no", "type": "exceed_context_size_error"}}, True),
        ({"error": {"message": "Your messages exceed context window", "code": "x"}}, True),
        ({"message": "'max_tokens' is too large: 5000. This model's maximum context length is 4096 tokens"}, True),
        ({"message": "The input (5000 tokens) is longer than the model's context length (4096 tokens)."}, True),
        ({"error": {"message": "prompt is too long: 5000 tokens > 4096 maximum"}}, True),
        ({"error": {"message": "max_tokens: value 1024 exceeds the maximum output tokens"}}, False),
        ({"error": {"message": "max_tokens is too large: 9. This model supports at most 8 completion tokens"}}, False),
        ({"error": {"message": "Invalid request: 1024 exceeds the limit of output tokens"}}, False),
        ({"error": {"message": "top_p exceeds 1"}}, False),
    ],
)
def test_a_prompt_is_too_long_in_the_words_of_many_servers(content, expected):
    said, codes = _said(json.dumps(content).encode())
    refused = Refused("http://h/v1", 422, said, codes)
    assert is_too_long(refused) == expected
    assert is_too_long(Refused("http://h/v1", 500, said, codes)) is False
    assert ("Lower --max_new_tokens" in cure(refused)) == ("output" in said or "completion" in said)


@pytest.mark.parametrize(
    ("said", "context"),
    [
        ("This model's maximum context length is 4,096 tokens.", 4096),
        ("the model's context length (4096 tokens)", 4096),
        (f"{TGI} tokens + `max_new_tokens` must be <= 2048. Given: 1500", 2048),
        ("exceeds the context window by 120 tokens", 9999),
        (f"{TGI} must have less than 1024 tokens. Given: 2000", 9999),
    ],
)
def test_the_context_that_a_refusal_tells(said, context):
    served = ServedTarget(servers("http://h/v1"), "m", FROM_TEXT, 9999, Sampling(), [], {}, says_context=False)
    assert served._learn_context(Refused("u", 400, said)) == served.context == context


def test_how_many_tokens_a_server_counts_in_a_prompt():
    assert Counted().least(50) == 0
    assert Counted(((11, 10), (21, 20), (64, 200))).least(100) == 93  # the last one was cut down
    assert 60 < Counted(((9, 10), (18, 20), (80, 100))).least(100) < 85  # another tokenizer


def test_429s_come_ever_later_and_have_an_end():
    """While others are answered they cost nothing; where a short question is answered and this one is not, they do."""
    encoder = encoder_with(KEEPS)
    slow = Fault(429, {"error": {"message": "Request too large for tokens per minute", "type": "tokens"}})
    waits: list[int] = []

    class AnswersOthers(Servers):
        def _wait(self, address, kind, failures, asked, *, is_named) -> None:
            waits.append(failures)
            if len(waits) < 12:
                self._answered = time.monotonic()

    with FakeServer(encoder, fault=lambda number, body: slow) as server:
        asked = AnswersOthers([Address(server.url)], 5.0, 3)
        asked.short = "/completions", {**BODY, "max_tokens": 1}
        with pytest.raises(Failed, match="429: Request too large"):
            asked.call("/completions", BODY)
        assert waits == list(range(1, len(waits) + 1)) and len(waits) == 11 + asked.retries
        used_up = Fault(429, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}})
        server.fault = lambda number, body: used_up
        with pytest.raises(Refused) as refused:
            asked.call("/completions", BODY)
        assert "account is used up" in cure(refused.value)


def test_everybody_waits_while_nobody_is_answered_and_that_is_said(monkeypatch):
    monkeypatch.setattr(transport, "_SILENT", 0.05)
    asked, told = servers("http://127.0.0.1:9/v1", max_outage=0.4), []
    asked.tell = told.append
    with pytest.raises(WorkError, match="Connection refused"):
        asked.call("/completions", BODY)
    (line,) = told
    assert "nobody has been answered for" in line and "(--max_outage)" in line


def test_a_connection_that_does_not_come_about_is_not_waited_for_as_a_reply_is(monkeypatch):
    timeouts = []

    def create(address, timeout, *more):
        timeouts.append(timeout)
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", create)
    with pytest.raises(WorkError, match="no connection within 10 s"):
        servers("http://h/v1", timeout=600, retries=0).call("/completions", BODY)
    assert timeouts == [10]


def test_a_redirection_is_no_answer():
    moved = Fault(307, "", {"Location": "https://h/v1/completions"})
    with FakeServer(encoder_with(KEEPS), fault=lambda number, body: moved) as server:
        with pytest.raises(Refused, match="answered 307: it leads to https://h/v1/completions") as refused:
            servers(server.url).call("/completions", BODY)
        assert "name the address behind it" in cure(refused.value)


def test_proxies_are_those_of_the_environment(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert proxy_to("http://far.example/v1") is None
    with FakeServer(encoder_with(KEEPS)) as server:
        monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1").replace("//", "//me:s%40id@"))
        monkeypatch.setenv("no_proxy", "near.example")
        for url in ("http://near.example/v1", "http://127.0.0.1:8000/v1", "http://localhost/v1", "https://far.example"):
            assert proxy_to(url) is None
        far = Address("http://far.example:8000/v1", proxy=proxy_to("http://far.example:8000/v1"))
        assert far.call("/models", None, 5)[0] == 404
        assert set(server.paths) == {"http://far.example:8000/v1/models"}
        assert server.headers[0]["Proxy-Authorization"] == "Basic bWU6c0BpZA=="
        assert server.headers[0]["Host"] == "far.example:8000" and "s%40id" not in repr(far) + far.way
    monkeypatch.setenv("https_proxy", "socks5://me:secret@h:1")
    with pytest.raises(RequestError, match=r"names h:1 as the proxy .* add far.example to no_proxy"):
        proxy_to("https://far.example/v1")


def test_flags_of_vllm_that_decide_replies_are_compared():
    given = "--quantization=fp8 --gpu_memory_utilization 0.9 -tp 2 --no-enable-prefix-caching --compilation-config.x 1"
    assert deciding(given) == ["--quantization fp8"] == deciding("--max-model-len 9 --quantization fp8")
    assert deciding("--seed -1 --enable-lora") == ["--enable-lora", "--seed -1"] and deciding(None) == []


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A vLLM in name only, on the path of child processes; the file it writes when it is up."""
    for name, value in write_stand_in(tmp_path).items():
        monkeypatch.setenv(name, value)
    return tmp_path / "says"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are looked for in /proc")
def test_an_engine_of_our_own_ends_with_the_job(stand_in, target, tmp_path, monkeypatch):
    (tmp_path / "d.json").write_text("[]")
    given = {"engine_python": Path(sys.executable), "concurrency": 7}
    monkeypatch.setenv("VLLM_API_KEY", "secret")  # which it would want, did it know of it
    monkeypatch.setattr(own_servers, "_STARTS_WITHIN", 30)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    asked = RegenerateRequest(
        target, tmp_path / "d.json", tmp_path / "o.json", engine_args="--seed 3 --x '4 5'", **given
    )
    python = vllm_python(asked)
    assert python == Path(sys.executable).absolute()
    with pytest.raises(KeyError), own_server(asked, encoder_with(KEEPS), python, torch.bfloat16) as address:
        assert address.call("/models", None, 5)[0] == 200
        address.check()
        assert not list(tmp_path.glob("eagle-vllm-*"))
        said = stand_in.read_text().split()
        assert said[-6:] == ["bfloat16", "--seed", "3", "--x", "4", "5"] and "7" in said and runs(int(said[1]))
        raise KeyError
    assert not runs(int(said[1]))
    wrong = dataclasses.replace(asked, engine_args="--max-model-len 1")
    with pytest.raises(EngineError, match=r"ended by itself.*\n.*ValueError: too short for anything"):
        own_server(wrong, encoder_with(KEEPS), python, torch.bfloat16).__enter__()
    wants = dataclasses.replace(asked, engine_args="--wants-a-key 1")
    with pytest.raises(EngineError, match="answers 401 where it is asked"):
        own_server(wants, encoder_with(KEEPS), python, torch.bfloat16).__enter__()
    with own_server(asked, encoder_with(KEEPS), python, torch.bfloat16) as address:  # one that dies while it is asked
        os.kill(int(stand_in.read_text().split()[1]), signal.SIGKILL)
        with pytest.raises(EngineError, match="exit code -9"):
            Servers([address], 5.0, 8, first_wait=0.05).call("/completions", BODY)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("own") / "target", "qwen2", hidden=16, layers=2)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 300, (length,), generator=generator).tolist() for length in (3, 17, 9, 30, 4)]


def own(target: Path, sampling: Sampling, stop: list[int]) -> OwnTarget:
    return OwnTarget(target, torch.float32, torch.device("cpu"), 8, 4096, sampling, stop)


def test_our_own_batches_say_what_the_target_says_by_itself(target):
    alone = load_target(target, torch.float32, torch.device("cpu"))
    plain = [generate_alone(alone, prompt, 12, Sampling()).tokens for prompt in prompts()]
    stop = [plain[0][3], plain[1][7]]
    engine = own(target, Sampling(), stop)
    said = engine.decode([Question([], prompt, 12 - at, 0) for at, prompt in enumerate(prompts())])
    for at, (prompt, reply) in enumerate(zip(prompts(), said, strict=True)):
        expected = generate_alone(alone, prompt, 12 - at, Sampling(), stop).tokens
        assert reply.ids == expected
        assert reply.finish == (STOP if expected[-1] in stop else LENGTH)
    assert {reply.finish for reply in said} == {STOP, LENGTH}
    engine.stop()


def test_a_sampled_reply_depends_on_its_own_seed_alone(target):
    engine = own(target, Sampling(temperature=1.0, top_k=50, top_p=0.9), [])
    questions = [Question([], prompt, 8, seed) for seed, prompt in enumerate(prompts())]
    together = [said.ids for said in engine.decode(questions)]
    apart = [engine.decode([question])[0].ids for question in questions]
    assert together == apart
    assert engine.decode([dataclasses.replace(questions[0], seed=99)])[0].ids != apart[0]
    engine.stop()


@pytest.mark.skipif(not row_named("phi3-longrope").is_known_here(), reason="this transformers computes it otherwise")
def test_a_batch_may_grow_past_the_original_context(tmp_path):
    """Of longrope, where Phi-3's class would forget its cache; every reply is what it is alone."""
    folder = make_row(tmp_path / "phi3", row_named("phi3-longrope"))
    raw = json.loads((folder / "config.json").read_text())
    for rope in (raw, *(raw[key] for key in ("rope_parameters", "rope_scaling") if raw.get(key))):
        if rope.get("original_max_position_embeddings"):
            rope["original_max_position_embeddings"] = 16
    (folder / "config.json").write_text(json.dumps(raw))
    alone = load_target(folder, torch.float32, torch.device("cpu"))
    few = [prompt for prompt in prompts() if len(prompt) < 16]
    plain = [generate_alone(alone, prompt, 24, Sampling()).tokens for prompt in few]
    engine = own(folder, Sampling(), [])
    assert [said.ids for said in engine.decode([Question([], prompt, 24, 0) for prompt in few])] == plain
    engine.stop()


def test_those_that_ask_at_the_same_time_are_decoded_together(target, monkeypatch):
    engine, sizes = own(target, Sampling(), []), []
    decode = engine.decode
    monkeypatch.setattr(engine, "decode", lambda questions: sizes.append(len(questions)) or decode(questions))
    found: dict[int, object] = {}

    def ask(number: int, prompt: list[int]) -> None:
        found[number] = engine.ask(Question([], prompt, 3, 0))

    threads = [threading.Thread(target=ask, args=entry) for entry in enumerate(prompts())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 5 and max(sizes) > 1
    engine.stop()


def test_a_batch_that_does_not_fit_says_what_to_lower(target, monkeypatch):
    engine = own(target, Sampling(), [])

    def decode(questions):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")  # what older torch raises

    monkeypatch.setattr(engine, "decode", decode)
    with pytest.raises(
        WorkError, match=r"1 prompts at once, .* do not fit the memory of cpu.*--concurrency \(it was 8\)"
    ):
        engine.ask(Question([], [3, 4], 3, 0))
    engine.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="names of processes and their cores")
def test_on_few_cores_the_scheduler_gives_way_to_the_worker(monkeypatch):
    """It spins while it waits, on a core that the worker could compute on."""
    sleeps = "import time; time.sleep(60)"
    renamed = f"open('/proc/self/comm', 'w').write('VLLM::EngineCore'); {sleeps}"
    parent = f"import subprocess, sys; [subprocess.Popen([sys.executable, '-c', it]) for it in sys.argv[1:]]; {sleeps}"
    own = os.nice(0)
    with subprocess.Popen([sys.executable, "-c", parent, renamed, sleeps]) as process:
        try:

            def children() -> dict[str, psutil.Process]:
                return {child.name(): child for child in psutil.Process(process.pid).children()}

            ends = time.monotonic() + 30
            while not (len(children()) == 2 and any(name.startswith("VLLM") for name in children())):
                assert time.monotonic() < ends
                time.sleep(0.02)
            monkeypatch.setattr(own_servers, "cores", lambda: 64)
            own_servers._give_way(process)
            assert {child.nice() for child in children().values()} == {own}
            monkeypatch.setattr(own_servers, "cores", lambda: 2)
            own_servers._give_way(process)
            assert {name.startswith("VLLM"): child.nice() for name, child in children().items()} == {
                True: 19,
                False: own,
            }
        finally:
            for child in psutil.Process(process.pid).children():
                child.kill()
            process.kill()
