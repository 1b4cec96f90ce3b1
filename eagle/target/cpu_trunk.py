"""The trunk's forward pass for a CPU: what transformers computes, of every token once, in little memory.

Sequences stand in one row (`eagle.target.packing`), so that nothing is padding and what they begin with alike is
computed once. Intermediate results lie in memory that is kept, most of them written in place: on a CPU, allocating and
passing over them costs a fifth of the time of the products. Values are rounded where transformers rounds them, or less
often; modules, weights and rope are transformers' own.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from eagle.target.compiled import NOISE, difference
from eagle.target.cpu_attention import Scratch, causal_attention
from eagle.target.families import TARGET_FAMILIES
from eagle.target.features import HIDDEN_STATE, aux_layers
from eagle.target.packing import Group, pack
from eagle.target.trunk import TrunkParts

#: What has weights in a layer that this computes.
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MODULES = {
    "input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    *(f"self_attn.{name}" for name in _ATTENTION),
}  # fmt: skip
#: Positions whose norm is computed at a time: what they take in float32 stays in the cache.
_NORM_ROWS = 512
#: Lengths of the sequences by which the two forward passes are compared, and how many tokens the first three share; the
#: others share nothing. Some have more than a block of attention, some less.
_LENGTHS, _SHARING, _SHARED = (70, 45, 33, 66, 40), 3, 20
#: So many features may differ by so many times the noise. Rounding alone turns single ones over, anything up to wholly:
#: of a trained model on random tokens 0.98 differ by 1.5 times the noise at most, and wrong ones by 6 times and more.
_NEARLY_ALL, _NOISES = 0.98, 4


class PackedTrunk:
    """A trunk of plain Llama layers, in bfloat16 on a CPU. trunk: transformers' own, which stays as it is."""

    def __init__(self, trunk: Any, parts: TrunkParts) -> None:
        self.trunk, self.parts = trunk, parts
        self.layers: list[Any] = list(parts.layers)
        config = trunk.config
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.width = self.layers[0].self_attn.q_proj.out_features // self.heads
        self.epsilon = config.rms_norm_eps
        self.scratch = Scratch()

    def features(
        self, sequences: Sequence[np.ndarray], names: Sequence[str] = (HIDDEN_STATE,)
    ) -> dict[str, torch.Tensor]:
        """The last hidden state and inputs of layers by name, ``[B, T, W]`` each, T the longest sequence's length; rows
        beyond a sequence's own mean nothing."""
        packed = pack(sequences)
        auxiliary = {name: layers for name in names if (layers := aux_layers(name))}
        wanted = {layer for layers in auxiliary.values() for layer in layers}
        inputs: dict[int, torch.Tensor] = {}
        groups = [_Indices(group) for group in packed.groups]
        embedding = self.parts.embedding
        count, hidden = len(packed.ids), embedding.shape[1]
        take = functools.partial(self.scratch.take, dtype=embedding.dtype)
        states, normed = take("states", count, hidden), take("normed", count, hidden)
        torch.index_select(embedding, 0, torch.from_numpy(packed.ids), out=states)
        cos, sin = (
            part[0, :, None] for part in self.trunk.rotary_emb(states, torch.from_numpy(packed.positions)[None])
        )
        for number, layer in enumerate(self.layers):
            if number in wanted:
                inputs[number] = states.clone()
            self._norm(states, layer.input_layernorm.weight, normed)
            self._attend(layer.self_attn, normed, cos, sin, groups, states)
            self._norm(states, layer.post_attention_layernorm.weight, normed)
            gate = self._linear(layer.mlp.gate_proj, normed, "gate")
            up = self._linear(layer.mlp.up_proj, normed, "up")
            _add_linear(states, layer.mlp.down_proj, torch.nn.functional.silu(gate, inplace=True).mul_(up))
        self._norm(states, self.parts.norm, normed)
        places = torch.from_numpy(packed.places)

        def dealt(rows: torch.Tensor) -> torch.Tensor:
            return rows.index_select(0, places.flatten()).view(*places.shape, -1)

        found = {name: torch.cat([dealt(inputs[layer]) for layer in auxiliary[name]], -1) for name in auxiliary}
        return found | ({HIDDEN_STATE: dealt(normed)} if HIDDEN_STATE in names else {})

    def _attend(
        self,
        attention: Any,
        normed: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        groups: list[_Indices],
        states: torch.Tensor,
    ) -> None:
        """Adds to `states` what the attention makes of `normed`, ``[N, H]`` both."""
        query, key = (
            self._rotate(self._linear(attention.get_submodule(f"{name}_proj"), normed, name), cos, sin, name)
            for name in "qk"
        )
        value = self._linear(attention.v_proj, normed, "v")
        mixed = self.scratch.take("attended", *query.shape, dtype=query.dtype)
        for group in groups:
            queries, keys, values = (
                source.index_select(0, at.flatten()).view(*at.shape, -1, self.width).transpose(1, 2)
                for source, at in ((query, group.queries), (key, group.keys), (value, group.keys))
            )
            found = causal_attention(queries, keys, values, self.width**-0.5, self.scratch)
            torch.index_select(found.view(-1, query.shape[1]), 0, group.own, out=mixed[group.rows])
        _add_linear(states, attention.o_proj, mixed)

    def _linear(self, module: Any, rows: torch.Tensor, name: str) -> torch.Tensor:
        out = self.scratch.take(name, len(rows), module.out_features, dtype=rows.dtype)
        if module.bias is None:
            return torch.mm(rows, module.weight.t(), out=out)
        return torch.addmm(module.bias, rows, module.weight.t(), out=out)

    def _rotate(self, rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, name: str) -> torch.Tensor:
        """The rope of ``[N, heads * width]``: each half of a head with the other."""
        heads, half = rows.view(len(rows), -1, self.width), self.width // 2
        out = torch.mul(heads, cos, out=self.scratch.take(f"{name} rotated", *heads.shape, dtype=rows.dtype))
        out[..., :half].addcmul_(heads[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(heads[..., :half], sin[..., half:])
        return out.view(rows.shape)

    def _norm(self, rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """RMS norm, as transformers computes it: in float32, rounded before the weight."""
        for some, result in zip(rows.split(_NORM_ROWS), out.split(_NORM_ROWS), strict=True):
            exact = self.scratch.take("exact", *some.shape, dtype=torch.float32).copy_(some)
            size = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
            result.copy_(exact.mul_(size.square_().div_(rows.shape[1]).add_(self.epsilon).rsqrt_())).mul_(weight)


class _Indices:
    """A group's indices as tensors. queries: where those of the positions that attend stand."""

    def __init__(self, group: Group) -> None:
        self.keys, self.own = torch.from_numpy(group.keys), torch.from_numpy(group.own)
        self.queries, self.rows = self.keys[:, group.first :], group.rows


def _add_linear(states: torch.Tensor, module: Any, rows: torch.Tensor) -> None:
    states.addmm_(rows, module.weight.t())
    if module.bias is not None:
        states.add_(module.bias)


def packed_trunk(trunk: Any, parts: TrunkParts) -> PackedTrunk | None:
    """The trunk's forward pass in `PackedTrunk`'s way.

    None where the trunk is another than that computes; and, with a word on stderr, where that fails or its features are
    not those of transformers to the noise of the dtype.
    """
    weight, config = parts.embedding, trunk.config
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not hasattr(trunk, "rotary_emb"):
        return None
    # A window would show in long sequences alone, which are not compared below.
    if not TARGET_FAMILIES[config.model_type].plain or getattr(config, "sliding_window", None):
        return None
    for layer in parts.layers:
        modules = {name.rpartition(".")[0] for name, _ in layer.named_parameters()}
        if modules != _MODULES:
            return None
    ids = np.random.default_rng(0).integers(len(weight), size=(len(_LENGTHS), max(_LENGTHS)))
    ids[:_SHARING, :_SHARED] = ids[0, :_SHARED]
    own = torch.arange(max(_LENGTHS)) < torch.tensor(_LENGTHS)[:, None]
    try:
        packed = PackedTrunk(trunk, parts)
        with torch.inference_mode():
            expected = trunk(input_ids=torch.from_numpy(ids), use_cache=False).last_hidden_state[own]
            found = packed.features([row[:length] for row, length in zip(ids, _LENGTHS, strict=True)])[HIDDEN_STATE][
                own
            ]
    except Exception as error:  # a trunk that looks like Llama's and is none fails somewhere
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(f"note: packed features failed, going on with transformers' own: {reason}", file=sys.stderr)
        return None
    noise = NOISE[weight.dtype]
    most, nearly_all = difference(found, expected), difference(found, expected, _NEARLY_ALL)
    if not (most < noise and nearly_all < _NOISES * noise):
        print(
            f"note: packed features differ by {most:.1%}, some by {nearly_all:.1%}, going on with transformers' own",
            file=sys.stderr,
        )
        return None
    return packed
