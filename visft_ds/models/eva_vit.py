"""The vision towers of EVA-CLIP (https://github.com/baaivision/EVA, EVA-CLIP): image -> feature map.

EVA-ViT-E norms the results of the branches (x + norm(attn(x)), "post-norm"), EVA-ViT-G their inputs;
otherwise they are alike: no dropout, layer scale, rotary embedding or gated MLP. As in ViSFT
(https://arxiv.org/abs/2401.10222) there is no class token unless asked for, but `pos_embed` always keeps its
entry first, as in every published file.

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
from visft_ds.settings.bands import Bands

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
        if bias is None:
            bias = self.bias
        if bias is not None:
            bias = bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class LayerNorm(nn.LayerNorm):
    """Layer norm in the dtype of its input. Of a 16-bit one autocast would keep a copy in fp32, so blocks
    have it off.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        bias = self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Patches(nn.Conv2d):
    """Images to tokens of patches, (B, n, H, W) -> (B, h*w, D), in the dtype of matrix products; pixels right
    and below the last complete patch are dropped."""

    def forward(self, images: Tensor) -> Tensor:
        dtype = autocast_dtype(images.device) or self.weight.dtype
        assert self.bias is not None
        weight = self.weight.to(dtype)
        bias = self.bias.to(dtype)
        cells = F.conv2d(images.to(dtype), weight, bias, stride=self.stride)
        # Contiguous, since every sum of the residual stream would inherit the order of the convolution.
        return cells.flatten(2).transpose(1, 2).contiguous()


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv, biases on q and v and none on k (BEiT, arXiv
    2106.08254).
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, images: int, packing: Packing | None = None) -> Tensor:
        """(B * N, D) -> (B * N, D), or packed (T, D), without `proj`, which the block applies and may
        recompute.
        """
        k_bias = torch.zeros_like(self.q_bias)
        bias = torch.cat([self.q_bias, k_bias, self.v_bias])
        qkv: Tensor = self.qkv(x, bias)
        head_width = x.shape[1] // self.num_heads
        parts = qkv.view(images, -1, 3, self.num_heads, head_width).unbind(2)  # (B, N, heads, d)
        if packing is not None:
            q, k, v = (part[0] for part in parts)
            return attention_packed(q, k, v, packing).flatten(1)
        q, k, v = (part.transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return mixed.transpose(1, 2).reshape(x.shape)


class Block(nn.Module):
    """Transformer block, with the norms on the branches' results (`post_norm`) or on their inputs."""

    def __init__(self, config: EvaViTConfig) -> None:
        super().__init__()
        self.post_norm = config.post_norm
        self.norm1 = LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config.width, config.num_heads)
        self.norm2 = LayerNorm(config.width, eps=1e-6)
        hidden_width = int(config.width * config.mlp_ratio)
        self.mlp = nn.ModuleDict(
            {"fc1": Linear(config.width, hidden_width), "fc2": Linear(hidden_width, config.width)}
        )

    def forward(
        self,
        x: Tensor,
        dtype: torch.dtype,
        packing: Packing | None = None,
        recompute: str = "none",
    ) -> Tensor:
        """(B, N, D) -> (B, N, D), in the dtype of the residual stream, its branches in `dtype`, without
        autocast; with a packing (1, T, D)."""
        stream = x.flatten(0, 1)  # rows cost the host less than a batch of them
        if recompute == "block":
            stream, branch = _recomputed(self, stream, dtype, x.shape[0], packing)
        else:
            recompute_mlp = recompute == "mlp"
            stream, branch = self.branches(stream, dtype, x.shape[0], packing, recompute_mlp=recompute_mlp)
        if self.post_norm:
            branch = self.norm2(branch)
        return (stream + branch).view(x.shape)

    def branches(
        self,
        stream: Tensor,
        dtype: torch.dtype,
        images: int,
        packing: Packing | None,
        *,
        recompute_mlp: bool = False,
        last_product: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream (B * N, D) after the first branch, and the result of the second one, to which
        its norm was not applied yet.

        Without `last_product` that result has gradients, but no values.
        """
        branch = stream if self.post_norm else self.norm1(stream)
        branch = branch.to(dtype)
        attended = self.attn(branch, images, packing)
        del branch  # the MLP needs most memory of all
        if recompute_mlp:
            return _checkpoint(self._projected_and_mlp, stream, attended)
        return self._projected_and_mlp(stream, attended, last_product)

    def _projected_and_mlp(
        self, x: Tensor, attended: Tensor, last_product: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The residual stream after the first branch, and the result of the second branch,
        fc2(gelu(fc1(x))).
        """
        branch = self.attn.proj(attended)
        if self.post_norm:
            branch = self.norm1(branch)
        x = x + branch
        del branch  # the MLP needs most memory of all
        normed = x if self.post_norm else self.norm2(x)
        hidden = self.mlp["fc1"](normed.to(attended.dtype))
        if last_product:
            return x, self.mlp["fc2"](gelu(hidden))
        return x, _ProductLeftOut.apply(hidden, self.mlp["fc2"].weight)


class _ProductLeftOut(torch.autograd.Function):
    """A GELU and a linear layer that does not train, whose result nobody reads: their gradient alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_empty(()).expand(len(x), len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, weight = ctx.saved_tensors
        of_gelu = grad @ weight.to(grad.dtype)
        return torch.ops.aten.gelu_backward.grad_input(of_gelu, x, grad_input=of_gelu), None


class _Recomputed(torch.autograd.Function):
    """Activation checkpointing without a hook for each tensor, which in host time cost more than the second
    forward.

    What trains comes as an argument, so that its gradients leave the graph where they would without
    recomputation. `again` is what the backward pass runs in place of `run`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[Tensor], tuple[Tensor, Tensor]],
        again: Callable[[Tensor], tuple[Tensor, Tensor]],
        x: Tensor,
        *trained: nn.Parameter,
    ) -> tuple[Tensor, Tensor]:
        ctx.again = again
        ctx.trained = trained
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[2]
        x = saved.detach().requires_grad_(needs_x)
        with torch.enable_grad(), autocast_to(x.device, None):
            outputs = ctx.again(x)
        inputs = [x, *ctx.trained] if needs_x else ctx.trained
        gradients = torch.autograd.grad(outputs, inputs, grads, allow_unused=True)
        if needs_x:
            return None, None, *gradients
        return None, None, None, *gradients


