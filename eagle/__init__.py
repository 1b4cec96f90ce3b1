"""Training EAGLE draft heads: conversations -> features -> draft -> vLLM.

A folder for each stage, in the order in which they build on each other; nothing imports a later one:

    target    the frozen model: its config, its weights, what computes features
    data      what people bring -> messages -> tokens and loss mask
    store     features on disk
    drafts    the draft families: networks, what they read and are trained on, losses, starts, saved forms
    generate  step 3: conversations -> store
    train     step 4: store -> draft
    decode    speculative decoding with a draft, and the report on it
    vllm      step 5: a folder that vLLM loads, and the proof that it does

Shapes in docstrings: ``B`` batch, ``T`` tokens, ``H`` hidden size, ``V`` vocabulary, ``D`` draft depth.
Position ``t`` of a draft reads token ``x[t+1]`` and feature ``f[t]`` and predicts feature ``f[t+1]``,
which the target's ``lm_head`` turns into a distribution over token ``x[t+2]``.
"""

import sys
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036  (images for cards still bring 3.9)
    why = f"Python 3.10 or newer is needed; this is {sys.version.split()[0]}, {sys.executable}."
    checkout, script = Path(__file__).resolve().parent.parent, Path((sys.argv or [""])[0])
    if script.name == "-m" or (script.is_file() and script.resolve().parent in (checkout, checkout / "tools")):
        sys.exit(f"error: {why}")
    raise ImportError(why)

from eagle.ascend import guard

__version__ = "0.2.0"


def only_libraries_on_path() -> None:
    """Take the folders that Python puts in front of the installed libraries off the path that imports are found on.

    They are a script's own folder and, with ``-m``, the working directory; PYTHONPATH may name the checkout. A folder
    of the user's in there that is called ``datasets`` or ``peft`` would be imported in place of a library, or taken
    for one that is not installed. The package's own modules are found without them. A folder that pip has installed
    to stays, whatever else it is.
    """
    own = {Path(__file__).resolve().parent.parent, Path(sys.argv[0]).resolve().parent, Path.cwd()}
    sys.path[:] = [
        folder for folder in sys.path if Path(folder).resolve() not in own or any(Path(folder).glob("*.dist-info"))
    ]


# With ``python -m eagle...`` argv says "-m" while this is imported. Another program's ``-m`` keeps its path.
if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].removeprefix("-m").split(".")[0] == "eagle":
    only_libraries_on_path()
    guard()
