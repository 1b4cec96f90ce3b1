"""What every command line shares: exit codes and error messages.

Exit codes: 0 done; 1 the work failed; 2 the request is wrong; 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import textwrap
import traceback
from collections.abc import Callable

from eagle import only_libraries_on_path
from eagle.ascend import guard
from eagle.errors import RequestError, WorkError
from eagle.files import ROOT
from eagle.progress import is_first_here
from eagle.text import visible


def run(main: Callable[[], int]) -> int:
    """Call `main` and turn its exceptions into one paragraph on stderr and an honest exit code.

    Anything that is not a `RequestError`, a missing file, an operating-system error or a `WorkError` is a
    bug of ours and keeps its traceback. ``EAGLE_DEBUG=1`` shows every traceback.
    """
    try:
        return main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (RequestError, FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        return _report(error, 2)
    except OSError as error:
        return _report(error, 1)
    except WorkError as error:
        return _report(error, 1)


def _report(error: Exception, code: int) -> int:
    if os.environ.get("EAGLE_DEBUG") == "1":
        traceback.print_exc()
    if code == 2 and not is_first_here():
        return code  # every process of the machine refuses the same request; one says so
    message = str(error)
    if isinstance(error, OSError) and error.errno is not None:  # the system's own words name no fix
        fix = "Check this path, and what you may do there."
        if error.errno == errno.ENOSPC:
            fix = "What was finished is kept; free some space and run again."
        message = f"{error.filename or 'Writing failed'}: {error.strerror}. {fix}"
    message = visible(message)
    # A child's last words come as several lines; only our own prose is wrapped.
    if "\n" not in message:
        message = textwrap.fill(message, 100, break_long_words=False, break_on_hyphens=False)
    print(f"error: {message}", file=sys.stderr)
    return code


def run_script(module: str, *, needs_torch: bool = True) -> int:
    """Run the `main` of a module of the package, for a script beside it, whatever lies beside the script."""
    only_libraries_on_path()
    if needs_torch:
        guard()
    return run(importlib.import_module(module).main)


def child_environment() -> dict[str, str]:
    """The environment of a Python that we start with ``-m``: it finds this package wherever it is started.

    Told so, Python 3.11 and newer leave the working directory off the path from the start; for older ones the package
    takes it off (`eagle.only_libraries_on_path`), as it does the checkout.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default that is a value; where it is None the help text itself says what happens."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)
