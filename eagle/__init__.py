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

__version__ = "0.2.0"

# ``python -m eagle...`` (argv says "-m" while this is imported) puts the working directory in front of the installed
# libraries, and a folder of the user's that is called ``datasets`` or ``peft`` would be imported in place of one.
# The package's own modules are found without it from here on.
if sys.argv[:1] == ["-m"]:
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path.cwd()]
