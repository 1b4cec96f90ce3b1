"""The best linear draft, in one pass: ridge regression from ``[embed(x[t+1]), f[t]]`` to ``f[t+1]``.

Its weights become ``fc``; ``o_proj`` and ``down_proj`` start at zero, so that the untrained layer passes ``fc``'s
output through and training starts from that linear draft instead of from noise.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from eagle.drafts.alignment import Example
from eagle.drafts.eagle1.network import Eagle1Network
from eagle.drafts.network import DraftNetwork
from eagle.drafts.starts import StartData
from eagle.errors import RequestError, WorkError

#: Supervised positions are gathered until this many are together, then multiplied at once.
CHUNK = 4096
#: Relative to the mean diagonal of the normal equations: enough to make them well-posed, too little to bias.
RIDGE = 1e-4


class NormalEquations:
    """``XᵀX [2H, 2H]`` and ``XᵀY [2H, H]`` over supervised positions, summed in float64 on the CPU.

    The products of a chunk run in float32 on `device`; sums over chunks do not lose what float32 would.
    """

    def __init__(self, model: Eagle1Network, device: torch.device) -> None:
        size = model.config.hidden_size
        self.model, self.device = model, device
        self.xx = torch.zeros(2 * size, 2 * size, dtype=torch.float64)
        self.xy = torch.zeros(2 * size, size, dtype=torch.float64)
        self.positions = 0
        self._inputs: list[torch.Tensor] = []
        self._outputs: list[torch.Tensor] = []

    @torch.no_grad()
    def add(self, example: Example) -> None:
        """Take in the supervised positions of `example`; in the sums they are after `flush` at the latest.

        Raises: WorkError for features that are not finite.
        """
        chosen = example.supervised
        features, targets = example.features[chosen], example.targets[chosen]
        if not (features.isfinite().all() and targets.isfinite().all()):
            raise WorkError(
                f"The features of conversation {example.conversation} are not finite. Compute them again (float16 "
                "overflows on some models: use --dtype bfloat16), or leave that record out."
            )
        features = features.to(self.device).float()
        self._inputs.append(self.model.inputs(example.tokens[chosen].to(self.device), features))
        self._outputs.append(targets.to(self.device).float())
        self.positions += len(features)
        if sum(map(len, self._inputs)) >= CHUNK:
            self.flush()

    @torch.no_grad()
    def flush(self) -> None:
        """Add what was gathered to the sums."""
        if not self._inputs:
            return
        x, y = torch.cat(self._inputs), torch.cat(self._outputs)
        self._inputs, self._outputs = [], []
        self.xx += (x.T @ x).cpu().double()
        self.xy += (x.T @ y).cpu().double()

    def solve(self) -> torch.Tensor:
        """The ridge solution as ``fc.weight`` ``[H, 2H]`` float32."""
        self.flush()
        ridge = RIDGE * self.xx.diagonal().mean()
        left = self.xx + ridge * torch.eye(len(self.xx), dtype=torch.float64)
        return torch.cholesky_solve(self.xy, torch.linalg.cholesky(left)).T.float().contiguous()


def closed_form(network: DraftNetwork, data: StartData) -> str:
    """Make `network` the best linear draft of all processes' examples, each taking its share of them.

    Raises: RequestError where no position is supervised; WorkError for features that are not finite.
    """
    assert isinstance(network, Eagle1Network)
    started = time.monotonic()
    equations = NormalEquations(network, data.device)
    for example in data.examples:
        equations.add(example)
        if equations.positions >= data.positions:
            break
    equations.flush()
    equations.xx, equations.xy = data.reduce(equations.xx), data.reduce(equations.xy)
    if not equations.xx.any():
        raise RequestError(
            f"No position of the training records is supervised within --max_len {data.max_len} tokens: every reply "
            "comes later. Raise --max_len."
        )
    start_from(network, equations.solve())
    seconds = time.monotonic() - started
    return f"closed-form start from {equations.positions:,} positions per process in {seconds:.1f} s"


@torch.no_grad()
def start_from(model: Eagle1Network, fc_weight: torch.Tensor) -> None:
    """Make `model` the linear draft of `fc_weight`: its layer changes nothing until it is trained."""
    model.fc.weight.copy_(fc_weight)
    layer = model.layer
    for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
        nn.init.zeros_(linear.weight)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
