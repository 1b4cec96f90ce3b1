"""What every draft network can be asked to do, whatever it is built from.

A draft works on *states*, ``[..., H]``. At position t it takes the token x[t+1] and a state, and gives the state of
position t+1. The first state of a chain is read from the target's features; every later one is the draft's own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from eagle.drafts.chain_attention import Mask
from eagle.target.config import ModelConfig

#: Takes the keys and values of new rows, keeps them, and gives those of all rows so far: a KV cache's one verb.
Remember = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class DraftNetwork(nn.Module):
    """The network of one draft. Its trainable parameters carry the names they are saved under.

    reads: the target's features that `read` takes, by name. config: of its one layer. embed_tokens: the target's
    embedding ``[V, H]``, frozen. has_own_head: whether losses read a weight of the network's outside of its forward.
    """

    reads: str
    has_own_head: bool = False
    config: ModelConfig
    embed_tokens: nn.Embedding

    @property
    def ids(self) -> torch.Tensor | None:
        """The target's tokens ``[D]`` that the draft chooses among, ascending; None: all of them."""
        return None

    def read(self, features: torch.Tensor) -> torch.Tensor:
        """States ``[..., H]`` from the target's features ``[..., W]`` at the same positions."""
        raise NotImplementedError

    def forward(
        self,
        tokens: torch.Tensor,
        states: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: Mask = None,
        remember: Remember | None = None,
    ) -> torch.Tensor:
        """The next states ``[B, T, H]``; row t belongs to position t+1.

        tokens: ``[B, T]``, at position t the token x[t+1]. states: ``[B, T, H]``. positions: ``[B, T]``, default
        0..T-1. mask: None for causal attention, else boolean, broadcastable to ``[B, heads, T, T]``, True where a query
        may look; or an unrolled step's rule. remember: a key-value cache; the mask then spans its rows too,
        ``[B, heads, T, rows so far]``.
        """
        raise NotImplementedError

    def for_head(self, states: torch.Tensor) -> torch.Tensor:
        """What a head turns into logits, ``[..., H]``."""
        raise NotImplementedError

    def logits(self, states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """Over the target's vocabulary, ``[..., V]``. head: the target's ``lm_head`` ``[V, H]``."""
        return functional.linear(self.for_head(states), head)

    def freeze_head(self) -> None:
        """Leave its own head as it is; nothing to do where it has none."""

    def units(self) -> list[nn.Module]:
        """The large parts of the network, each of which FSDP gathers by itself while it runs."""
        raise NotImplementedError

    def trained_state(self) -> dict[str, torch.Tensor]:
        """The trainable weights by the names they are saved under."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def own_state(self) -> dict[str, torch.Tensor]:
        """What a saved draft must hold: the trained weights and the saved buffers; not what is the target's."""
        saved = self.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in saved.items() if not name.startswith("embed_tokens.")}
