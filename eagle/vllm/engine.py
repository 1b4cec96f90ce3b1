"""One vLLM engine in its own process: generate greedily from token ids and count what the draft got accepted.

    result = run_engine(EngineRequest(model=..., draft=..., prompts=[[1, 2, 3]]))

The parent starts ``python -m eagle.vllm.engine REQUEST.json RESULT.json``. Only that child imports vLLM, so an engine
that dies takes nobody with it, and its memory is free before the next one starts. Small engines on a CPU may share a
child, one after the other: importing vLLM takes longer than all else they do (`run_engines`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle.child import end_group, end_own_group, end_with_parent
from eagle.drafts.families import DEFAULT_DRAFT, DRAFT_FAMILIES
from eagle.dtypes import DTYPES
from eagle.engines import CPU_CACHE, ENVIRONMENT, last_words
from eagle.entry import child_environment
from eagle.errors import RequestError, WorkError
from eagle.files import ROOT, write_json
from eagle.target.config import ModelConfig
from eagle.vllm.capture import save_watched, watch
from eagle.vllm.serving import AUTO
from eagle.vllm.timing import Timing, time_steps

_COUNTER = "vllm:spec_decode_num_"
#: The engine in the child itself, whose memory the next one there uses again.
_IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
#: How often a parent looks whether a child that runs several engines has finished another one, in seconds.
_LOOK = 0.05
#: Before the files of a child that ends, with the folder of these files, when its stdin closes.
WATCH_STDIN = "--watch_stdin"
#: Seconds that a child has to end itself and what it started.
_ENDS_WITHIN = 10


class EngineError(WorkError):
    """The engine did not start or died. The message ends with its last words."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What one engine is to do.

    prompts: token ids. draft: an exported folder, None to run without one; method: vLLM's name for its family. dtype:
    vLLM's name for it; ``auto`` is the target's own. batch_size: how many prompts it decodes at once. stop_token_ids:
    end a reply; empty lets every reply run to `max_new_tokens`. enforce_eager: without graphs, as always on a CPU.
    warm_up: generate once before the clock and the counters start. model_impl: whose code runs the target.
    least_context: serve at least so long a context. watched: sequences behind which it generates so many tokens
    afterwards, each alone, while what its draft is given is written to `watch_file` (`eagle.vllm.capture`). timing:
    time steps behind the first so many of the prompts in place of answering them (`eagle.vllm.timing`). cache_bytes: of
    keys and values, of one token (`cache_bytes`); on a CPU it is given room for all that it decodes at once.
    """

    model: str
    prompts: list[list[int]]
    draft: str | None = None
    method: str = DRAFT_FAMILIES[DEFAULT_DRAFT].method
    num_speculative_tokens: int = 3
    max_new_tokens: int = 128
    dtype: str = "auto"
    batch_size: int = 1
    tensor_parallel_size: int = 1
    stop_token_ids: list[int] = dataclasses.field(default_factory=list)
    enforce_eager: bool = False
    warm_up: bool = True
    model_impl: str = AUTO
    least_context: int = 0
    watched: list[tuple[list[int], int]] = dataclasses.field(default_factory=list)
    watch_file: str | None = None
    timing: Timing | None = None
    cache_bytes: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.timing, dict):  # as it comes in a file
            object.__setattr__(self, "timing", Timing(**self.timing))

    def max_model_len(self) -> int:
        """The shortest context that holds every prompt, its reply and the tokens drafted past its end."""
        asked = [(prompt, self.max_new_tokens) for prompt in self.prompts] + list(self.watched)
        longest = max(len(prompt) + new for prompt, new in asked)
        return max(longest + self.num_speculative_tokens + 1, self.least_context)

    def cache_gib(self) -> int:
        """Of the key-value cache on a CPU, unless the user says how much; elsewhere vLLM takes what is free."""
        return max(1, math.ceil(self.cache_bytes * self.batch_size * self.max_model_len() / 2**30))


@dataclass(frozen=True, slots=True)
class EngineResult:
    """What one engine did.

    outputs: the token ids of every reply. seconds: generation only, without start and warm-up. drafts: how many chains
    were proposed; accepted_per_position: how many of them had their first, second, ... token accepted. unwatched: why
    what the draft is given could not be seen, where that was asked for. step_ms: of each of the timing's batch sizes.
    """

    outputs: list[list[int]]
    seconds: float
    drafts: int
    drafted: int
    accepted: int
    accepted_per_position: list[int]
    dtype: str
    device: str
    vllm: str
    torch: str
    unwatched: str = ""
    step_ms: list[list[float]] = dataclasses.field(default_factory=list)

    def tokens(self) -> int:
        return sum(len(output) for output in self.outputs)

    def tokens_per_second(self) -> float:
        return self.tokens() / self.seconds

    def acceptance(self) -> float:
        """Accepted of drafted tokens, 0 where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def tau(self) -> float:
        """Tokens per target forward pass: 1 + accepted / drafts."""
        return 1 + self.accepted / self.drafts if self.drafts else 1.0


