"""Training EAGLE draft heads: conversations -> features -> draft -> vLLM.

Shapes in docstrings: ``B`` batch, ``T`` tokens, ``H`` hidden size, ``V`` vocabulary, ``D`` draft depth.
Position ``t`` of a draft reads token ``x[t+1]`` and feature ``f[t]`` and predicts feature ``f[t+1]``,
which the target's ``lm_head`` turns into a distribution over token ``x[t+2]``.
"""

__version__ = "0.1.0"
