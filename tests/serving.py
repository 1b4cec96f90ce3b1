"""An OpenAI-compatible server in the test process, with scripted replies and faults, that counts what it is asked.

Its reply to a prompt follows from the prompt's tokens alone, so that any two runs that ask the same are told the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from eagle.data.loss_mask import Encoder
from eagle.data.prompts import encode_messages

WORDS = ["The capital of France is Paris.", "def add(a, b):\n    return a + b", "hello", "naïve 你好", "0123 fox"]


@dataclass(frozen=True, slots=True)
class Fault:
    """What a server does instead of a reply. status 0: it closes the connection without a word."""

    status: int = 0
    said: Any = None
    headers: dict[str, str] = field(default_factory=dict)


def reply_to(prompt: list[int]) -> str:
    digest = hashlib.sha256(str(prompt).encode()).digest()
    return " ".join(WORDS[byte % len(WORDS)] for byte in digest[: 1 + digest[31] % 4])


class _Listening(ThreadingHTTPServer):
    request_queue_size = 256


class FakeServer:
    """A server on loopback. Use it as a context manager.

    encoder: its tokenizer and template. gives_ids: whether it says which tokens a reply is of. reply: text to a
    prompt's tokens. fault: asked before every reply that is no probe, with its number from 0 and the request; None for
    a reply. down: what it does instead of anything, probes among them. limit: tokens that prompt and reply may have
    together; refusal: what it says to more. paths: how often each was asked. headers: of every GET.
    asked: how often it was asked with what, by the tokens of the prompt. seconds: that a reply takes.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        gives_ids: bool = True,
        models: tuple[str, ...] = ("target",),
        max_model_len: int | None = 4096,
        reply: Callable[[list[int]], str] = reply_to,
        fault: Callable[[int, dict[str, Any]], Fault | None] = lambda number, body: None,
        seconds: float = 0.0,
    ) -> None:
        self.encoder, self.gives_ids, self.models, self.max_model_len = encoder, gives_ids, models, max_model_len
        self.reply, self.fault, self.seconds = reply, fault, seconds
        self.asked: Counter[tuple[int, ...]] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.down: Fault | None = None
        self.limit = max_model_len or 4096
        self.refusal = "This model's maximum context length is {} tokens. However, you requested more."
        self.paths: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.at_once = self.most_at_once = self.number = 0
        self.lock = threading.Lock()
        self._server = _Listening(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> FakeServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def told(self, variables: dict[str, Any] | None) -> Encoder:
        own = self.encoder
        return Encoder(own.tokenizer, own.template, "told", variables=variables) if variables else own

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any, dict[str, str]] | None:
        """Status, content and headers; None to hang up."""
        self.paths[path] += 1
        if self.down is not None:
            return (self.down.status, self.down.said, self.down.headers) if self.down.status else None
        if path == "/v1/models":
            return 200, {"data": [{"id": name, "max_model_len": self.max_model_len} for name in self.models]}, {}
        if body.get("model") not in self.models:
            return 404, {"error": {"message": f"The model `{body.get('model')}` does not exist.", "code": 404}}, {}
        if path == "/v1/completions":
            prompt = body["prompt"]
        else:
            with self.lock:
                prompt = encode_messages(body["messages"], self.told(body.get("chat_template_kwargs")))
        if body["max_tokens"] > 1:
            with self.lock:
                number, self.number = self.number, self.number + 1
                self.asked[tuple(prompt)] += 1
                self.bodies.append(body)
            fault = self.fault(number, body)
            time.sleep(self.seconds)
            if fault is not None:
                return (fault.status, fault.said, fault.headers) if fault.status else None
        if len(prompt) + body["max_tokens"] > self.limit:
            return 400, {"error": {"message": self.refusal.format(self.limit), "code": 400}}, {}
        return 200, self._reply(path, body, prompt), {}

    def _reply(self, path: str, body: dict[str, Any], prompt: list[int]) -> dict[str, Any]:
        tokenizer, text = self.encoder.tokenizer, self.reply(prompt)
        with self.lock:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        finish = "stop"
        if len(ids) > body["max_tokens"]:
            ids, finish = ids[: body["max_tokens"]], "length"
            with self.lock:
                text = tokenizer.decode(ids, skip_special_tokens=True)
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        answer: dict[str, Any] = {"choices": [choice], "usage": usage}
        if path == "/v1/completions":
            choice["text"] = text
        else:
            choice["message"] = {"role": "assistant", "content": text}
        if self.gives_ids and body.get("return_token_ids"):
            choice["token_ids"] = ids
            (choice if path == "/v1/completions" else answer)["prompt_token_ids"] = list(prompt)
        return answer

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake.headers.append(dict(self.headers))
                self._say(fake.answer(self.path, {}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    fake.at_once += 1
                    fake.most_at_once = max(fake.most_at_once, fake.at_once)
                try:
                    said = fake.answer(self.path, body)
                finally:
                    with fake.lock:
                        fake.at_once -= 1
                self._say(said)

            def _say(self, said: tuple[int, Any, dict[str, str]] | None) -> None:
                if said is None:
                    self.connection.close()
                    return
                status, content, headers = said
                data = json.dumps(content).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError, ValueError):  # who asked is dead, or was hung up on
                    super().handle()

        return Handler


#: What stands in for vLLM: it lists a model, or dies with words.
STAND_IN = """
import http.server, os, pathlib, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if options.get("--max-model-len") == "1":
    raise ValueError("too short for anything")
pathlib.Path(options["--chat-template"]).read_text()
print("pid", os.getpid(), *sys.argv, file=open(os.environ["STAND_IN_SAYS"], "w"), flush=True)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        time.sleep(1000)

    def do_GET(self):
        self.send_response(401 if os.environ.get("VLLM_API_KEY") or "--wants-a-key" in options else 200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "m"}]}')

http.server.HTTPServer((options["--host"], int(options["--port"])), Handler).serve_forever()
"""


def write_stand_in(folder: Path) -> dict[str, str]:
    """Put it there. Returns the variables with which a child process finds it; when it is up, it writes ``says``."""
    package = folder / "site" / "vllm"
    (package / "entrypoints" / "openai").mkdir(parents=True)
    for module in (package, package / "entrypoints", package / "entrypoints" / "openai"):
        (module / "__init__.py").touch()
    (package / "entrypoints" / "openai" / "api_server.py").write_text(STAND_IN)
    return {"PYTHONPATH": str(folder / "site"), "STAND_IN_SAYS": str(folder / "says")}


def runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
