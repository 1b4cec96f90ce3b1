"""What the processes of a group tell each other: sums in float64 and the main process's tensors.

On backends that have no float64 (HCCL) numbers are sent as two float32 ones and added on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator

from eagle.device import has_float64


@dataclass(frozen=True, slots=True)
class Exchange:
    """Among the accelerator's processes; every one of them has to call."""

    accelerator: Accelerator

    def count(self, *numbers: int) -> list[int]:
        """The sums over all processes, on all of them."""
        own = torch.tensor(numbers, dtype=torch.long, device=self.accelerator.device)
        return [int(number) for number in self.accelerator.reduce(own).tolist()]

    def sum_on_main(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The sum over all processes of a float64 tensor, on the CPU of the main process; None on others.

        The tensor may be overwritten; on a CPU the main process's holds the sum.
        """
        accelerator = self.accelerator
        if accelerator.num_processes == 1:
            return tensor.cpu()
        if has_float64(accelerator.device):
            moved = tensor.to(accelerator.device).contiguous()
            torch.distributed.reduce(moved, dst=0)
            return moved.cpu() if accelerator.is_main_process else None
        return self._sum_of_pairs(tensor)

    def _sum_of_pairs(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """As `sum_on_main`, over a backend that sends no float64."""
        large = tensor.float()
        pair = torch.stack((large, (tensor - large.double()).float()))
        pairs = self.accelerator.gather(pair.to(self.accelerator.device)[None])
        return pairs.cpu().double().sum((0, 1)) if self.accelerator.is_main_process else None

    def from_main(self, tensor: torch.Tensor) -> None:
        """Give a tensor on the accelerator's device the main process's values, in place."""
        if self.accelerator.num_processes > 1:
            torch.distributed.broadcast(tensor, src=0)
