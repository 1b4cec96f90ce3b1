"""EAGLE-3 drafts as others save them, made into what the network here holds, or refused by what they are.

What a saved draft leaves out is taken as vLLM takes it: no ``d2t`` over the whole vocabulary means each token for
itself, no ``lm_head`` there means the target's. Two tables that contradict each other are not chosen between.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch

from eagle.drafts.eagle3.draft_config import DRAFT_VOCAB
from eagle.errors import RequestError
from eagle.target.config import ModelConfig

HEAD = "lm_head.weight"
#: Names of tensors that other kinds of EAGLE-3 drafts have, and what these are.
_OTHERS = (
    (r"layers\.[1-9]", "several layers"),
    (r"midlayer\.self_attn\.[qk]_norm\.", "norms of queries and keys (Qwen3's layer)"),
    (r"midlayer\.self_attn\.(q_a|q_b|kv_a|kv_b)_", "latent attention (DeepSeek's layer)"),
    (r"midlayer\.mlp\.(experts|gate\.|shared_expert)", "experts"),
    (r"(fc_norm|input_norm)\.", "norms before fc (fc_norm, norm_before_fc)"),
    (r".*(_scale|_scale_inv|_zero_point|qweight|weight_packed)$", "quantized weights"),
)
#: A layer's biases that vLLM has all of or none of.
ATTENTION_BIASES = tuple(f"midlayer.self_attn.{name}_proj.bias" for name in "qkvo")
MLP_BIASES = tuple(f"midlayer.mlp.{name}_proj.bias" for name in ("gate", "up", "down"))


def canonical(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the network's names, the token table as ``d2t`` alone.

    Raises: RequestError for tensors of a network that is not this one, and for tables that contradict each other.
    """
    found = {name.replace("layers.0.", "midlayer.", 1): tensor for name, tensor in state.items()}
    refuse_others(found)
    bias = found.get("fc.bias")
    if bias is not None:
        if bool(bias.any()):
            raise RequestError(
                "the EAGLE-3 draft has a trained fc.bias, which vLLM drops without a word; expected none. Train the "
                "draft without it."
            )
        del found["fc.bias"]
    drafted = found.pop("t2d", None)
    if drafted is not None:
        ids = drafted.bool().flatten().nonzero().flatten()
        if "d2t" not in found:
            found["d2t"] = ids - torch.arange(len(ids))
        else:
            _check_same(found["d2t"].long(), ids)
    if "d2t" in found:
        found["d2t"] = found["d2t"].long()
    return found


def refuse_others(names: Iterable[str]) -> None:
    """Raises: RequestError naming in what an EAGLE-3 draft differs from those that are read here."""
    other = [what for pattern, what in _OTHERS if any(re.match(pattern, name) for name in names)]
    if other:
        raise RequestError(
            f"the EAGLE-3 draft has {' and '.join(other)}; expected a single Llama layer. vLLM may serve it as it is."
        )


def _check_same(offsets: torch.Tensor, ids: torch.Tensor) -> None:
    if len(offsets) == len(ids) and torch.equal(torch.arange(len(ids)) + offsets, ids):
        return
    if torch.equal(offsets, ids):
        raise RequestError(f"d2t holds token ids (t2d names the same ones){_OFFSETS}")
    raise RequestError(
        "t2d and d2t of the EAGLE-3 draft name different tokens; vLLM believes d2t. Take out the one that is wrong: "
        "the other is made from it."
    )


_OFFSETS = (
    "; expected offsets, so that draft token i is the target's i + d2t[i]: vLLM would draft other tokens, or die. "
    "Save d2t - torch.arange(len(d2t)) in its place."
)


def filled(
    config: ModelConfig, state: Mapping[str, torch.Tensor], head: Callable[[], torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """The tensors with those that a draft may leave out. head: gives the target's ``lm_head`` ``[V, H]``.

    Raises: RequestError where ``d2t`` is no table of offsets.
    """
    found = dict(state)
    size, vocabulary = config.extra[DRAFT_VOCAB], config.vocab_size
    if size == vocabulary:
        found.setdefault("d2t", torch.zeros(size, dtype=torch.long))
        if HEAD not in found and head is not None:
            found[HEAD] = head()
    if config.qkv_bias:  # vLLM has all four or none; one that adds nothing changes nothing
        for name in ATTENTION_BIASES:
            weight = found.get(name.replace("bias", "weight"))
            if weight is not None and name not in found:
                found[name] = weight.new_zeros(len(weight))
    if "d2t" in found and not is_table(found["d2t"], vocabulary):
        ids = found["d2t"]
        told = bool((ids.diff() > 0).all()) and int(ids.min()) >= 0 and int(ids.max()) < vocabulary
        if told:
            raise RequestError(f"d2t of the EAGLE-3 draft holds token ids{_OFFSETS}")
        raise RequestError(
            f"d2t of the EAGLE-3 draft leads to other than {len(ids):,} ascending tokens of the target's "
            f"{vocabulary:,}; expected offsets, draft token i being the target's i + d2t[i]. Take the one that was "
            "saved with its lm_head."
        )
    return found


def is_table(offsets: torch.Tensor, vocabulary: int) -> bool:
    """Whether i + offsets[i] are tokens of a vocabulary of so many, ascending."""
    ids = torch.arange(len(offsets)) + offsets
    return bool(len(ids)) and int(ids.min()) >= 0 and int(ids.max()) < vocabulary and bool((ids.diff() > 0).all())
