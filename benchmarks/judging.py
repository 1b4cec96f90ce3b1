"""Drafts judged by what is accepted of them on prompts that nothing was trained on, for the benchmarks that train some.

By our own decoding, or with a python of an environment with vLLM by vLLM's own counts and speed. A judgement that is
there is not made again.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.common import ROOT
from eagle import child
from eagle.data.prompts import DEFAULT_PROMPTS
from eagle.device import describe
from eagle.drafts.saved import resolve_pointer
from eagle.entry import child_environment
from eagle.errors import RequestError, WorkError
from eagle.files import existing_path, read_json
from eagle.generate.engine_check import ask_python
from eagle.versions import release

#: Files of a base model that decide which tokens a prompt is and where a reply ends.
_DECIDING = ("*token*", "vocab*", "merges*", "chat_template*", "generation_config*")


def call(words: Sequence[object], log: Path) -> None:
    """Run a command of this project; what it says goes to `log`. Raises: WorkError with the end of that."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        code = child.run(
            list(map(str, words)), cwd=ROOT, env=child_environment(), stdout=file, stderr=subprocess.STDOUT
        )
    if code:
        said = log.read_text(encoding="utf-8", errors="replace")[-2000:]  # it may have ended within a character
        raise WorkError(f"{' '.join(map(str, words))} ended with {code}:\n{said}")


@functools.cache
def vllm_of(engine_python: Path) -> str:
    """The version of the vLLM in that python's environment. Raises: RequestError where there is none."""
    version = ask_python(engine_python)["version"]
    if version is None:
        raise RequestError(
            f"--engine_python {engine_python}: there is no vLLM in that environment. Name one with vLLM."
        )
    return version


def verified(engine_python: Path, basepath: Path, draft: Path, found: Path, *more: object) -> dict:
    """The report of `eagle.vllm.verify` in that file, made where it is not there; its words lie beside it.

    Raises: WorkError with what it said where it fails; RequestError where the one that is there is another vLLM's.
    """
    here = vllm_of(engine_python)
    if not found.is_file():
        words: list[object] = [engine_python, "-m", "eagle.vllm.verify", "--base-path", basepath]
        written = found.with_suffix(".tmp")  # verify writes one of a failure too, and overwrites none
        written.unlink(missing_ok=True)
        call([*words, "--draft-path", draft, *more, "--output", written], found.with_suffix(".log"))
        written.replace(found)
    report = read_json(found, "the report")
    if release(report["vllm"]) != release(here):
        raise RequestError(
            f"{found} was measured with vLLM {report['vllm']}, and --engine_python has {here}. Name another --workdir, "
            "or the python of that one."
        )
    return report


def prompts_key(base: Path, prompts: Path | None) -> str:
    """Of the prompts (None: those that ship), and of what decides which tokens they are."""
    found = hashlib.sha256((prompts or DEFAULT_PROMPTS).read_bytes())
    for file in sorted({file for name in _DECIDING for file in base.glob(name)}):
        if file.is_file():
            found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()[:6]


def engine_of(report: dict) -> str:
    return f"vLLM {report['vllm']} on {report['device']}"


def check_one_engine(reports: list[dict], where: str) -> None:
    """reports: of verify, in `where`. Raises: RequestError where not all of them are of the same engine."""
    engines = sorted(set(map(engine_of, reports)))
    if len(engines) > 1:
        raise RequestError(
            f"{where} holds runs of {' and of '.join(engines)}, which are not to be mixed. Name another."
        )


def judgements(cpdir: Path) -> Path:
    """The folder of what was judged of a trained run, beside it: of the very weights that it exports."""
    weights = (resolve_pointer(cpdir) / "model.safetensors").read_bytes()
    return cpdir.with_name(f"{cpdir.name}-judged") / hashlib.sha256(weights).hexdigest()[:8]


