"""Look at what a draft would be trained on: conversations with the supervised tokens coloured.

    python -m eagle.data.viewer --model_name ./llama-7B --data_path ./sharegpt.json --num 3
    python -m eagle.data.viewer --model_name ./llama-7B --data_path ./sharegpt.json --html masks.html

In a terminal the supervised tokens are green and everything else is dim; without colours (``NO_COLOR``, a pipe) they
stand in ⟦ ⟧. The HTML page is one file without anything from elsewhere, and shows the tokens under the pointer.
"""

from __future__ import annotations

import argparse
import html
import os
import sys
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from eagle.data.chat_template import BUILT_IN_TEMPLATES
from eagle.data.cleaning import DROP_REASONS, REPAIRS, Dropped, Tally
from eagle.data.loss_mask import Aligned, Encoder, load_encoder
from eagle.data.reader import open_records
from eagle.data.record_file import Records, notes_of
from eagle.data.regenerated import check_regenerated
from eagle.data.template_variables import FLAG, HELP, parse_kwargs
from eagle.data.token_source import align_record, encode_record
from eagle.entry import HelpFormatter, run
from eagle.errors import RequestError
from eagle.files import existing_path
from eagle.target.config import load_config
from eagle.target.quantization import Use
from eagle.text import visible

GREEN, DIM, BOLD, RESET = "\033[32m", "\033[2m", "\033[1m", "\033[0m"


@dataclass(frozen=True, slots=True)
class Piece:
    """The text of one token, or of several that share a character. special: a control token such as ``</s>``."""

    text: str
    ids: list[int]
    supervised: bool
    special: bool


@dataclass(frozen=True, slots=True)
class Shown:
    """One record of the data file: its pieces, or why it is left out, and what was said."""

    index: int
    pieces: list[Piece]
    dropped: str | None = None
    repaired: list[str] = field(default_factory=list)
    said: str = ""

    @property
    def tokens(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces)

    @property
    def supervised(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces if piece.supervised)

    def caption(self) -> str:
        if self.dropped:
            return f"left out: {DROP_REASONS[self.dropped]}" + (f" ({self.said})" if self.said else "")
        share = self.supervised / max(self.tokens, 1)
        notes = "".join(f" · {REPAIRS[name]}" for name in self.repaired)
        return f"{self.tokens:,} tokens, {self.supervised:,} supervised ({share:.0%}){notes}"


def show_record(records: Records, encoder: Encoder, index: int, max_length: int) -> Shown:
    """Record `index` of the data file the way data generation takes it."""
    tally = Tally()
    try:
        encode_record(records, index, encoder, max_length, tally)
        rows = align_record(records, index, encoder, max_length)
    except Dropped as dropped:
        return Shown(index, [], dropped.reason, said=dropped.detail)
    pieces: list[Piece] = []
    for number, aligned in enumerate(rows, 1):
        if len(rows) > 1:
            pieces.append(Piece(f"{chr(10) if pieces else ''}--- row {number} of {len(rows)} ---\n", [], False, False))
        pieces += _pieces(aligned, encoder, max_length)
    return Shown(index, pieces, None, list(tally.repaired))


def _pieces(aligned: Aligned, encoder: Encoder, length: int) -> list[Piece]:
    """The first `length` tokens of a row."""
    pieces: list[Piece] = []
    at = 0
    special = set(encoder.tokenizer.all_special_ids) | {
        number for number, token in encoder.tokenizer.added_tokens_decoder.items() if token.special
    }
    for token, mask, (_, end) in zip(
        aligned.input_ids[:length].tolist(), aligned.loss_mask.tolist(), aligned.offsets.tolist(), strict=False
    ):
        if end <= at and pieces and pieces[-1].supervised == bool(mask):
            pieces[-1].ids.append(token)  # another byte of a character that is shown already
            continue
        # From where the last token ended: what lies between two tokens is shown with the second.
        pieces.append(Piece(aligned.text[at : max(at, end)], [token], bool(mask), token in special))
        at = max(at, end)
    return pieces


def to_terminal(shown: Shown, *, colour: bool) -> str:
    """A record for a terminal, or for a file when not in `colour`; its own control characters are shown."""
    head = visible(f"record {shown.index}: {shown.caption()}")
    parts = [f"{BOLD}{head}{RESET}" if colour else head, "\n"]
    for supervised, pieces in groupby(shown.pieces, key=lambda piece: piece.supervised):
        text = visible("".join(piece.text for piece in pieces))
        if colour:
            # Line by line: pagers forget a colour at the end of a line.
            code = GREEN if supervised else DIM
            parts.append("\n".join(f"{code}{line}{RESET}" if line else "" for line in text.split("\n")))
        else:
            parts.append(f"⟦{text}⟧" if supervised else text)
    return "".join(parts)


_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1f2430; --faint: #7a8294; --line: #e3e6ec;
  --reply: #d8f3dc; --reply-text: #14532d; --edge: #95d5b2; --chip: #eceff4; --warn: #b45309; }
