"""Low-rank adapters on convolutions, grouped and depthwise ones too.

The update is one of the weight (out, in / groups, k, k), seen as a matrix with a row for each output channel, as LoCon
has it (https://github.com/KohakuBlueleaf/LyCORIS): scale * B A, A (r, in / groups, k, k), B (out, r). Without groups it
is a convolution to r channels and a 1x1 one behind it, which is PEFT's form. With groups all of them share A, so that
the update is one of the grouped weight and can be merged; PEFT's would be one of a weight without groups.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visft_ds.models.adapted import AdaptedLayer, lengths, resized
from visft_ds.ops import no_autocast


class LoRAConv2d(AdaptedLayer):
    """An `nn.Conv2d` with a low-rank update; parameters as the file says, lora_magnitude (out,) or None."""

    def __init__(
        self,
        base: nn.Conv2d,
        *,
        rank: int,
        alpha: float,
        magnitude: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        out, *fan_in = base.weight.shape
        super().__init__(base, (rank, *fan_in), (out, rank), rank=rank, alpha=alpha, magnitude=magnitude)
        self.stride, self.padding, self.dilation, self.groups = base.stride, base.padding, base.dilation, base.groups
        self.out_channels, self.kernel_size = out, base.kernel_size
        self.start(generator)

    def first_magnitude(self, weight: Tensor) -> Tensor:
        """See `AdaptedLayer`."""
        return lengths(weight.to(torch.promote_types(weight.dtype, torch.float32)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H', W') in the dtype that torch chooses for a convolution."""
        how: tuple[Any, Any, Any] = (self.stride, self.padding, self.dilation)
        y = F.conv2d(x, self.weight, self.bias, *how, self.groups)
        if self.merged:
            return y
        if self.groups == 1:
            inner = F.conv2d(x, self.lora_A, None, *how)
            y = y + self.scale * F.conv2d(inner, self.lora_B[:, :, None, None])
        else:
            y = y + F.conv2d(x, self._update(), None, *how, self.groups)
        if self.lora_magnitude is None:
            return y
        with torch.no_grad():
            length = lengths(self.weight.to(self.lora_B.dtype) + self._update())
        excess = (self.lora_magnitude / length - 1).view(1, -1, 1, 1)  # 0 where nothing has been learnt
        product = y if self.bias is None else y.to(excess.dtype) - self.bias.to(excess.dtype).view(1, -1, 1, 1)
        return (y + excess * product).to(y.dtype)

    def _update(self) -> Tensor:
        """scale * B A in the shape of the weight, in the precision of the adapters."""
        with no_autocast(self.lora_A.device):
            return self.scale * torch.einsum("or,rikl->oikl", self.lora_B, self.lora_A)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The dense change of the weight, which is not merged, in the precision of the adapters."""
        update = self._update()
        return update if self.lora_magnitude is None else resized(self.weight, update, self.lora_magnitude)

    def extra_repr(self) -> str:
        return (
            f"{tuple(self.weight.shape)}, stride={self.stride}, groups={self.groups}, bias={self.bias is not None}, "
            f"rank={self.rank}, alpha={self.alpha:g}, merged={self.merged}"
        )
