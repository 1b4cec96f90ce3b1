"""Several small engines one after the other in one child process: importing vLLM costs more than the engines do.

The child is ``python -m tests.vllm.engines REQUESTS.json RESULTS.json``.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

from eagle.vllm.engine import ENVIRONMENT, EngineRequest, EngineResult, last_words, serve

ROOT = Path(__file__).resolve().parents[2]

#: The engine in the child itself, whose memory the next one reuses.
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def run_child(module: str, folder: Path, content: object) -> object:
    """Run ``python -m module asked answered`` with `content` as JSON; returns its answer. Fails with its last words."""
    asked, answered = folder / "asked.json", folder / "answered.json"
    asked.write_text(json.dumps(content), encoding="utf-8")
    child = subprocess.run(
        [sys.executable, "-m", module, str(asked), str(answered)],
        cwd=ROOT,
        env={**ENVIRONMENT, **os.environ, **IN_PROCESS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert child.returncode == 0, f"{module} failed:\n{last_words(child.stdout)}"
    return json.loads(answered.read_text(encoding="utf-8"))


def run_engines(requests: list[EngineRequest], folder: Path) -> list[EngineResult]:
    """The results of the requests, in order."""
    answers = run_child("tests.vllm.engines", folder, [dataclasses.asdict(request) for request in requests])
    return [EngineResult(**answer) for answer in answers]


def main(argv: list[str]) -> int:
    from vllm.distributed import cleanup_dist_env_and_memory

    asked, answered = (Path(argument) for argument in argv)
    results = []
    for request in json.loads(asked.read_text(encoding="utf-8")):
        results.append(dataclasses.asdict(serve(EngineRequest(**request))))
        gc.collect()
        cleanup_dist_env_and_memory()
    answered.write_text(json.dumps(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
