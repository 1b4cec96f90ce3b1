"""What ``tools/regenerate.py`` was asked for, checked as far as that can be by itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle.data.reader import existing_records, refuse_to_change
from eagle.decode.sampling import Sampling
from eagle.dtypes import DTYPES
from eagle.errors import RequestError
from eagle.files import check_output_file, existing_path
from eagle.regenerate.address import check_url, normal_url
from eagle.regenerate.engine_args import check_engine_args

ENGINES = ("auto", "vllm", "own")
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class RegenerateRequest:
    """The options of ``tools/regenerate.py``. concurrency: requests at once, or of our own decoding a batch."""

    model_name: Path
    data_path: Path
    output: Path
    server: tuple[str, ...] = ()
    served_model: str | None = None
    engine: str = AUTO
    engine_python: Path | None = None
    engine_args: str | None = None
    end_num: int | None = None
    seed: int = 42
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 1024
    concurrency: int = 100
    retries: int = 8
    max_outage: float = 1800.0
    timeout: float = 600.0
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    dtype: str = AUTO
    device: str = AUTO
    allow_truncated: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "concurrency", "end_num"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"--{name} {value}: expected 1 or more.")
        if self.retries < 0:
            raise RequestError(f"--retries {self.retries}: expected 0 or more.")
        if not 0 <= self.max_outage < float("inf"):
            raise RequestError(f"--max_outage {self.max_outage:g}: expected a number of seconds, 0 or more.")
        if not 0 < self.timeout < float("inf"):
            raise RequestError(f"--timeout {self.timeout:g}: expected a number of seconds above 0.")
        if self.engine not in ENGINES:
            raise RequestError(f"--engine {self.engine}: expected one of {', '.join(ENGINES)}.")
        if self.dtype not in (AUTO, *DTYPES):
            raise RequestError(f"--dtype {self.dtype}: expected one of {', '.join((AUTO, *DTYPES))}.")
        _ = self.sampling
        self.check_paths()
        for url in self.server:
            check_url(url)
        if len(set(map(normal_url, self.server))) < len(self.server):
            raise RequestError("--server names one address twice; expected each once. Leave one out.")
        check_engine_args(self.engine_args)

    def check_paths(self) -> None:
        """Raises: FileNotFoundError, RequestError."""
        existing_path(self.model_name, "--model_name", "folder")
        existing_records(self.data_path, "--data_path")
        if self.engine_python is not None:
            existing_path(self.engine_python, "--engine_python", "file")
        if self.output.suffix.lower() not in (".json", ".jsonl"):
            raise RequestError(f"--output {self.output}: expected a name that ends in .json or .jsonl (JSON Lines).")
        check_output_file(self.output, overwrite=True)  # what is there is gone on with, or refused by its journal
        refuse_to_change(self.data_path, "--data_path", self.output)

    @property
    def sampling(self) -> Sampling:
        """Raises: RequestError for a number out of range."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)


def idle_flags(request: RegenerateRequest, kind: str) -> dict[str, str]:
    """Flags that do nothing beside the others, by name: why, and what to do instead.

    kind: what answers, as `eagle.regenerate.job.engine_kind` found it: --engine auto is either.
    """
    idle: dict[str, str] = {}
    if request.server:
        why = "--server names a server that runs already. Leave one of the two out."
        idle = dict.fromkeys(("engine", "engine_python", "engine_args", "dtype", "device"), why)
    else:
        idle["served_model"] = "it is what a server calls the model, and --server names none. Leave it out."
    if kind == "own":
        why = (
            "it is vLLM's, and --engine own decodes without. Leave one of the two out."
            if request.engine == "own"
            else "it is vLLM's, and there is no vLLM here. Name the interpreter of one with --engine_python, or leave "
            "it out."
        )
        idle |= dict.fromkeys(("engine_python", "engine_args", "retries", "max_outage", "timeout"), why)
    if kind == "vllm":
        idle["device"] = "vLLM takes the device that it was built for. Leave it out" + (
            "." if request.engine == "vllm" or request.engine_python else ", or add --engine own to decode without."
        )
    if request.temperature == 0:
        why = "replies are greedy without --temperature. Leave it out, or add --temperature 1."
        idle |= {"top_p": why, "top_k": why}
    return idle
