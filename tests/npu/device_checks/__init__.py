"""What the simulated device refuses and what it computes, each by a name; all in one process, whose start costs most.

python -m tests.npu.device_checks OUT     in an environment that finds the device; writes {name: what went wrong}

`tests/npu/test_simulated.py` runs it with `CARDS` cards of `MEMORY` bytes.
"""

from tests.npu.device_checks import cards, computing, hccl, refusals
from tests.npu.device_checks.registry import CARDS, CHECKS, MEMORY

__all__ = ["CARDS", "CHECKS", "MEMORY", "cards", "computing", "hccl", "refusals"]
