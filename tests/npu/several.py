"""One command line after the other in one process, whose start on a card costs seconds; see `commands.several`.

python -m tests.npu.several MODULE FILE     FILE: a list of argument lists; what each said takes its place
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path

from eagle.ascend import guard
from eagle.entry import run


def main(module: str, file: Path) -> None:
    guard()
    from eagle.decode import recommendation

    recommendation._SECONDS, recommendation._LEAST_ROUNDS = 0.0, 1  # what a pass takes is not asked here
    command = importlib.import_module(module).main
    said = []
    for words in json.loads(file.read_text()):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = run(lambda words=words: command(words))
            except SystemExit as error:  # argparse
                code = int(error.code or 0)
        said.append([code, out.getvalue(), err.getvalue()])
    file.write_text(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
