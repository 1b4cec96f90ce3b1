"""Damage the toolkit in one place at a time, as it would fail or be silently wrong on an NPU, and see a test fail.

    python -m tests.npu.planted_faults                    every fault in the list: twenty seconds each
    python -m tests.npu.planted_faults ids-left-on-host loader-thread-without-card
    python -m tests.npu.planted_faults --jobs 2           two at a time

Each fault is planted in a copy of this checkout's files (those git tracks or would track), never in the checkout, and
the cheapest tests that have to notice it are run there. First they are run without a fault, which they have to pass.
Prints a line a fault: the test that caught it and the error it failed by, `MISSED`, or that the line to damage is no
longer there. A test that ends by a name or a module that is not there has not noticed a fault: the damaged line is then
no program. One that hangs has noticed one only where the list says that it hangs. Exit codes: 0 all were caught; 1 one
was not, or the list is out of date.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from eagle.files import ROOT
from tests.cards import shown

STAGES = "tests/npu/test_stages.py"
GENERATION, TRAINING, PAIR, SHARED, DECODING, EAGLE3 = (
    f"{STAGES}::test_{stage}"
    for stage in (
        "generation", "training", "training_on_two_cards", "shared_training_without_a_store", "decoding", "eagle3"
    )
)  # fmt: skip
#: How a test fails where what is planted is no program.
NO_PROGRAM = re.compile(r"^(Syntax|Indentation|Name|UnboundLocal|Import|ModuleNotFound)Error\b")
#: How a test fails that waited for a process to its own limit.
HANGS = re.compile(r"\bTimeoutExpired\b|^Failed: Timeout")
#: Seconds for the tests of one fault: some faults make processes wait for each other.
PATIENCE = 400


@dataclass(frozen=True, slots=True)
class Fault:
    """name: on the command line. text: stands exactly once in the file. instead: what it becomes. tests: must fail.

    error: a regular expression for what they have to fail by. hangs: whether they may also wait without an end.
    """

    name: str
    file: str
    text: str
    instead: str
    tests: str
    error: str = ""
    hangs: bool = False


FAULTS = [
    # ---- step 3
    Fault("ids-left-on-host", "eagle/generate/sources.py", "input_ids = to_card(torch.from_numpy(ids), self.device)",
          "input_ids = torch.from_numpy(ids)", SHARED, "on the same device"),
    Fault("target-on-host", "eagle/generate/worker.py",
          "device.torch_device(kind),", 'torch.device("cpu"),', GENERATION),
    Fault("cards-not-set", "eagle/generate/launch.py",
          "            **worker_variables(job, number),\n", "", GENERATION),
    Fault("cards-unsorted", "eagle/device.py", "cards = sorted(cards, key=int)", "cards = list(cards)", GENERATION),
    Fault("fetching-thread-without-card", "eagle/generate/fetch.py",
          "streams.make_current(next(iter(self._sources.values())).device)", "pass", GENERATION, "no current device"),
    Fault("copy-not-waited-for", "eagle/generate/fetch.py",
          "            end.synchronize()", "            pass", GENERATION, "not close"),
    Fault("finite-check-on-the-host", "eagle/generate/fetch.py", "finite.append(tensor.isfinite().all(-1))",
          "finite.append(tensor.double().sum(-1).isfinite())", GENERATION),
    Fault("shared-inputs-on-another-card", "eagle/target/pipeline.py",
          "return hand_over.bring(args, place), hand_over.bring(kwargs, place)",
          "return hand_over.bring(args, place), kwargs", GENERATION),
    Fault("memory-of-no-card", "eagle/device.py", "backend.mem_get_info(index)[0] // 8 * 7",
          "backend.mem_get_info(torch.device(kind))[0] // 8 * 7", GENERATION, "which has no index"),
    # ---- a batch on its way to the card
    Fault("tokens-left-on-host", "eagle/drafts/alignment.py",
          "[send(tensor, device) for tensor in self.tensors()]",
          "[self.tokens, *(send(tensor, device) for tensor in self.tensors()[1:])]", TRAINING),
    Fault("loss-mask-left-on-host", "eagle/drafts/alignment.py",
          "[send(tensor, device) for tensor in self.tensors()]",
          "[one if one is self.supervised else send(one, device) for one in self.tensors()]", TRAINING),
    Fault("noise-of-the-host", "eagle/drafts/alignment.py", "torch.Generator(features.device)", "torch.Generator()",
          TRAINING, "for generator"),
    Fault("float8-on-the-card", "eagle/device.py", 'return kind != "npu"\n', "return True\n", TRAINING,
          "does not support Float8"),
    Fault("loader-thread-without-card", "eagle/train/loader.py",
          'ThreadPoolExecutor(threads, "loader", streams.make_current, (where,))',
          'ThreadPoolExecutor(threads, "loader")', TRAINING),
    # ---- the draft and its losses
    Fault("attention-mask-on-host", "eagle/drafts/chain_attention.py", "self.piece(number, queries.device)",
          'self.piece(number, torch.device("cpu"))', TRAINING),
    Fault("positions-on-host", "eagle/drafts/unroll.py", "torch.arange(length, device=tokens.device).unsqueeze(0)",
          "torch.arange(length).unsqueeze(0)", TRAINING),
    Fault("heads-by-repeat-interleave", "eagle/drafts/layers.py",
          "return heads.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2)",
          "return heads.repeat_interleave(groups, dim=1)", DECODING),
    Fault("loss-in-float64", "eagle/drafts/token_loss.py", "return torch.promote_types(dtype, torch.float32)",
          "return torch.float64", TRAINING),
    Fault("feature-loss-in-float64", "eagle/drafts/eagle1/objective.py",
          "return LossSums(smooth_l1(states[0], targets).sum(),",
          "return LossSums(smooth_l1(states[0], targets).double().sum(),", TRAINING),
    # ---- the loop
    Fault("trained-on-host", "eagle/train/accelerator.py", "cpu=on_cpu, log_with", "cpu=True, log_with", TRAINING),
    Fault("head-left-on-host", "eagle/train/main.py", "read_head(weights, target).to(accelerator.device, compute)",
          "read_head(weights, target).to(compute)", TRAINING),
    Fault("device-without-index", "eagle/train/accelerator.py", "state.device = device.with_index(accelerator.device)",
          "state.device = accelerator.device", TRAINING),
    Fault("counts-left-on-host", "eagle/train/loop.py",
          "torch.stack(valid).sum(0).to(accelerator.device, torch.float32)",
          "torch.stack(valid).sum(0).to(torch.float32)", TRAINING),
    Fault("losses-added-in-float64", "eagle/train/loop.py", "sums = torch.zeros(4, device=accelerator.device)",
          "sums = torch.zeros(4, device=accelerator.device, dtype=torch.float64)", PAIR),
    Fault("validation-added-in-float64", "eagle/train/validation.py", "torch.stack(losses).cpu().double()",
          "torch.stack(losses).double()", TRAINING),
    Fault("validation-reduced-in-float64", "eagle/train/validation.py",
          "exact = torch.float64 if has_float64(accelerator.device) else torch.float32", "exact = torch.float64",
          PAIR),
    Fault("shards-of-the-host", "eagle/train/sharding.py", "init_device_mesh(accelerator.device.type,",
          'init_device_mesh("cpu",', SHARED),
    Fault("features-on-another-card", "eagle/train/main.py",
          "LiveFeatures(source, options.base, accelerator.device, widths, accelerator.num_processes)",
          "LiveFeatures(source, options.base, device.torch_device(accelerator.device.type), widths)", SHARED),
    # ---- the closed-form start
    Fault("memory-without-index", "eagle/device.py", "mem_get_info(with_index(device))[0]",
          "mem_get_info(torch.device(device.type))[0]", TRAINING),
    Fault("products-in-float64", "eagle/drafts/normal_equations.py",
          "return torch.float64 if devices.has_quick_float64(device) else torch.float32", "return torch.float64",
          TRAINING),
    Fault("gathered-on-host", "eagle/drafts/normal_equations.py",
          "torch.cat([rows[place] for _, rows in self._gathered]).to(self.device) for place in range(3)",
          "torch.cat([rows[place] for _, rows in self._gathered]) for place in range(3)", TRAINING),
    Fault("solved-on-the-card", "eagle/drafts/closed_form.py", "solution(*sums)",
          "solution(*(one.to(weights[0].device) for one in sums))", TRAINING),
    Fault("sums-reduced-in-float64", "eagle/train/exchange.py",
          "if has_float64(accelerator.device):", "if True:", PAIR),
    Fault("sums-exchanged-on-host", "eagle/train/exchange.py",
          "self.accelerator.gather(pair.to(self.accelerator.device)[None])", "self.accelerator.gather(pair[None])",
          PAIR),
    # ---- decoding
    Fault("decoded-on-host", "eagle/decode/evaluate.py", "device = torch_device(kind)", 'device = torch_device("cpu")',
          DECODING),
    Fault("prompt-left-on-host", "eagle/decode/generate.py", "ids = torch.tensor(prompt, device=device)",
          "ids = torch.tensor(prompt)", DECODING),
    Fault("draft-left-on-host", "eagle/decode/fitting_draft.py", "draft.eval().to(target.device, target.head.dtype)",
          "draft.eval().to(target.head.dtype)", DECODING),
    Fault("sampled-on-host", "eagle/decode/sampling.py", "torch.Generator(device).manual_seed(self.seed)",
          "torch.Generator().manual_seed(self.seed)", DECODING),
    Fault("accepted-on-host", "eagle/decode/acceptance_rule.py",
          "torch.rand(p_x.shape, generator=generator, device=p.device)", "torch.rand(p_x.shape, generator=generator)",
          DECODING),
    Fault("static-tree-on-host", "eagle/decode/tree.py", "return torch.tensor(values, dtype=torch.long, device=device)",
          "return torch.tensor(values, dtype=torch.long)", DECODING),
    Fault("drafted-rows-mask-on-host", "eagle/decode/drafter.py",
          "torch.ones(len(tokens), self.cache.length, dtype=torch.bool, device=tokens.device)",
          "torch.ones(len(tokens), self.cache.length, dtype=torch.bool)", DECODING),
    Fault("dynamic-tree-on-host", "eagle/decode/drafter.py",
          "number = torch.zeros(len(scores) + 1, dtype=torch.long, device=scores.device)",
          "number = torch.zeros(len(scores) + 1, dtype=torch.long)", DECODING),
    Fault("path-on-host", "eagle/decode/tree_verification.py", "nodes = torch.arange(len(tree), device=tokens.device)",
          "nodes = torch.arange(len(tree))", DECODING),
    Fault("kept-rows-of-another-card", "eagle/decode/cache.py", "rows.to(block.device) + self.length",
          "rows + self.length", DECODING),
    Fault("estimated-on-host", "eagle/decode/recommendation.py",
          "ids = torch.randint(target.config.vocab_size, (context,), device=device)",
          "ids = torch.randint(target.config.vocab_size, (context,))", DECODING),
    # ---- EAGLE-3
    Fault("inputs-of-layers-left-on-their-cards", "eagle/target/features.py",
          "return tensor if tensor.device == place else tensor.to(place, non_blocking=True)",
          "return tensor", EAGLE3, "on the same device"),
    Fault("drafted-ids-on-host", "eagle/drafts/eagle3/network.py",
          "torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t", "torch.arange(len(self.d2t)) + self.d2t",
          EAGLE3, "on the same device"),
    Fault("rows-of-tokens-on-host", "eagle/drafts/eagle3/network.py",
          "torch.full((vocabulary,), -1, device=ids.device)", "torch.full((vocabulary,), -1)", EAGLE3,
          "on the same device"),
    Fault("drafted-logits-one-by-one", "eagle/drafts/eagle3/network.py", "found[..., self.ids] = own",
          "found.index_copy_(-1, self.ids, own)", EAGLE3, "waits for the card at every index"),
    Fault("steps-weighed-in-float64", "eagle/drafts/objective.py",
          "torch.arange(len(counts), device=counts.device, dtype=counts.dtype)",
          "torch.arange(len(counts), device=counts.device, dtype=torch.float64)", EAGLE3),
    Fault("steps-weighed-on-host", "eagle/drafts/objective.py",
          "torch.arange(len(counts), device=counts.device, dtype=counts.dtype)",
          "torch.arange(len(counts), dtype=counts.dtype)", EAGLE3, "on the same device"),
    Fault("gradient-of-the-heads-rows-on-host", "eagle/drafts/token_loss.py",
          "torch.zeros_like(head.own.weight, dtype=head.wide)",
          'torch.zeros_like(head.own.weight, device="cpu")', EAGLE3, "on the same device"),
    Fault("own-head-shared-out-before-it-is-read", "eagle/train/sharding.py",
          "reshard_after_forward=not draft.has_own_head", "reshard_after_forward=True",
          "tests/npu/test_training.py::test_fsdp_of_inputs_of_layers_without_a_store"),
    # ---- around them
    Fault("torch-npu-unguarded", "eagle/ascend.py", "and `failure` tells why.\"\"\"\n    failure()",
          "and `failure` tells why.\"\"\"", "tests/unit/test_ascend.py::test_every_command_begins",
          "Failed to load the backend extension"),
    Fault("list-of-cards-not-read", "eagle/device.py", "(wrong := ascend.wrong_visible(visible))", "(wrong := None)",
          "tests/npu/test_generate.py::test_a_shells_list_of_cards", "does not ascend"),
    Fault("hidden-overflow-not-said", "eagle/device.py", "(hidden := ascend.hidden_overflow())", "(hidden := None)",
          "tests/unit/test_device.py::test_npus_without_infinity_are_warned_of_once"),
    Fault("solved-by-one-core", "eagle/drafts/normal_equations.py", "torch.set_num_threads(devices.cores())",
          "pass",
          "tests/unit/test_closed_form.py::test_the_solution_takes_every_core_where_a_launcher_left_one_thread"),
    Fault("tests-see-cards", "tests/conftest.py", "\n\nhide()", "",
          "tests/unit/test_device.py::test_the_tests_see_no_cards", "CalledProcessError"),
]  # fmt: skip


def problems(root: Path = ROOT) -> list[str]:
    """What is out of date in the list."""
    found = []
    names = [fault.name for fault in FAULTS]
    found += [f"{name}: named twice" for name in sorted({name for name in names if names.count(name) > 1})]
    for fault in FAULTS:
        count = (
            (root / fault.file).read_text(encoding="utf-8").count(fault.text) if (root / fault.file).is_file() else 0
        )
        if count != 1:
            found.append(f"{fault.name}: {fault.text!r} stands {count} times in {fault.file}, expected once")
        file, test = fault.tests.split("::")
        if not (root / file).is_file() or f"def {test}(" not in (root / file).read_text(encoding="utf-8"):
            found.append(f"{fault.name}: there is no test {fault.tests}")
    return found


def copy_checkout(folder: Path) -> None:
    """The checkout's files as they are now, without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and not (ROOT / name).is_symlink():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run_tests(folder: Path, tests: list[str]) -> tuple[int, str]:
    """pytest's exit code in that copy, and what it printed; -1 where it was ended after `PATIENCE`."""
    environment = {**shown(), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"--basetemp={folder}.tmp", *tests]
    process = subprocess.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        end(process.pid)
        return -1, process.communicate()[0]
    finally:
        shutil.rmtree(f"{folder}.tmp", ignore_errors=True)
    return process.returncode, said


