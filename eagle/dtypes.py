"""The dtypes that a command line may name."""

from __future__ import annotations

import torch

from eagle.errors import RequestError

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


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
