"""A torch_npu whose cards are simulated: `tests/npu/simulated` says what they are and what they refuse.

SIMULATED_NPU_LIBRARY       the built extension
SIMULATED_NPU_CARDS         how many cards the machine has (default 8)
SIMULATED_NPU_MEMORY        bytes of each (default 64 GiB)
SIMULATED_NPU_LOG           a folder in which every process that used a card leaves a JSON file when it ends
SIMULATED_NPU_BROKEN        fails to be imported, as where CANN's set_env.sh was not sourced
"""

import importlib.util
import os
import sys

import torch

__version__ = "2.13.0"

if os.environ.get("SIMULATED_NPU_BROKEN"):
    raise ImportError("libhccl.so: cannot open shared object file: No such file or directory")


def _load():
    """The extension, once: its name is that of the cards' library."""
    specification = importlib.util.spec_from_file_location("simulated_npu", os.environ["SIMULATED_NPU_LIBRARY"])
    module = importlib.util.module_from_spec(specification)
    sys.modules["simulated_npu"] = module
    specification.loader.exec_module(module)
    return module


_library = _load()

from torch_npu import npu  # noqa: E402  (needs the library)

_library.start(len(npu.visible_cards()), int(os.environ.get("SIMULATED_NPU_MEMORY", 64 << 30)))
torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", npu)
sys.modules["torch.npu"] = npu
torch.utils.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True, for_storage=True)

from torch_npu import hccl, log  # noqa: E402, F401  (the process group, and what is written at the end)


def npu_fusion_attention(*args, **kwargs):
    """transformers imports it by name as soon as it finds torch_npu."""
    raise NotImplementedError("simulated npu: npu_fusion_attention")


def npu_rms_norm(*args, **kwargs):
    raise NotImplementedError("simulated npu: npu_rms_norm")


def _autoload():
    """What torch >= 2.5 calls at its own import: this package has been imported by then."""