@dataclass(frozen=True, slots=True)
class Judge:
    """basepath: the base model. engine_python: who counts, None for our own decoding. reports: the engine's, so far.
    The rest is said by `add_to`."""

    basepath: Path
    num_draft_tokens: int
    prompts: Path | None
    num_prompts: int | None
    max_new_tokens: int
    engine_python: Path | None
    reports: list[dict] = field(default_factory=list)

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--num_draft_tokens", type=int, default=5, help="length of the chain")
        add("--prompts", type=Path, help="the prompts to judge on, such as tools/held_out_prompts.py's (default: those "
            "that ship)")  # fmt: skip
        add("--num_prompts", type=int, help="judge on the first so many of them (default: all)")
        add("--max_new_tokens", type=int, default=128, help="length of a reply")
        add("--engine_python", type=Path, help="python of an environment with vLLM, which then counts")

    @classmethod
    def of(cls, args: argparse.Namespace) -> Judge:
        # Not resolved: the python of an environment is a link to another one's.
        python = args.engine_python.absolute() if args.engine_python else None
        prompts = existing_path(args.prompts, "--prompts", "file").resolve() if args.prompts else None
        return cls(args.basepath, args.num_draft_tokens, prompts, args.num_prompts, args.max_new_tokens, python)

    def accepted(self, cpdir: Path) -> list[float]:
        """Shares of the verifications that accepted a first, second, ... token of a trained run's chains."""
        if self.engine_python is not None:  # several replies at once: what is counted is the same but for rounding
            more = ["--no_baseline", "--batch_size", 8]
            return self.served(cpdir, self.num_draft_tokens, "counted", more)["accepted_per_position"]
        report = judgements(cpdir) / f"decoded-{self._named(self.num_draft_tokens)}"
        if not (report / "report.json").is_file():
            words: list[object] = [sys.executable, "-m", "eagle.evaluate", "--base-path", self.basepath]
            words += ["--draft-path", cpdir, "--num_draft_tokens", self.num_draft_tokens, "--num_turns", 1]
            words += ["--no_baseline", "--output", report, "--overwrite"]
            call([*words, *self._prompts()], report.with_name(f"{report.name}.log"))
        return read_json(report / "report.json", "the report")["accepted_per_position"]

    @property
    def engine(self) -> str | None:
        """Who has counted, None for nobody or our own decoding."""
        return next((engine_of(report) for report in self.reports), None)

    def served(self, cpdir: Path, k: int, kind: str = "timed", more: Sequence[object] = ()) -> dict:
        """What `eagle.vllm.verify` measured of a trained run with chains of k tokens, with these options more.

        verify fails a draft of which nothing is accepted, which here is a judgement like any other.

        Raises: RequestError where the work folder holds what another engine said.
        """
        assert self.engine_python is not None
        place, machine = judgements(cpdir), describe(torch.device("cpu"))
        named = self._named(k) + (f"-{hashlib.sha256(machine.encode()).hexdigest()[:6]}" if kind == "timed" else "")
        exported, found = place / "draft", place / f"{kind}-{named}.json"
        if not found.is_file() and not any(exported.glob("[!.]*/config.json")):
            shutil.rmtree(exported, ignore_errors=True)
            words: list[object] = [sys.executable, "convert_eagle_ckpt_to_vllm_compatible.py"]
            words += ["--base-path", self.basepath, "--draft-path", cpdir, "--output-path", exported]
            call(words, place / "draft.log")
        asked = [*self._prompts(), *more]
        try:
            report = verified(self.engine_python, self.basepath, exported, found, "--num_speculative_tokens", k, *asked)
        except WorkError:
            written = found.with_suffix(".tmp")
            report = read_json(written, "the report") if written.is_file() else {}
            if not report.get("drafted_tokens") or report.get("accepted_tokens"):
                raise
            written.replace(found)
        self.reports.append(report)
        check_one_engine(self.reports, f"--workdir {place.parent.parent}")
        return report

    def _named(self, k: int) -> str:
        """Of a judgement: another is made for other prompts, by what they say, and for another template."""
        which = prompts_key(self.basepath, self.prompts)
        return f"k{k}-{self.num_prompts or 'all'}-{self.max_new_tokens}-{which}"

    def _prompts(self) -> list[object]:
        words: list[object] = ["--max_new_tokens", self.max_new_tokens]
        words += ["--prompts", self.prompts] if self.prompts else []
        return words + (["--num_prompts", self.num_prompts] if self.num_prompts else [])


def taus(accepted: Sequence[float]) -> list[float]:
    """τ of chains of 1, 2, ... tokens: a chain of K gets as far as the first K positions of a longer one."""
    return [1 + total for total in itertools.accumulate(accepted)]