@media (prefers-color-scheme: dark) { :root { --page: #14171d; --card: #1c2028; --text: #e4e7ee; --faint: #8d95a7;
  --line: #2c323e; --reply: #16382a; --reply-text: #b7f0cc; --edge: #2f7a55; --chip: #2a303c; --warn: #fbbf24; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.6 system-ui, "Noto Sans", sans-serif }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1 { font-size: 1.5rem; margin: 0 0 .25rem }
p.about { color: var(--faint); margin: 0 0 1.75rem; overflow-wrap: anywhere }
article { background: var(--card); border: 1px solid var(--line); border-radius: 12px; margin: 0 0 1.5rem;
  box-shadow: 0 1px 3px rgb(0 0 0 / 6%); overflow: hidden }
header { display: flex; flex-wrap: wrap; gap: .25rem 1rem; align-items: baseline; padding: .7rem 1.1rem;
  border-bottom: 1px solid var(--line) }
header b { font-size: 1.02rem }
header span { color: var(--faint); font-size: .9rem }
.bar { height: 4px; background: var(--chip) } .bar i { display: block; height: 100%; background: #40916c }
pre { margin: 0; padding: 1rem 1.1rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 14px/1.75 ui-monospace, "SF Mono", "DejaVu Sans Mono", "Noto Sans Mono CJK SC", monospace; color: var(--faint) }
mark { background: var(--reply); color: var(--reply-text); border-radius: 3px; padding: .1em 0;
  -webkit-box-decoration-break: clone; box-decoration-break: clone }
pre span { border-radius: 3px } pre span:hover { outline: 1.5px solid var(--edge) }
.special { background: var(--chip); border-radius: 5px; padding: .1em .35em; font-size: .86em }
mark .special { background: var(--edge) }
.out { color: var(--warn) }
.legend mark, .legend code { padding: .1em .4em } .legend code { background: var(--chip); border-radius: 5px }
"""


def to_html(shown: list[Shown], title: str, about: str) -> str:
    """All records as one page that needs nothing else."""
    records = sum(not record.dropped for record in shown)
    tokens, supervised = sum(r.tokens for r in shown), sum(r.supervised for r in shown)
    head = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style></head><body><main>\n"
        f"<h1>{html.escape(title)}</h1>\n"
        f'<p class="about legend">{html.escape(about)}<br>{records:,} records, {tokens:,} tokens, {supervised:,} '
        f"supervised ({supervised / max(tokens, 1):.0%}). <mark>Supervised tokens</mark>, <code>control tokens</code>; "
        "rest the pointer on a token for its number.</p>\n"
    )
    return head + "\n".join(_article(record) for record in shown) + "\n</main></body></html>\n"


def _article(shown: Shown) -> str:
    share = 100 * shown.supervised / max(shown.tokens, 1)
    caption = html.escape(shown.caption())
    body = []
    for supervised, pieces in groupby(shown.pieces, key=lambda piece: piece.supervised):
        spans = "".join(map(_span, pieces))
        body.append(f"<mark>{spans}</mark>" if supervised else spans)
    # The parser drops a line break that directly follows <pre>.
    text = "<pre>\n" + "".join(body) + "</pre>" if body else ""
    return (
        f'<article data-record="{shown.index}"><header><b>record {shown.index}</b>'
        f"<span{' class=out' if shown.dropped else ''}>{caption}</span></header>"
        f'<div class="bar"><i style="width:{share:.1f}%"></i></div>{text}</article>'
    )


def _span(piece: Piece) -> str:
    numbers = " ".join(map(str, piece.ids))
    kind = ' class="special"' if piece.special else ""
    return f'<span{kind} title="token {numbers}">{html.escape(piece.text)}</span>'


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eagle.data.viewer",
        description="Show conversations the way data generation reads them, their supervised tokens coloured.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--model_name", required=True, help="folder of the base model")
    parser.add_argument(
        "--data_path",
        type=Path,
        required=True,
        help="conversations: .json, .jsonl, .parquet, .arrow, or a folder of them",
    )
    parser.add_argument("--num", type=int, default=3, help="how many records")
    parser.add_argument("--start", type=int, default=0, help="the first one, counting from 0")
    parser.add_argument("--html", type=Path, help="write a page instead of printing")
    parser.add_argument("--max_length", type=int, default=2048, help="cut conversations to this many tokens")
    parser.add_argument(
        "--chat_template",
        help=f"a Jinja file, or {', '.join(BUILT_IN_TEMPLATES)} (default: the tokenizer's own, else by family)",
    )
    parser.add_argument(FLAG, help=HELP)
    parser.add_argument(
        "--allow_truncated", action="store_true", help="use the whole records of a data file that ends too early"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    model = existing_path(args.model_name, "--model_name", "folder")
    records = open_records(args.data_path, allow_truncated=args.allow_truncated)
    for flag, value, least in (
        ("--num", args.num, 1),
        ("--start", args.start, 0),
        ("--max_length", args.max_length, 3),
    ):
        if value < least:
            raise RequestError(f"{flag} {value}: expected {least} or more.")
    if args.start >= len(records):
        raise RequestError(f"--start {args.start}: {args.data_path} holds {len(records):,} records, from 0 on.")
    if args.html and args.html.exists():
        raise FileExistsError(f"--html {args.html} exists; name a new file, or delete that one.")
    encoder = load_encoder(
        model,
        load_config(model, use=Use.SERVED),
        args.chat_template,
        chat_template_kwargs=parse_kwargs(args.chat_template_kwargs),
    )
    told = [f"--{name}" for name in ("chat_template", "chat_template_kwargs") if getattr(args, name)]
    notes = [*notes_of(records), *check_regenerated(records, encoder, told), *encoder.notes()]
    indices = range(args.start, min(args.start + args.num, len(records)))
    shown = [show_record(records, encoder, index, args.max_length) for index in indices]
    if args.html:
        title = f"What is trained on: {args.data_path.name}"
        about = f"Base model {model.resolve().name}, chat template {encoder.template_name}, "
        about += " ".join([f"at most {args.max_length:,} tokens.", *(f"Note: {note}." for note in notes)])
        args.html.write_text(to_html(shown, title, about), encoding="utf-8")
        print(f"{args.html}: {len(shown):,} records")
        return 0
    print("".join(f"note: {note}\n" for note in notes), end="")
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print("\n\n".join(to_terminal(record, colour=colour) for record in shown))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
