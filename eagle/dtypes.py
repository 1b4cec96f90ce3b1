"""The dtypes that a command line may name."""

from __future__ import annotations

import torch

from eagle.errors import RequestError
from eagle.releases import TORCH

DTYPES = {
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "fp32": torch.float32,
}


def parse_dtype(name: str, flag: str = "--dtype") -> torch.dtype:
    """Raises: RequestError for a name that is not one of `DTYPES`."""
    if name not in DTYPES:
        raise RequestError(f"{flag} {name}: unknown dtype; expected one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def check_computes(dtype: torch.dtype, kind: str, flag: str = "--dtype") -> None:
    """Raises: RequestError for a dtype that this torch does not multiply in on devices of that kind."""
    if kind == "cpu" and dtype == torch.float16 and TORCH < (2, 2):
        raise RequestError(
            f"{flag} float16 on a CPU needs torch 2.2 or newer; this is {torch.__version__}. Use bfloat16 or float32."
        )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
