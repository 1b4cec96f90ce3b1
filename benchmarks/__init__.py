"""Measurements, each a script of its own: ``python benchmarks/NAME.py --help``.

A script imports this first, while the checkout is on its path; from here on only installed libraries are, and the
checkout's packages are found without it (see `eagle.only_libraries_on_path`).
"""

import sys
from pathlib import Path

import tests  # noqa: F401  some measure with what the tests make
from eagle import only_libraries_on_path

if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:
    only_libraries_on_path()