def dtype_for_engine(named: str) -> str:
    """vLLM's name for what ``--dtype`` says. Raises: RequestError for a dtype that there is not."""
    names = (AUTO, *DTYPES)
    if named not in names:
        raise RequestError(f"--dtype {named}: unknown dtype; expected one of {', '.join(names)}.")
    return named if named == AUTO else str(DTYPES[named]).removeprefix("torch.")


def cache_bytes(config: ModelConfig, dtype: str) -> int:
    """Of the keys and values of one token, in every layer of the target and one of a draft. dtype: the engine's."""
    size = 4 if (config.dtype if dtype == AUTO else dtype) == "float32" else 2
    return 2 * size * (config.num_hidden_layers + 1) * config.num_key_value_heads * config.head_dim


def run_engine(request: EngineRequest) -> EngineResult:
    """Run one engine to its end.

    Raises: EngineError with the engine's last words.
    """
    (result,) = run_engines([request])
    return result


def run_engines(requests: Sequence[EngineRequest], *, in_process: bool = False) -> Iterator[EngineResult]:
    """Run engines to their ends, one after the other in one child; each result as soon as it is there.

    in_process: each engine in the child itself, which several can only be.

    Raises: EngineError with the last words of the engine that failed.
    """
    # Of vLLM's two model runners the one whose proposer can be watched; for the engine that is compared with it too.
    watching = {"VLLM_USE_V2_MODEL_RUNNER": "0"} if any(request.watch_file for request in requests) else {}
    room = {CPU_CACHE: str(max(request.cache_gib() for request in requests))}
    environment = {**ENVIRONMENT, **room, **watching, **child_environment(), **(_IN_PROCESS if in_process else {})}
    with tempfile.TemporaryDirectory(prefix="eagle-vllm-") as name:
        folder = Path(name)
        files = [(folder / f"request-{at}.json", folder / f"result-{at}.json") for at in range(len(requests))]
        for (asked, _), request in zip(files, requests, strict=True):
            write_json(asked, dataclasses.asdict(request))
        log = folder / "log.txt"
        with log.open("wb") as output:
            child = subprocess.Popen(
                [sys.executable, "-m", "eagle.vllm.engine", WATCH_STDIN, *itertools.chain(*files)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for this process, which then ends that one
            )
        try:
            for request, (_, answered) in zip(requests, files, strict=True):
                while not answered.is_file() and child.poll() is None:
                    time.sleep(_LOOK)
                if not answered.is_file():
                    words = last_words(log.read_text(encoding="utf-8", errors="replace"))
                    with_draft = f" with the draft {request.draft}" if request.draft else " without a draft"
                    raise EngineError(
                        f"vLLM did not run{with_draft} (exit code {child.returncode}). Its last words:\n{words}"
                    )
                yield EngineResult(**json.loads(answered.read_text(encoding="utf-8")))
            # All has been answered, however it ends; in order, if it does so in time.
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_ENDS_WITHIN)
        finally:
            assert child.stdin
            child.stdin.close()
            end_group(child, _ENDS_WITHIN)


