"""train.precision: the types that a network computes in, and how images become its input."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Precision:
    """`weights` is the type of weights and inputs; `compute` is autocast's, None for none of it."""

    weights: torch.dtype = torch.float32
    compute: torch.dtype | None = None

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context of a forward pass; it changes nothing where there is nothing to cast."""
        return torch.autocast(device.type, self.compute, enabled=self.compute is not None)


PRECISIONS = {
    "fp32": Precision(),
    "fp64": Precision(weights=torch.float64),
    "bf16": Precision(compute=torch.bfloat16),
    "fp16": Precision(compute=torch.float16),
}


class Normalization(nn.Module):
    """uint8 images -> the input of a network: channel by channel less `mean`, divided by `std`.

    Both are grey levels, 0 to 255, and lie on the device from the beginning: a tensor that is made
    there for each batch would hold it up.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        precision: Precision,
        device: torch.device,
    ) -> None:
        super().__init__()
        for name, levels in (("mean", mean), ("std", std)):
            values = torch.tensor(levels, dtype=precision.weights, device=device)
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(N,H,W,3) uint8 -> (N,3,H,W) in the type of the weights, channels last in memory.

        A row of pixels at a time: three numbers a time would take five times as long.
        """
        width = images.shape[2]
        rows = images.flatten(2).to(self.mean.dtype)
        rows.sub_(self.mean.repeat(width)).div_(self.std.repeat(width))
        return rows.view(images.shape).permute(0, 3, 1, 2)
