"""A target whose weights are quantized: what says so, which tensors stay plain, and which commands can use it.

An engine computes with such a target, and knows its format. Drafts need three of its tensors: embedding, final norm and
``lm_head``, which the common formats leave as they were.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from eagle.errors import RequestError
from eagle.files import read_json
from eagle.target.families import TargetFamily
from eagle.text import listed

#: What to do instead of using a quantized model.
UNQUANTIZED = "use the unquantized model it was made from; the draft fits both."
#: In config.json, in the order in which vLLM looks; the second is what compressed-tensors wrote first.
_KEYS = ("quantization_config", "compression_config")
#: Beside config.json, in which vLLM finds it too: ModelOpt's.
_BESIDE = "hf_quant_config.json"
#: Where it does not look.
_UNREAD = ("quantize_config.json", "quant_config.json")
#: Of a quantization's content: what is shown of it.
_SHOWN = ("format", "bits", "w_bit", "group_size", "desc_act", "activation_scheme", "quant_algo")
#: Names of what stands beside, or in place of, a weight that was quantized: GPTQ and AWQ, compressed-tensors, FP8,
#: ModelOpt, bitsandbytes.
_NAME = re.compile(
    r"(^|[._])(scales?|scale_inv|qweight|qzeros|zeros|g_idx|weight_packed|weight_shape|zero_point|absmax|quant_map|"
    r"nested_absmax|quant_state\.\w+|SCB|amax)$"
)
#: FP8, FP4, INT8 and packed weights, as safetensors or torch call their dtypes.
_DTYPE = re.compile(r"(F8|F6|F4|I8|U8|I4|U4|float8|float4|uint8|int8|uint4|int4|I32|U32)")


class Use(Enum):
    """What a command does with a target; the value: what to do instead where a quantized one is of no use to it."""

    SERVED = "an engine computes; here only embedding, final norm and lm_head are read"
    FEATURES = "vLLM computes its features, as it will be served: add --feature_source vllm."
    MEASURED = "python -m eagle.vllm.verify measures a draft beside it, as it will be served."
    REPLIES = "vLLM decodes it: name the python that has one with --engine_python, or a server with --server."
    PLAIN = "Only plain weights will do here."


@dataclass(frozen=True, slots=True)
class Quantization:
    """method: as it is called where it is named. content: all that is said of it there. file: in which it stands."""

    method: str
    content: Mapping[str, Any]
    file: str

    def to_json(self) -> dict[str, Any]:
        """For a manifest: the method and its numbers."""
        found = {name: self.content[name] for name in _SHOWN if isinstance(self.content.get(name), int | str)}
        return {"method": self.method, **found}

    def describe(self) -> str:
        return ", ".join([self.method, *(f"{k} {v}" for k, v in self.to_json().items() if k != "method")])

    def note(self) -> str:
        """For who has features computed of it."""
        return (
            f"the base model is quantized ({self.describe()}): features are its own, as vLLM serves it, and training, "
            "export and vLLM take the same folder"
        )

    def check(self, use: Use, where: str) -> None:
        """Raises: RequestError where that cannot be done with it, or nobody could know how it was quantized."""
        if use is not Use.SERVED:
            raise RequestError(f"{where}: this is a quantized model ({self.method}). {use.value} Or {UNQUANTIZED}")
        if not self.content:
            raise RequestError(
                f"{where}: this is a quantized model ({self.method}), and nothing says how: expected an object with "
                "quant_method and what belongs to it. Take the config.json that was published with it, or "
                f"{UNQUANTIZED}"
            )


def quantization_in(raw: Mapping[str, Any]) -> Quantization | None:
    """What a config.json says."""
    found = next((raw[key] for key in _KEYS if raw.get(key)), None)
    return None if not found else _read(found, "config.json")


def quantization_beside(folder: Path) -> Quantization | None:
    """What a file beside a config.json says that names none. Raises: RequestError for one that vLLM does not read."""
    if (folder / _BESIDE).is_file():
        return _read(read_json(folder / _BESIDE, "how a model was quantized"), _BESIDE)
    for name in _UNREAD:
        if (folder / name).is_file():
            raise RequestError(
                f"{folder}: {name} says that this is a quantized model, config.json says nothing of it, and there "
                "alone vLLM looks. Write it there as quantization_config, with its quant_method, or " + UNQUANTIZED
            )
    return None


def _read(found: Any, file: str) -> Quantization:
    content = found if isinstance(found, dict) else {}
    inner = content.get("quantization")
    inner = inner if isinstance(inner, dict) else {}
    named = content.get("quant_method") or content.get("format") or inner.get("quant_algo")
    return Quantization(str(named or (found if isinstance(found, str) else "of no named method")), content, file)


def quantized_tensors(dtypes: Mapping[str, str], expected: Iterable[str]) -> list[str]:
    """Of tensors, dtypes by name, those that no plain model has; `expected` are a plain one's names."""
    marks = [name for name in dtypes if _NAME.search(name)]
    return marks + [f"{name} ({dtypes[name]})" for name in expected if name in dtypes and _DTYPE.match(dtypes[name])]


def plain_tensors(expected: Mapping[str, tuple[int, ...]], family: TargetFamily) -> dict[str, tuple[int, ...]]:
    """Of a target's tensors those that stay plain however it is quantized: embedding, head, norms."""
    return {
        name: shape
        for name, shape in expected.items()
        if name in (family.embedding, family.head, family.norm) or (len(shape) == 1 and "norm" in name)
    }


def check_head(found: Quantization, quantized: Iterable[str], family: TargetFamily, where: str) -> None:
    """Raises: RequestError where ``lm_head`` or the embedding is among the quantized tensors."""
    stems = tuple(name.removesuffix("weight") for name in (family.head, family.embedding))
    marks = [name for name in quantized if name.startswith(stems)]
    if found.content.get("lm_head") is True:
        marks.insert(0, f'"lm_head": true in {found.file}')
    if marks:
        raise RequestError(
            f"{where}: its head or its embedding is quantized ({listed(marks)}), and a draft is trained with both as "
            'plain matrices. Quantize the model again without them ("ignore": ["lm_head"] of compressed-tensors, '
            f'"lm_head": false of GPTQ), or {UNQUANTIZED}'
        )
