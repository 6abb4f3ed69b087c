"""Layers of the vision transformers. Letters: B images, H W pixels, h w patch grid, N tokens, D width.

Every parameter is used in the forward of the module that owns it and nowhere else: ZeRO-3 gathers them per module, and
an adapter that replaces a module is bypassed if its parent reads the weight (as timm's EVA attention does).

Constructors leave parameters uninitialised; `eva_vit.build_backbone` fills them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visft_ds.ops import matmul_dtype, no_autocast
from visft_ds.ops.attention import Packing, attention, attention_packed
from visft_ds.ops.gelu import gelu


def _empty(*shape: int, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))


class Linear(nn.Module):
    """Linear layer whose bias may come with the call. Computes in autocast's dtype, else in the weight's.

    Parameters: weight (out, in), bias (out,) or None.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = _empty(out_features, in_features, device=device, dtype=dtype)
        self.register_parameter("bias", _empty(out_features, device=device, dtype=dtype) if bias else None)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., in) -> (..., out). A bias given here replaces the module's own."""
        weight, bias = self.weight, self.bias if bias is None else bias
        dtype = matmul_dtype(weight)
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class LayerNorm(nn.Module):
    """Layer norm over the last axis; the result has the input's dtype, also under autocast, on every device.

    A residual stream in fp32 is thus normalised in fp32, and a 16-bit branch does not grow to fp32 on CUDA only.
    """

    def __init__(
        self,
        width: int,
        *,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _empty(width, device=device, dtype=dtype)
        self.bias = _empty(width, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        # Autocast on CUDA would keep an fp32 copy of a 16-bit input for the backward pass; the kernel sums in fp32.
        with no_autocast(x.device):
            return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens. Pixels right and below the last complete patch are dropped."""

    def __init__(
        self,
        patch_size: int,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.proj = Patches(patch_size, width, device=device, dtype=dtype)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h*w, D), row by row."""
        patches: Tensor = self.proj(images)
        # Every sum of the residual stream would inherit the order of the convolution, and a product of such an input
        # adds its bias in a second tensor.
        return patches.flatten(2).transpose(1, 2).contiguous()


class Patches(nn.Module):
    """The convolution of `PatchEmbed`: weight (D, 3, p, p), bias (D,), stride p."""

    def __init__(
        self,
        patch_size: int,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.weight = _empty(width, 3, patch_size, patch_size, device=device, dtype=dtype)
        self.bias = _empty(width, device=device, dtype=dtype)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D, H // p, W // p)."""
        dtype = matmul_dtype(self.weight)
        return F.conv2d(images.to(dtype), self.weight.to(dtype), self.bias.to(dtype), stride=self.patch_size)


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))) with the exact (erf) GELU."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden, device=device, dtype=dtype)
        self.fc2 = Linear(hidden, width, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        out: Tensor = self.fc2(gelu(self.fc1(x)))
        return out


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv projection, biases on q and v and none on k (BEiT, arXiv 2106.08254).

    Parameters: qkv.weight (3D, D) in the order q, k, v; q_bias, v_bias (D,); proj.weight (D, D), proj.bias (D,).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width, bias=False, device=device, dtype=dtype)
        self.q_bias = _empty(width, device=device, dtype=dtype)
        self.v_bias = _empty(width, device=device, dtype=dtype)
        self.proj = Linear(width, width, device=device, dtype=dtype)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """Attend, (B, N, D) -> (B, N, D), without `proj`; with a packing (1, T, D), the tokens of several images.

        The block applies `proj`, which it may recompute in the backward pass.
        """
        batch, length, width = x.shape
        qkv: Tensor = self.qkv(x, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]))
        q, k, v = qkv.view(batch, length, 3, self.num_heads, -1).unbind(2)  # (B, N, heads, d)
        if packing is None:
            mixed = attention(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)
        else:
            mixed = attention_packed(q[0], k[0], v[0], packing)
        return mixed.reshape(batch, length, width)


def resize_position_embeddings(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Position embeddings of a square grid, resized to another grid.

    Bicubic without antialiasing, as EVA-CLIP, LAVIS and ViSFT do. With antialias=True, as in timm, torch takes another
    bicubic kernel, so growing grids differ too and the features would not be those of the published adapters.

    Args:
        grid: (n*n, D), row by row.
        size: (h, w) wanted.

    Returns:
        (h*w, D) in the dtype of `grid`; `grid` itself where the size is already right.
    """
    side = round(grid.shape[0] ** 0.5)
    assert side * side == grid.shape[0], grid.shape
    if size == (side, side):
        return grid
    # Interpolated in at least fp32: the weights of the bicubic kernel are not exact in 16 bit.
    planes = grid.to(torch.promote_types(grid.dtype, torch.float32)).t().reshape(1, -1, side, side)
    resized = F.interpolate(planes, size=size, mode="bicubic", align_corners=False, antialias=False)
    return resized.flatten(2).squeeze(0).t().to(grid.dtype)


def stack_padded(maps: Sequence[Tensor]) -> Tensor:
    """[(h, w, ...)] -> (B, H, W, ...), padded below and on the right with 0 to the largest h and w."""
    height, width = (max(map_.shape[side] for map_ in maps) for side in (0, 1))
    inner = (0, 0) * (maps[0].ndim - 2)
    return torch.stack([F.pad(map_, (*inner, 0, width - map_.shape[1], 0, height - map_.shape[0])) for map_ in maps])