def serve(request: EngineRequest) -> EngineResult:
    """Build the engine here, in this process, and run the request. Only the child calls it."""
    import torch
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    options: dict[str, Any] = {
        "model": request.model,
        "dtype": request.dtype,
        "max_model_len": request.max_model_len(),
        "max_num_seqs": request.batch_size,
        "tensor_parallel_size": request.tensor_parallel_size,
        "model_impl": request.model_impl,
        "skip_tokenizer_init": True,  # token ids go in and come out
        "disable_log_stats": False,  # or there are no counters
        "seed": 0,
    }
    if request.enforce_eager or current_platform.is_cpu():  # where compiling takes longer than all the rest
        options["enforce_eager"] = True
    if request.draft is not None:
        options["speculative_config"] = {
            "method": request.method,
            "model": request.draft,
            "num_speculative_tokens": request.num_speculative_tokens,
        }
    if request.watched:
        options["worker_extension_cls"] = "eagle.vllm.capture.Watching"
    engine = LLM(**options)

    def sampling_of(max_tokens: int) -> Any:
        return SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            stop_token_ids=request.stop_token_ids or None,
            ignore_eos=not request.stop_token_ids,
            detokenize=False,
        )

    sampling = sampling_of(request.max_new_tokens)
    if request.warm_up:
        # Backwards, so that no prompt finds itself in the prefix cache.
        engine.generate([{"prompt_token_ids": request.prompts[0][::-1]}], sampling, use_tqdm=False)
    before = read_counters(engine)
    start = time.perf_counter()
    answered = [] if request.timing else [{"prompt_token_ids": ids} for ids in request.prompts]
    replies = engine.generate(answered, sampling, use_tqdm=False) if answered else []
    seconds = time.perf_counter() - start
    counted = {name: value - before.get(name, 0) for name, value in read_counters(engine).items()}
    positions = range(request.num_speculative_tokens if request.draft is not None else 0)
    step_ms = time_steps(engine, request.prompts, request.timing, sampling) if request.timing else []
    unwatched = ""
    if request.watched:
        file = Path(str(request.watch_file))
        seen = file.with_name(f"{file.name}.seen")
        try:
            save_watched([watch(engine, sampling_of(new), tokens, seen) for tokens, new in request.watched], file)
        except Exception as error:  # another release's insides; what was counted until then is right
            unwatched = f"{type(error).__name__}: {error}"
    return EngineResult(
        outputs=[list(reply.outputs[0].token_ids) for reply in replies],
        seconds=seconds,
        drafts=counted.get("drafts", 0),
        drafted=counted.get("draft_tokens", 0),
        accepted=counted.get("accepted_tokens", 0),
        accepted_per_position=[counted.get(f"accepted_tokens_per_pos.{position}", 0) for position in positions],
        dtype=str(engine.llm_engine.model_config.dtype).removeprefix("torch."),
        device=current_platform.device_name or current_platform.device_type,
        vllm=vllm.__version__,
        torch=torch.__version__,
        unwatched=unwatched,
        step_ms=step_ms,
    )


def read_counters(engine: Any) -> dict[str, int]:
    """vLLM's speculation counters by what follows ``vllm:spec_decode_num_``, summed over engines."""
    counters: dict[str, int] = {}
    for metric in engine.get_metrics():
        if not metric.name.startswith(_COUNTER):
            continue
        name = metric.name.removeprefix(_COUNTER)
        values = getattr(metric, "values", None)
        named = {name: metric.value} if values is None else {f"{name}.{at}": value for at, value in enumerate(values)}
        for key, value in named.items():
            counters[key] = counters.get(key, 0) + int(value)
    return counters


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    files = [Path(word) for word in words if word != WATCH_STDIN]
    if WATCH_STDIN in words:
        end_with_parent(lambda: _end(files[0].parent))
    pairs = list(zip(files[::2], files[1::2], strict=True))
    for asked, answered in pairs:
        request = EngineRequest(**json.loads(asked.read_text(encoding="utf-8")))
        write_json(answered, dataclasses.asdict(serve(request)))
        if len(pairs) > 1:
            _clean_up()
    return 0


def _end(folder: Path) -> None:
    """The parent is gone and takes away nothing: leave neither its folder nor what vLLM started."""
    shutil.rmtree(folder, ignore_errors=True)
    end_own_group()


def _clean_up() -> None:
    """Give back what an engine in this process held, for the next one."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


# vLLM spawns its workers, which import this module again: they need the package on the path, behind the libraries.
if __name__ == "__main__":
    sys.path.append(str(ROOT))
    sys.exit(main())
