"""How much faster is chain decoding with a draft that is (almost) always right, and how close is that to the ideal?

    python benchmarks/decode.py --output decode.json

Target and draft are an oracle pair made here (tests/oracle.py): the target's last layer is the draft, the layers before
it cost what layers cost and change nothing. The baseline is transformers' own `generate`, greedy, on the same target in
the same process. Everything is warmed up, the runs alternate, and the quickest of each counts. Prefill is left out on
both sides. The ideal ratio is τ divided by the cost of a step, drafting and verifying timed by themselves, in steps of
the baseline.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import benchmarks  # noqa: F401  keeps folders of the user's from being imported
from eagle.decode.acceptance_counts import Acceptance
from eagle.decode.drafter import DraftOptions
from eagle.decode.fitting_draft import load_fitting_draft
from eagle.decode.generate import Generation, SpeculativeDecoder, generate_alone
from eagle.decode.recommendation import estimate, timed
from eagle.decode.sampling import Sampling
from eagle.decode.target import load_target
from eagle.device import choose_kind, describe, torch_device
from eagle.dtypes import dtype_name, parse_dtype
from eagle.entry import run
from eagle.files import write_json
from eagle.provenance import provenance
from eagle.target.trunk import from_pretrained_dtype
from tests.oracle import Shape, random_prompts, write_pair


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Chain decoding against transformers' generate, with an oracle draft.")
    add = parser.add_argument
    add("--hidden_size", type=int, default=768)
    add("--layers", type=int, default=16)
    add("--heads", type=int, default=12)
    add("--vocab_size", type=int, default=4096)
    add("--num_draft_tokens", type=int, nargs="+", default=[1, 2, 3, 5, 7], help="lengths of the chain")
    add("--max_new_tokens", type=int, default=96)
    add("--prompts", type=int, default=2)
    add("--repeats", type=int, default=3)
    add("--dtype", default="float32")
    add("--device", default="auto")
    add("--output", type=Path, help="write the numbers to this JSON file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device, dtype = torch_device(choose_kind(args.device)), parse_dtype(args.dtype)
    shape = Shape(
        hidden_size=args.hidden_size, layers=args.layers, heads=args.heads, kv_heads=args.heads // 4 or 1,
        vocab_size=args.vocab_size,
    )  # fmt: skip
    prompts, new, greedy = random_prompts(args.prompts, 64), args.max_new_tokens, Sampling()
    with tempfile.TemporaryDirectory() as folder:
        base, draft_folder = write_pair(Path(folder), shape)
        model = AutoModelForCausalLM.from_pretrained(base, **from_pretrained_dtype(dtype)).to(device).eval()
        target = load_target(base, dtype, device)
        draft = load_fitting_draft(draft_folder, base, target)
    inputs = [torch.tensor([prompt], device=device) for prompt in prompts]

    def by_transformers(count: int = new) -> list[list[int]]:
        options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode():
            return [model.generate(ids, **options)[0, ids.shape[1] :].tolist() for ids in inputs]

    def decoding(replies: list[Generation]) -> float:
        return sum(reply.seconds - reply.prefill_seconds for reply in replies)

    expected, rows, tokens = by_transformers(), [], (new - 1) * len(prompts)
    for length in args.num_draft_tokens:
        options = DraftOptions("chain", length)
        decoder = SpeculativeDecoder(target, draft, options.drafter(device, greedy), greedy)
        replies = [decoder.generate(prompt, new) for prompt in prompts]
        identical = [reply.tokens for reply in replies] == expected
        acceptance = Acceptance.of((step for reply in replies for step in reply.steps), length)
        whole, prefill, alone, drafted = [], [], [], []
        for _ in range(args.repeats):
            whole.append(timed(by_transformers, device)[0])
            prefill.append(timed(lambda: by_transformers(1), device)[0])
            alone.append(decoding([generate_alone(target, prompt, new, greedy) for prompt in prompts]))
            drafted.append(decoding([decoder.generate(prompt, new) for prompt in prompts]))
        baseline = min(whole) - min(prefill)
        step = estimate(target, draft, {length: decoder.drafter}, acceptance, context=64 + new // 2)[1]
        ideal = acceptance.tau() / ((step.draft_seconds + step.target_seconds) / (baseline / tokens))
        rows.append(
            {
                "num_draft_tokens": length,
                "tau": acceptance.tau(),
                "identical_to_transformers": identical,
                "tokens_per_s": tokens / min(drafted),
                "transformers_tokens_per_s": tokens / baseline,
                "target_alone_tokens_per_s": tokens / min(alone),
                "draft_ms": 1000 * step.draft_seconds,
                "target_ms": 1000 * step.target_seconds,
                "ratio": baseline / min(drafted),
                "ideal_ratio": ideal,
                "share_of_ideal": baseline / min(drafted) / ideal,
            }
        )
        print(json.dumps({key: round(value, 3) for key, value in rows[-1].items()}), flush=True)
    report = {
        "options": {key: value for key, value in vars(args).items() if key != "output"} | {"dtype": dtype_name(dtype)},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "hardware": describe(device),
        "results": rows,
        "made_by": provenance(),
    }
    if args.output:
        write_json(args.output, report)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