def end(pid: int) -> None:
    """A process and all that it started, in groups of their own too."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def plant(fault: Fault, work: Path) -> tuple[bool, str]:
    """Whether a test noticed the fault, and a line to print."""
    folder, started = work / fault.name, time.monotonic()
    copy_checkout(folder)
    path = folder / fault.file
    path.write_text(path.read_text(encoding="utf-8").replace(fault.text, fault.instead), encoding="utf-8")
    code, said = run_tests(folder, [fault.tests])
    shutil.rmtree(folder)
    wrong = unnoticed(fault, code, said)
    line = f"{fault.name:<34} {time.monotonic() - started:4.0f} s  "
    if wrong is None:
        return True, f"{line}caught by {fault.tests.split('::')[1]}: {reason(said) or 'it hangs'}"
    return False, f"{line}MISSED: {wrong}" + ("" if code == 0 else "\n" + "\n".join(said.splitlines()[-15:]))


def unnoticed(fault: Fault, code: int, said: str) -> str | None:
    """Why what pytest made of a planted fault does not count; None where the fault was noticed."""
    why = reason(said)
    if code == -1 or (code == 1 and HANGS.search(why)):
        return None if fault.hangs else f"it hangs, which the list does not say ({why})"
    if code != 1:  # 1: a test failed; others: all passed, there were none, or pytest itself failed
        return f"pytest ended with {code}"
    if not why or NO_PROGRAM.search(why):
        return f"what is planted is no program, or the test cannot be run ({why})"
    if not re.search(fault.error, why):
        return f"it failed by another error than {fault.error!r}: {why}"
    return None


def reason(said: str) -> str:
    """What the test failed by, in one line: the last error that it shows, else pytest's own word on it."""
    shown_lines = [line[1:].strip() for line in said.splitlines() if line.startswith("E ")]
    errors = [line for line in shown_lines if re.match(r"(\[rank\d\]: )?[\w.]*(Error|TimeoutExpired): ", line)]
    found = next(iter([*errors[-1:], *shown_lines[:1]]), "")
    return re.sub(r"^\[rank\d\]: ", "", found)[:140]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.npu.planted_faults", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="faults to plant (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--no_baseline", action="store_true", help="do not run the tests without a fault first")
    args = parser.parse_args(argv)
    if wrong := problems():
        print("\n".join(wrong), file=sys.stderr)
        return 1
    unknown = set(args.names) - {fault.name for fault in FAULTS}
    if unknown:
        print(f"no faults of these names: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    faults = [fault for fault in FAULTS if not args.names or fault.name in args.names]
    with tempfile.TemporaryDirectory(prefix="planted-faults-") as temporary:
        work, started = Path(temporary), time.monotonic()
        if not args.no_baseline:
            copy_checkout(work / "without")
            code, said = run_tests(work / "without", sorted({fault.tests for fault in faults}))
            print(
                f"{'(without a fault)':<34} {time.monotonic() - started:4.0f} s  {'passes' if code == 0 else 'FAILS'}"
            )
            if code:
                print(said, file=sys.stderr)
                return 1
        missed = 0
        with ThreadPoolExecutor(args.jobs) as pool:
            for noticed, line in pool.map(lambda fault: plant(fault, work), faults):
                print(line, flush=True)
                missed += not noticed
        print(f"{len(faults) - missed} of {len(faults)} faults were caught, in {time.monotonic() - started:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
