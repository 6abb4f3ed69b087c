"""The vision towers of EVA-CLIP (https://github.com/baaivision/EVA, EVA-CLIP): image -> feature map.

EVA-ViT-E norms the results of the branches (x + norm(attn(x)), "post-norm"), EVA-ViT-G their inputs;
otherwise they are
alike: no dropout, layer scale, rotary embedding or gated MLP. As in ViSFT (https://arxiv.org/abs/2401.10222)
there is no class token unless asked for, but `pos_embed` always keeps its entry first, as in every published
file.

Every parameter is used in the forward of the module that owns it alone: ZeRO-3 gathers them per module.
Letters: B images, H W pixels, h w patch grid, N tokens, T tokens of several images, D width.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from visft_ds.ops import autocast_dtype, autocast_to, gelu
from visft_ds.ops.attention import Packing, attention_packed

Grids = Sequence[tuple[int, int]]  #: (height, width) of each image of a batch, in patches or pixels


@dataclass(frozen=True)
class EvaViTConfig:
    """Shape of a tower. `image_size` is the one the stored position embeddings belong to; any size can be
    fed.
    """

    width: int
    depth: int
    num_heads: int
    mlp_ratio: float  #: hidden width of the MLP = int(width * mlp_ratio)
    patch_size: int = 14
    image_size: int = 224
    post_norm: bool = False
    class_token: bool = False


PRESETS = {
    "eva_e": EvaViTConfig(width=1792, depth=64, num_heads=16, mlp_ratio=15360 / 1792, post_norm=True),
    "eva_g": EvaViTConfig(width=1408, depth=40, num_heads=16, mlp_ratio=4.3637),
    "debug": EvaViTConfig(width=192, depth=4, num_heads=4, mlp_ratio=4.0, image_size=112),
}


#: torch's activation checkpointing. Blocks have no dropout, so no random state is restored.
_checkpoint = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class Linear(nn.Linear):
    """A linear layer in the dtype of its input; its bias may come with the call."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        bias = self.bias if bias is None else bias
        return F.linear(x, self.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    """Layer norm in the dtype of its input; of a 16-bit one autocast would keep an fp32 copy: blocks have it
    off.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(
            x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
        )


class Patches(nn.Conv2d):
    """Images to tokens of patches, (B, 3, H, W) -> (B, h*w, D), in the dtype of matrix products; pixels right
    and below the last complete patch are dropped."""

    def forward(self, images: Tensor) -> Tensor:
        dtype = autocast_dtype(images.device) or self.weight.dtype
        assert self.bias is not None
        map_ = F.conv2d(images.to(dtype), self.weight.to(dtype), self.bias.to(dtype), stride=self.stride)
        # Contiguous, since every sum of the residual stream would inherit the order of the convolution.
        return map_.flatten(2).transpose(1, 2).contiguous()


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv, biases on q and v and none on k (BEiT, arXiv
    2106.08254).
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, images: int, packing: Packing | None = None) -> Tensor:
        """(B * N, D) -> (B * N, D), or packed (T, D), without `proj`, which the block applies and may
        recompute.
        """
        q_bias, v_bias = self.q_bias, self.v_bias
        qkv: Tensor = self.qkv(x, torch.cat([q_bias, torch.zeros_like(q_bias), v_bias]))
        q, k, v = qkv.view(images, -1, 3, self.num_heads, x.shape[1] // self.num_heads).unbind(
            2
        )  # (B, N, heads, d)
        if packing is None:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        else:
            mixed = attention_packed(q[0], k[0], v[0], packing)
        return mixed.reshape(-1, mixed.shape[-2] * mixed.shape[-1])


class Block(nn.Module):
    """Transformer block, with the norms on the branches' results (`post_norm`) or on their inputs."""

    def __init__(self, config: EvaViTConfig) -> None:
        super().__init__()
        self.post_norm = config.post_norm
        self.norm1 = LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config.width, config.num_heads)
        self.norm2 = LayerNorm(config.width, eps=1e-6)
        hidden = int(config.width * config.mlp_ratio)
        self.mlp = nn.ModuleDict({"fc1": Linear(config.width, hidden), "fc2": Linear(hidden, config.width)})

    def forward(
        self, x: Tensor, dtype: torch.dtype, packing: Packing | None = None, recompute_mlp: bool = False
    ) -> Tensor:
        """(B, N, D) -> (B, N, D), in the dtype of the residual stream, its branches in `dtype`, without
        autocast; with a packing (1, T, D)."""
        stream = x.flatten(0, 1)  # rows cost the host less than a batch of them
        rest = partial(_checkpoint, self._projected_and_mlp) if recompute_mlp else self._projected_and_mlp
        # What the first branch takes and gives gets no name here, which would keep it in memory until the
        # block ends.
        stream, branch = rest(
            stream, self.attn((stream if self.post_norm else self.norm1(stream)).to(dtype), len(x), packing)
        )
        return (stream + (self.norm2(branch) if self.post_norm else branch)).view(x.shape)

    def _projected_and_mlp(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream after the first branch, and the result of the second branch,
        fc2(gelu(fc1(x))).
        """
        x = x + (self.norm1(self.attn.proj(attended)) if self.post_norm else self.attn.proj(attended))
        given = x if self.post_norm else self.norm2(x)
        return x, self.mlp["fc2"](gelu(self.mlp["fc1"](given.to(attended.dtype))))


class _Recomputed(torch.autograd.Function):
    """Activation checkpointing without a hook for each tensor, which in host time cost more than the second
    forward.

    What trains comes as an argument, so that its gradients leave the graph where they would without
    recomputation.
    """

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor, *trained: nn.Parameter) -> Tensor:
        ctx.run, ctx.trained = run, trained
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        need_x = ctx.needs_input_grad[1]
        x = kept.detach().requires_grad_(need_x)
        with torch.enable_grad(), autocast_to(x.device, None):
            out = ctx.run(x)
        found = torch.autograd.grad(out, [*([x] if need_x else []), *ctx.trained], grad, allow_unused=True)
        return None, *(found if need_x else (None, *found))


def recomputed(block: Block, x: Tensor, dtype: torch.dtype, packing: Packing | None) -> Tensor:
    """A block that is computed again in the backward pass: by torch under ZeRO-3, and if nothing follows the
    last product of the block, a third of it, which torch then leaves out."""
    parameters = list(block.parameters())
    followed = block.post_norm or any(each.requires_grad for each in block.mlp["fc2"].parameters())
    if not followed or hasattr(parameters[0], "ds_id"):
        return _checkpoint(block, x, dtype, packing)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    out: Tensor = _Recomputed.apply(lambda kept: block(kept, dtype, packing), x, *trained)
    return out


class EvaViT(nn.Module):
    """An EVA-CLIP vision tower without its projection head.

    The residual stream is fp32 under autocast and never narrower than `pos_embed`. `embed`, `blocks`, `norm`
    and `feature_map` are the forward in pieces, for a pipeline; under ZeRO-3 call the module itself.
    `layers_read` are the numbers of the blocks that are read (none: the last).
    """

    #: ImageNet statistics; all three tasks of ViSFT's code use them, not CLIP's (mmf/common/constants.py).
    pixel_mean, pixel_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    #: What the backward pass recomputes: "none"; each "block"; or the "mlp", whose hidden activations are the
    #: widest, and the attention's projection in front of it.
    recompute = "none"
    #: Images of a stream with several sizes are packed even where those of a batch are alike.
    one_by_one = False

    def __init__(self, config: EvaViTConfig) -> None:
        super().__init__()
        if config.width % config.num_heads or config.image_size % config.patch_size:
            raise ValueError(f"{config}: num_heads must divide the width, and patch_size the image_size")
        self.config, self.width, self.patch_size = config, config.width, config.patch_size
        self.image_size, self.num_heads, self.post_norm = (
            config.image_size,
            config.num_heads,
            config.post_norm,
        )
        positions = 1 + (config.image_size // config.patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width)) if config.class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, config.width))
        patches = Patches(3, config.width, config.patch_size, stride=config.patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=patches))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = LayerNorm(config.width, eps=1e-6)
        self.depth, self.layers_read, self.pruning = config.depth, tuple[int, ...](), ""

    def forward(
        self, images: Tensor, frames: Grids | None = None, *, prefixes: bool = False
    ) -> tuple[Tensor, ...]:
        """(B, 3, H, W), already normalised, at least one patch -> the maps (B, D, h, w) behind the blocks
        that are read, each after the last norm, channels last; with `prefixes`, then the class token (B, 1,
        D) of each, if any.

        With `frames`, the (height, width) of each image within the padded batch in whole patches, features
        are those of each image alone: the patches of all images are packed into one row, positions are
        resized to each image's own grid, and (h, w) is the largest of these grids, with 0 beyond each.
        Without, all images fill the batch.
        """
        if frames is None:
            found = self.tokens(images)
            first = [tokens[:, :1] for tokens in found] if prefixes and self.cls_token is not None else []
            return (*(self.feature_map(tokens, images.shape[-2:]) for tokens in found), *first)
        grids = [(height // self.patch_size, width // self.patch_size) for height, width in frames]
        packing = self.packing(grids, images.device)
        maps, first = list[Tensor](), list[Tensor]()
        for tokens in self.tokens(images, grids, packing):
            map_, class_tokens = self.unpacked(tokens, grids)
            maps.append(map_)
            if prefixes and class_tokens is not None:
                first.append(class_tokens)
        return (*maps, *first)

    def packing(self, grids: Grids, device: torch.device) -> Packing:
        """Packing of images of these grids."""
        return Packing.of(self._lengths(grids), device)

    def unpacked(self, tokens: Tensor, grids: Grids) -> tuple[Tensor, Tensor | None]:
        """Packed tokens (1, T, D) -> the map (B, D, h, w), and the class tokens (B, 1, D), if any."""
        before = int(self.cls_token is not None)
        images = tokens[0].split(self._lengths(grids))
        cells = [image[before:].unflatten(0, grid) for image, grid in zip(images, grids, strict=True)]
        class_tokens = torch.stack([image[:1] for image in images]) if before else None
        return stack_padded(cells).permute(0, 3, 1, 2), class_tokens

    def _lengths(self, grids: Grids) -> list[int]:
        """Tokens of each image."""
        before = int(self.cls_token is not None)
        return [before + height * width for height, width in grids]

    def tokens(
        self, images: Tensor, grids: Grids | None = None, packing: Packing | None = None
    ) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> (B, [1 +] h*w, D), or packed (1, T, D), normed, behind each block that is read; the
        class token, if there is one, first."""
        read = self.layers_read or (self.depth - 1,)
        return tuple(
            self.norm(x) for x in self.run_blocks(self.blocks, self.embed(images, grids), packing, read)
        )

    def embed(self, images: Tensor, grids: Grids | None = None) -> Tensor:
        """Input of the first block: (B, 3, H, W) -> (B, [1 +] h*w, D), or (1, T, D), the patches of `grids`
        packed.
        """
        x = self.patch_embed(images)
        if autocast_dtype(x.device) is not None:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        # Patches do not overlap: embedded once for the padded batch, where ZeRO-3 expects one call on every
        # rank.
        size = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        parts = [(x, size)]
        if grids is not None:
            maps = zip(x.unflatten(1, size), grids, strict=True)
            parts = [(cells[: grid[0], : grid[1]].flatten(0, 1)[None], grid) for cells, grid in maps]
        rows = []
        for part, grid in parts:
            row = part + resized_positions(self.pos_embed[0, 1:], grid)
            if self.cls_token is not None:
                first = (self.cls_token + self.pos_embed[:, :1]).to(row.dtype)
                row = torch.cat([first.expand(len(row), -1, -1), row], dim=1)
            rows.append(row)
        return rows[0] if grids is None else torch.cat(rows, dim=1)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Run the blocks through torch.compile from here on; numbers of images and tokens are symbols in
        it.
        """
        for block in self.blocks:
            block.compile(dynamic=True, backend=backend)

    def run_blocks(
        self,
        blocks: Iterable[nn.Module],
        x: Tensor,
        packing: Packing | None = None,
        read: Sequence[int] = (0,),
    ) -> list[Tensor]:
        """Run blocks in autocast's dtype, else in that of their matrices, recomputed in the backward pass as
        `recompute` says. Returns the stream behind each of those whose number is in `read`."""
        policy = self.recompute if self.training and torch.is_grad_enabled() else "none"
        autocast, found = autocast_dtype(x.device), []
        with autocast_to(x.device, None):  # once for all blocks: it costs the host a tenth of a small block
            for number, block in enumerate(blocks):
                assert isinstance(block, Block)
                # Not `qkv.weight`, which ZeRO-3 would gather.
                dtype = autocast or next(block.attn.qkv.parameters()).dtype
                if policy == "block":
                    x = recomputed(block, x, dtype, packing)
                else:
                    x = block(x, dtype, packing, policy == "mlp")
                if number in read:
                    found.append(x)
        return found

    def describe(self) -> str:
        """A few words for the console."""
        read = ", ".join(f"blocks.{number}" for number in self.layers_read)
        return f"width {self.width}, {self.depth} blocks" + (f", read after {read}" if read else "")

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(D, pixels to a cell) of each map."""
        return ((self.width, self.patch_size),) * max(1, len(self.layers_read))

    def ends(self) -> list[str]:
        """Names of the blocks that can be read, by number."""
        return [f"blocks.{index}" for index in range(self.depth)]

    def read_after(self, layers: Sequence[int]) -> None:
        """Leave out the blocks behind these; the last norm stays. Raises ValueError for a block that it
        lacks.
        """
        self.layers_read = tuple(layers)
        del self.blocks[block_number(layers, self.ends(), "the tower") + 1 :]
        self.depth = len(self.blocks)
        self.pruning = (
            f"model.prune_intermediate_layers([{self.depth - 1}])"  # of timm's model of the whole tower
        )
        if len(layers) > 1:
            indices = f"indices={list(layers)}, norm=True, intermediates_only=True"
            self.pruning = f"model.forward_intermediates(images, {indices})"

    def feature_map(self, tokens: Tensor, size: Sequence[int]) -> Tensor:
        """(B, [1 +] h*w, D), of images of this height and width -> (B, D, h, w); the class token is left
        out.
        """
        patches = tokens if self.cls_token is None else tokens[:, 1:]
        return patches.transpose(1, 2).unflatten(2, [side // self.patch_size for side in size])


def block_number(layers: Sequence[int], ends: Sequence[str], model: str) -> int:
    """The last of the blocks that are read. Raises ValueError for one that there is not, or an order that
    descends.
    """
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"visft.model.layers: {list(layers)} must ascend")
    if (number := max(layers)) >= len(ends):
        raise ValueError(
            f"visft.model.layers: no block {number}: {model} has 0 to {len(ends) - 1} ({', '.join(ends)})"
        )
    return number


def resized_positions(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Positions (n*n, D) of a square grid for another one, (h*w, D), in the dtype of `grid`.

    Bicubic without antialiasing, as EVA-CLIP, LAVIS and ViSFT do; timm's antialias=True gives other features.
    """
    side = math.isqrt(len(grid))
    if size == (side, side):
        return grid
    # Interpolated in at least fp32: the weights of the bicubic kernel are not exact in 16 bit.
    planes = grid.to(torch.promote_types(grid.dtype, torch.float32)).t().reshape(1, -1, side, side)
    return F.interpolate(planes, size=size, mode="bicubic").flatten(2)[0].t().to(grid.dtype)


def stack_padded(maps: Sequence[Tensor]) -> Tensor:
    """[(h, w, ...)] -> (B, H, W, ...), padded below and on the right with 0 to the largest h and w."""
    height, width = (max(map_.shape[side] for map_ in maps) for side in (0, 1))
    inner = (0, 0) * (maps[0].ndim - 2)
    return torch.stack(
        [F.pad(map_, (*inner, 0, width - map_.shape[1], 0, height - map_.shape[0])) for map_ in maps]
    )