def _recomputed(
    block: Block,
    stream: Tensor,
    dtype: torch.dtype,
    images: int,
    packing: Packing | None,
) -> tuple[Tensor, Tensor]:
    """`Block.branches`, computed again in the backward pass but for the last product, a third of the block,
    which only its norm reads.

    By torch's checkpointing, which leaves that product out by itself, under ZeRO-3.
    """
    under_zero3 = hasattr(block.attn.q_bias, "ds_id")
    if under_zero3:
        return _checkpoint(block.branches, stream, dtype, images, packing)
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
    last_product_trains = any(parameter.requires_grad for parameter in block.mlp["fc2"].parameters())
    run = partial(block.branches, dtype=dtype, images=images, packing=packing)
    again = partial(run, last_product=last_product_trains)
    stream, branch = _Recomputed.apply(run, again, stream, *trained)
    return stream, branch


class EvaViT(nn.Module):
    """An EVA-CLIP vision tower without its projection head.

    The residual stream is fp32 under autocast and never narrower than `pos_embed`. `embed`, `blocks`, `norm`
    and `feature_map` are the forward in pieces, for a pipeline; under ZeRO-3 call the module itself.
    `layers_read` are the numbers of the blocks that are read (none: the last).
    """

    #: ImageNet statistics; all three tasks of ViSFT's code use them, not CLIP's (mmf/common/constants.py).
    pixel_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    pixel_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    first_weight = "patch_embed.proj.weight"  #: name of the weights that see pixels
    #: What the backward pass recomputes: "none"; each "block"; or the "mlp", whose hidden activations are the
    #: widest, and the attention's projection in front of it.
    recompute = "none"
    #: Images of a stream with several sizes are packed even where those of a batch are alike.
    one_by_one = False

    def __init__(self, config: EvaViTConfig, bands: Bands | None = None) -> None:
        super().__init__()
        self.bands = bands  #: in place of three colours
        if bands is not None:
            self.pixel_mean = bands.mean
            self.pixel_std = bands.std
        if config.width % config.num_heads or config.image_size % config.patch_size:
            raise ValueError(f"{config}: num_heads must divide the width, and patch_size the image_size")
        self.config = config
        self.width = config.width
        self.patch_size = config.patch_size
        self.image_size = config.image_size
        self.post_norm = config.post_norm
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width)) if config.class_token else None
        positions = 1 + (config.image_size // config.patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, config.width))
        channels = len(self.pixel_mean)
        patches = Patches(channels, config.width, config.patch_size, stride=config.patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=patches))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = LayerNorm(config.width, eps=1e-6)
        self.depth = config.depth
        self.layers_read: tuple[int, ...] = ()
        self.pruning = ""  #: see `TimmBackbone.pruning`, of timm's model of this tower

    def forward(
        self, images: Tensor, frames: Grids | None = None, *, prefixes: bool = False
    ) -> tuple[Tensor, ...]:
        """Maps (B, D, h, w), channels last, behind the blocks that are read, each after the last norm; with
        `prefixes`, then the class token (B, 1, D) of each, if any.

        Args:
            images: (B, 3, H, W), already normalised, at least one patch.
            frames: (height, width) of each image within the padded batch in pixels, whole patches. Features
                are then those of each image alone: the patches of all images are packed into one row,
                positions are resized to each image's own grid, and (h, w) is the largest of these grids, with
                0 beyond each. None: all images fill the batch.
        """
        grids = None if frames is None else [self._grid(frame) for frame in frames]
        streams = self.tokens(images, grids)
        pairs = [self.map_of(tokens, images.shape[-2:], grids) for tokens in streams]
        maps, class_tokens = zip(*pairs, strict=True)
        if prefixes and self.cls_token is not None:
            return (*maps, *class_tokens)
        return maps

    def packing(self, grids: Grids | None, device: torch.device) -> Packing | None:
        """Packing of images of these grids; None for a batch."""
        return None if grids is None else Packing.of(self._lengths(grids), device)

    def map_of(self, tokens: Tensor, size: Sequence[int], grids: Grids | None) -> tuple[Tensor, Tensor]:
        """The map (B, D, h, w), and the class tokens (B, 1, D), or (B, 0, D), of tokens of images of this
        height and width, or of packed tokens (1, T, D).
        """
        before = self._prefix_tokens()
        if grids is None:
            return self.feature_map(tokens, size), tokens[:, :before]
        images = tokens[0].split(self._lengths(grids))
        maps = [image[before:].unflatten(0, grid) for image, grid in zip(images, grids, strict=True)]
        return stacked(maps), stacked([image[:before] for image in images])

    def _grid(self, size: Sequence[int]) -> tuple[int, int]:
        """(height, width) in whole patches of an image of this size in pixels."""
        height, width = size
        return height // self.patch_size, width // self.patch_size

    def _prefix_tokens(self) -> int:
        """Number of tokens in front of the patches of an image."""
        return 0 if self.cls_token is None else 1

    def _lengths(self, grids: Grids) -> list[int]:
        """Tokens of each image."""
        before = self._prefix_tokens()
        return [before + height * width for height, width in grids]

    def tokens(self, images: Tensor, grids: Grids | None = None) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> (B, [1 +] h*w, D), or packed (1, T, D), normed, behind each block that is read; the
        class token, if there is one, first."""
        read = self.layers_read or (self.depth - 1,)
        packing = self.packing(grids, images.device)
        streams = self.run_blocks(self.blocks, self.embed(images, grids), packing, read)
        return tuple(self.norm(stream) for stream in streams)

    def embed(self, images: Tensor, grids: Grids | None = None) -> Tensor:
        """Input of the first block: (B, 3, H, W) -> (B, [1 +] h*w, D), or (1, T, D), the patches of `grids`
        packed.
        """
        patches = self.patch_embed(images)
        if autocast_dtype(patches.device) is not None:
            patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
        size = self._grid(images.shape[-2:])
        if grids is None:
            return self._placed(patches, size)
        # Patches do not overlap, so the padded batch was embedded at once: ZeRO-3 expects one call on every
        # rank.
        rows = []
        for cells, (height, width) in zip(patches.unflatten(1, size), grids, strict=True):
            inside = cells[:height, :width].flatten(0, 1)
            rows.append(self._placed(inside[None], (height, width)))
        return torch.cat(rows, dim=1)

    def _placed(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches (B, h*w, D) of a grid with their positions, behind the class token if there is one."""
        tokens = patches + resized_positions(self.pos_embed[0, 1:], grid)
        if self.cls_token is None:
            return tokens
        first = (self.cls_token + self.pos_embed[:, :1]).to(tokens.dtype)
        return torch.cat([first.expand(tokens.shape[0], -1, -1), tokens], dim=1)

    def run_blocks(
        self,
        blocks: Iterable[nn.Module],
        x: Tensor,
        packing: Packing | None = None,
        read: Sequence[int] = (0,),
    ) -> list[Tensor]:
        """The residual stream behind each of the blocks whose number is in `read`.

        Blocks compute in autocast's dtype, else in that of their matrices, and are recomputed in the backward
        pass as `recompute` says.
        """
        trains = self.training and torch.is_grad_enabled()
        policy = self.recompute if trains else "none"
        autocast = autocast_dtype(x.device)
        streams = []
        with autocast_to(x.device, None):  # once for all blocks: it costs the host a tenth of a small block
            for number, block in enumerate(blocks):
                assert isinstance(block, Block)
                # Not `qkv.weight`, which ZeRO-3 would gather.
                dtype = autocast or next(block.attn.qkv.parameters()).dtype
                x = block(x, dtype, packing, policy)
                if number in read:
                    streams.append(x)
        return streams

    def describe(self) -> str:
        """A few words for the console."""
        text = f"width {self.width}, {self.depth} blocks"
        if self.layers_read:
            names = [f"blocks.{number}" for number in self.layers_read]
            text += f", read after {', '.join(names)}"
        return text

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(D, pixels to a cell) of each map."""
        shape = (self.width, self.patch_size)
        return (shape,) * max(1, len(self.layers_read))

    def ends(self) -> list[str]:
        """Names of the blocks that can be read, by number."""
        return [f"blocks.{index}" for index in range(self.depth)]

    def read_after(self, layers: Sequence[int]) -> None:
        """Leave out the blocks behind these; the last norm stays. Raises ValueError for a block that it
        lacks.
        """
        self.layers_read = tuple(layers)
        last = last_block(layers, self.ends(), "the tower")
        del self.blocks[last + 1 :]
        self.depth = len(self.blocks)
        if len(layers) == 1:
            self.pruning = f"model.prune_intermediate_layers([{last}])"
        else:
            indices = f"indices={list(layers)}, norm=True, intermediates_only=True"
            self.pruning = f"model.forward_intermediates(images, {indices})"

    def feature_map(self, tokens: Tensor, size: Sequence[int]) -> Tensor:
        """(B, [1 +] h*w, D), of images of this height and width -> (B, D, h, w); the class token is left
        out.
        """
        patches = tokens[:, self._prefix_tokens() :]
        return patches.transpose(1, 2).unflatten(2, self._grid(size))


def last_block(layers: Sequence[int], ends: Sequence[str], model: str) -> int:
    """The last of the blocks that are read.

    Raises:
        ValueError: a block that is not among `ends`, the names of those of `model`; or the numbers descend.
    """
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"visft.model.out_indices: {list(layers)} must ascend")
    last = max(layers)
    if last >= len(ends):
        raise ValueError(
            f"visft.model.out_indices: no block {last}: {model} has 0 to {len(ends) - 1} ({', '.join(ends)})"
        )
    return last


def resized_positions(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Positions (n*n, D) of a square grid for another one, (h*w, D), in the dtype of `grid`.

    Bicubic without antialiasing, as EVA-CLIP, LAVIS and ViSFT do; timm's antialias=True gives other features.
    """
    side = math.isqrt(len(grid))
    if size == (side, side):
        return grid
    # Interpolated in at least fp32: the weights of the bicubic kernel are not exact in 16 bit.
    precise = grid.to(torch.promote_types(grid.dtype, torch.float32))
    planes = precise.t().reshape(1, -1, side, side)
    resized = F.interpolate(planes, size=size, mode="bicubic")
    return resized.flatten(2)[0].t().to(grid.dtype)


def stacked(of_images: Sequence[Tensor]) -> Tensor:
    """Maps [(h, w, D)] of some images as (B, D, H, W), padded below and on the right with 0 to the largest h
    and w; or their tokens [(P, D)] as (B, P, D).
    """
    if of_images[0].ndim == 2:
        return torch.stack(list(of_images))
    height = max(map_.shape[0] for map_ in of_images)
    width = max(map_.shape[1] for map_ in of_images)
    padded = []
    for map_ in of_images:
        below = height - map_.shape[0]
        right = width - map_.shape[1]
        padded.append(F.pad(map_, (0, 0, 0, right, 0, below)))
    return torch.stack(padded).permute(0, 3, 1, 2)
