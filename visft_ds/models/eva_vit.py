"""The vision towers of EVA-CLIP (https://github.com/baaivision/EVA, EVA-CLIP): image -> feature map.

EVA-ViT-E normalises the results of the branches (x + norm(attn(x)), "post-norm"), EVA-ViT-G their inputs (x +
attn(norm(x)), "pre-norm"); otherwise they are alike: no dropout, layer scale, rotary embedding or gated MLP. As in
ViSFT (https://arxiv.org/abs/2401.10222) there is no class token unless asked for, but `pos_embed` always keeps its
entry first, as in every published file.

Letters: B images, H W pixels, h w patch grid, N tokens, D width.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from visft_ds.models.layers import (
    Attention,
    LayerNorm,
    Mlp,
    PatchEmbed,
    resize_position_embeddings,
    stack_padded,
)
from visft_ds.ops import autocast_as, autocast_dtype, movable
from visft_ds.ops.attention import Packing

Grids = Sequence[tuple[int, int]]  #: (height, width) of each image of a batch, in patches or pixels


@dataclass(frozen=True)
class EvaViTConfig:
    """Shape of a tower. `image_size` is the one the stored position embeddings belong to; any size can be fed."""

    width: int
    depth: int
    num_heads: int
    mlp_ratio: float  #: hidden width of the MLP = int(width * mlp_ratio)
    patch_size: int = 14
    image_size: int = 224
    post_norm: bool = False  #: True: x + norm(attn(x)); False: x + attn(norm(x))


#: ImageNet statistics; all three tasks of ViSFT's code use them, not CLIP's (mmf/common/constants.py).
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)

PRESETS = {
    "eva_e": EvaViTConfig(width=1792, depth=64, num_heads=16, mlp_ratio=15360 / 1792, post_norm=True),
    "eva_g": EvaViTConfig(width=1408, depth=40, num_heads=16, mlp_ratio=4.3637),
    "debug": EvaViTConfig(width=192, depth=4, num_heads=4, mlp_ratio=4.0, image_size=112),
}


#: What of a block is recomputed in the backward pass: all of it; or the MLP, whose hidden activations are the widest,
#: and the attention's projection in front of it.
RECOMPUTE = ("block", "mlp")


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with activation checkpointing. Blocks have no dropout, so no random state is restored."""
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


class _Recomputed(torch.autograd.Function):
    """Activation checkpointing of a function of one tensor, without a hook for each tensor that it would have kept.

    In host time `torch.utils.checkpoint` costs more than the second forward itself. What trains comes as an argument,
    so that its gradients leave the graph where they would without recomputation, and engines see them there.
    """

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor, *trained: nn.Parameter) -> Tensor:
        ctx.run, ctx.trained, ctx.autocast = run, trained, autocast_dtype(x.device)
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        need_x = ctx.needs_input_grad[1]
        x = kept.detach().requires_grad_(need_x)
        with torch.enable_grad(), autocast_as(x.device, ctx.autocast):
            out = ctx.run(x)
        wanted = [*([x] if need_x else []), *ctx.trained]
        found = torch.autograd.grad(out, wanted, grad, allow_unused=True)
        return None, *(found if need_x else (None, *found))


class Block(nn.Module):
    """Transformer block, with the norms on the branches' results (`post_norm`) or on their inputs."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        hidden: int,
        *,
        post_norm: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.norm1 = LayerNorm(width, device=device, dtype=dtype)
        self.attn = Attention(width, num_heads, device=device, dtype=dtype)
        self.norm2 = LayerNorm(width, device=device, dtype=dtype)
        self.mlp = Mlp(width, hidden, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, packing: Packing | None = None, recompute_mlp: bool = False) -> Tensor:
        """(B, N, D) -> (B, N, D) in the dtype of the residual stream.

        Args:
            packing: x is (1, T, D), the tokens of several images.
            recompute_mlp: recompute everything from the attention kernel to the GELU in the backward pass, instead of
                keeping the hidden activations of the MLP.
        """
        # The result of the first branch gets no name here, which would keep it in memory until the block ends.
        if recompute_mlp:
            # Activations between the attention kernel and the GELU are as wide as the residual stream, and the product
            # between them costs a ninth of the MLP's first one: they are recomputed with it.
            x, branch = recomputed(self._projected_and_mlp)(x, self._attended(x, packing))
        else:
            x, branch = self._projected_and_mlp(x, self._attended(x, packing))
        return x + (self.norm2(branch) if self.post_norm else branch)

    def recomputes_all(self) -> bool:
        """Return True if the second forward of this block has nothing to leave out, and no storage moves under it.

        `torch.utils.checkpoint` stops behind the last tensor that the backward pass needs: without a norm or an adapter
        behind it the last product, a third of the block, is not computed again.
        """
        last = self.mlp.fc2._parameters.values()  # by its name, ZeRO-3 would gather the weight
        fixed = not (torch.compiler.is_compiling() or any(one is not None and movable(one) for one in last))
        return fixed and (self.post_norm or len(_trained(self.mlp.fc2)) > 0)

    def _attended(self, x: Tensor, packing: Packing | None) -> Tensor:
        out: Tensor = self.attn(x if self.post_norm else self.norm1(x), packing)
        return out

    def _projected_and_mlp(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream after the first branch, and the result of the second branch."""
        if self.post_norm:
            x = x + self.norm1(self.attn.proj(attended))
            return x, self.mlp(x)
        x = x + self.attn.proj(attended)
        return x, self.mlp(self.norm2(x))


def run_block(block: nn.Module, x: Tensor, packing: Packing | None, policy: str) -> Tensor:
    """Run a block, (B, N, D) -> (B, N, D); `policy`: what of it is recomputed, "none" or one of RECOMPUTE."""
    run: Callable[..., Tensor] = block
    if policy == "mlp":
        run = partial(block, recompute_mlp=True)
    elif policy == "block":
        if isinstance(block, Block) and block.recomputes_all():
            whole = block if packing is None else partial(block, packing=packing)
            out: Tensor = _Recomputed.apply(whole, x, *_trained(block))
            return out
        run = recomputed(block)
    return run(x) if packing is None else run(x, packing=packing)


def _trained(module: nn.Module) -> list[nn.Parameter]:
    """Return `module.parameters()` that require a gradient, at a fraction of its time."""
    found = [
        parameter for parameter in module._parameters.values() if parameter is not None and parameter.requires_grad
    ]
    for child in module._modules.values():
        if child is not None:
            found += _trained(child)
    return found


#: As `run_block`.
BlockRunner = Callable[[nn.Module, Tensor, Packing | None, str], Tensor]


class EvaViT(nn.Module):
    """An EVA-CLIP vision tower without its projection head. Parameters are left uninitialised; see `build_backbone`.

    The residual stream is fp32 under autocast and never narrower than `pos_embed`, on every device. `embed`, `blocks`,
    `norm` and `feature_map` are the forward cut in pieces, for a pipeline; under ZeRO-3 call the module itself, since
    parameters are gathered for a module's own forward only.

    Attributes:
        recompute: what of each block is recomputed in the backward pass: "none", or one of RECOMPUTE.
        pixel_mean, pixel_std: of the RGB channels in [0, 1], with which images are normalised.
        compiled: runs the blocks in the place of `run_block`, if given.
        until: the block that it was made to end after; None: it is whole.
    """

    pixel_mean: tuple[float, ...] = PIXEL_MEAN
    pixel_std: tuple[float, ...] = PIXEL_STD

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        patch_size: int = 14,
        image_size: int = 224,
        post_norm: bool = False,
        class_token: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_shape(width, depth, num_heads, mlp_ratio, patch_size, image_size)
        self.width = width
        self.depth = depth
        self.num_heads = num_heads
        self.patch_size = patch_size
        self.image_size = image_size
        self.post_norm = post_norm
        self.recompute = "none"
        self.compiled: BlockRunner | None = None
        self.until: str | None = None
        side = image_size // patch_size
        self.cls_token: nn.Parameter | None = None
        if class_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, width, device=device, dtype=dtype))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + side * side, width, device=device, dtype=dtype))
        self.patch_embed = PatchEmbed(patch_size, width, device=device, dtype=dtype)
        hidden = int(width * mlp_ratio)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, hidden, post_norm=post_norm, device=device, dtype=dtype) for _ in range(depth)
        )
        self.norm = LayerNorm(width, device=device, dtype=dtype)

    def forward(self, images: Tensor, frames: Grids | None = None) -> Tensor:
        """Features of the patches.

        With `frames` they are those of each image alone, and padding is not computed: the patches of all images are
        packed into one row. Position embeddings are then resized to each image's own grid, and no patch attends to
        padding. Without, positions span the padding and patches attend to it, as in ViSFT's code; features differ.

        Args:
            images: (B, 3, H, W), already normalised, H and W at least one patch.
            frames: (height, width) of each image within the padded batch, at least one patch.

        Returns:
            (B, D, h, w) after the last norm, a channels-last view in the dtype of the residual stream: (h, w) is the
            grid of the padded batch, or with `frames` the largest of the images' own grids, with 0 beyond each.
        """
        if frames is None:
            return self.feature_map(self.tokens(images), self.grid(images))
        grids = self.grids(frames)
        x = self.embed(images, grids)
        packing = self.packing(grids, x.device)
        for block in self.blocks:
            x = self.run_block(block, x, packing)
        return self.feature_maps(self.norm(x), grids)

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, [1 +] h*w, D), normed; the class token, if there is one, first."""
        x = self.embed(images)
        for block in self.blocks:
            x = self.run_block(block, x)
        out: Tensor = self.norm(x)
        return out

    def embed(self, images: Tensor, grids: Grids | None = None) -> Tensor:
        """Input of the first block: (B, 3, H, W) -> (B, [1 +] h*w, D), or (1, T, D), the patches of `grids` packed."""
        size = self.grid(images)
        x = self.patch_embed(images)
        if autocast_dtype(x.device) is not None:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        if grids is None:
            return self._positioned(x, size)
        # Patches do not overlap: embedded once for the padded batch, where ZeRO-3 expects one call on every rank.
        maps = zip(x.unflatten(1, size), grids, strict=True)
        rows = [self._positioned(cells[: grid[0], : grid[1]].flatten(0, 1)[None], grid) for cells, grid in maps]
        return torch.cat(rows, dim=1)

    def _positioned(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, h*w, D) with positions added, after the class token if there is one."""
        x = x + resize_position_embeddings(self.pos_embed[0, 1:], grid)
        if self.cls_token is None:
            return x
        first = (self.cls_token + self.pos_embed[:, :1]).to(x.dtype)
        return torch.cat([first.expand(x.shape[0], -1, -1), x], dim=1)

    def run_block(self, block: nn.Module, x: Tensor, packing: Packing | None = None) -> Tensor:
        """Run a block, recomputed in the backward pass as `recompute` says."""
        policy = self.recompute if self.training and torch.is_grad_enabled() else "none"
        run = self.compiled or run_block
        return run(block, x, packing, policy)

    def describe(self) -> str:
        """A few words for the console."""
        return f"width {self.width}, {self.depth} blocks" + (f", ends after {self.until}" if self.until else "")

    def ends(self) -> list[str]:
        """Blocks that it can end after, in their order."""
        return block_names(self.depth)

    def end_after(self, block: str) -> None:
        """Leave out the blocks behind this one, whose result the last norm then norms.

        Raises ValueError, see `depth_until`.
        """
        self.depth = depth_until(block, self.depth)
        del self.blocks[self.depth :]
        self.until = block

    def grid(self, images: Tensor) -> tuple[int, int]:
        """(h, w) for images (B, 3, H, W). Raises ValueError for another shape and for images below one patch."""
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[-2:]) < self.patch_size:
            raise ValueError(
                f"images of shape {tuple(images.shape)}; needed: (B, 3, H, W) with H and W at least {self.patch_size}"
            )
        return images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size

    def grids(self, frames: Grids) -> Grids:
        """The patch grid (h, w) of each image of these heights and widths; raises ValueError below one patch."""
        if min(side for frame in frames for side in frame) < self.patch_size:
            raise ValueError(f"images of {list(frames)} pixels; needed: at least {self.patch_size} on each side")
        return [(height // self.patch_size, width // self.patch_size) for height, width in frames]

    def packing(self, grids: Grids, device: torch.device) -> Packing:
        """Offsets of the tokens of images with these grids in one row."""
        return Packing.of([(self.cls_token is not None) + height * width for height, width in grids], device)

    def feature_map(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, [1 +] h*w, D) -> (B, D, h, w); the class token is left out."""
        patches = tokens if self.cls_token is None else tokens[:, 1:]
        return patches.transpose(1, 2).reshape(patches.shape[0], self.width, *grid)

    def feature_maps(self, tokens: Tensor, grids: Grids) -> Tensor:
        """(1, T, D) packed -> (B, D, h, w), as large as the largest grid and 0 beyond each; without class tokens."""
        first = int(self.cls_token is not None)
        parts = tokens[0].split([first + height * width for height, width in grids])
        maps = [part[first:].unflatten(0, grid) for part, grid in zip(parts, grids, strict=True)]
        return stack_padded(maps).permute(0, 3, 1, 2)


def build_backbone(
    name: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int | None = 0,
    class_token: bool = False,
    until: str | None = None,
    **overrides: Any,
) -> EvaViT:
    """A tower by name, with random weights, in one copy of its size (plus one tensor in fp32 at a time).

    Args:
        name: key of PRESETS.
        device: "meta" gives shapes without memory.
        dtype: of every parameter.
        seed: decides every weight, whatever the device, dtype and state of the global generators; each tensor is a
            function of the seed, its own name and shape. None leaves memory uninitialised, for weights loaded next.
        class_token: adds `cls_token`.
        until: ends the tower after this block, see `EvaViT.end_after`.
        overrides: fields of EvaViTConfig that replace the preset's.

    Raises:
        ValueError: unknown name, field (with the nearest one) or block, or a shape that does not work out.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown backbone {name!r}; known: {', '.join(PRESETS)}{_nearest(name, PRESETS)}")
    known = [field.name for field in fields(EvaViTConfig)]
    for key in overrides:
        if key not in known:
            raise ValueError(
                f"backbone {name!r} has no field {key!r}; fields: {', '.join(known)}{_nearest(key, known)}"
            )
    config = replace(PRESETS[name], **overrides)
    shape = {field: getattr(config, field) for field in known}
    backbone = EvaViT(**shape, class_token=class_token, device="meta", dtype=dtype)
    if until is not None:
        backbone.end_after(until)
    if torch.device(device).type == "meta":
        return backbone
    backbone.to_empty(device=device)
    if seed is not None:
        _fill(backbone, seed)
    return backbone


def block_names(depth: int) -> list[str]:
    """Names of the blocks of a tower."""
    return [f"blocks.{index}" for index in range(depth)]


def depth_until(block: str, depth: int) -> int:
    """Number of blocks of a tower that ends after this one. Raises ValueError where it has no such block."""
    names = block_names(depth)
    if block not in names:
        raise ValueError(f"the tower cannot end after {block!r}: it has {names[0]} to {names[-1]}")
    return names.index(block) + 1


@torch.no_grad()
def _fill(backbone: EvaViT, seed: int) -> None:
    for name, parameter in backbone.named_parameters():
        parameter.copy_(random_weight(name, parameter.shape, seed))


def random_weight(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """EVA's initial weights: normal(0, .02), branch outputs divided by sqrt(2 * (block + 1)), biases 0, norms 1.

    Positions are fixed sines instead, see `sine_positions`. EVA's truncation lies 100 standard deviations out and is
    left out here: it costs twenty times the drawing.

    Args:
        name: of the parameter in an `EvaViT`.

    Returns:
        fp32 on the CPU, so that every device and dtype gets the same numbers.
    """
    if name.endswith("bias"):
        return torch.zeros(tuple(shape))
    if "norm" in name:
        return torch.ones(tuple(shape))
    if name == "pos_embed":
        sines = sine_positions(math.isqrt(shape[1] - 1), shape[2])
        return torch.nn.functional.pad(sines, (0, 0, 1, 0)).unsqueeze(0)
    std = 0.02
    if name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
        std /= (2.0 * (int(name.split(".")[1]) + 1)) ** 0.5
    return torch.empty(tuple(shape)).normal_(0.0, std, generator=generator_for(seed, name))


def sine_positions(side: int, width: int) -> Tensor:
    """Fixed sine-cosine position embeddings of a square grid, (side * side, D) float32 (MAE, arXiv 2111.06377, A.1).

    A frozen random tower must encode positions: random positions of std .02 drown in its features, and heads on
    top of it learn boxes half as well. Trained weights bring their own. Channels beyond a multiple of four are 0.
    """
    count = width // 4
    frequencies = 10_000.0 ** -(torch.arange(count, dtype=torch.float32) / max(1, count))
    angles = torch.arange(side, dtype=torch.float32)[:, None] * frequencies  # (side, D / 4)
    axis = torch.cat((angles.sin(), angles.cos()), dim=1)
    rows = axis[:, None].expand(side, side, -1)
    columns = axis[None].expand(side, side, -1)
    table = torch.cat((columns, rows), dim=2).reshape(side * side, -1)
    return torch.nn.functional.pad(table, (0, width - table.shape[1]))


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on a seed and the name of what it fills, and on nothing else."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _check_shape(width: int, depth: int, num_heads: int, mlp_ratio: float, patch_size: int, image_size: int) -> None:
    if min(width, depth, num_heads, patch_size, int(width * mlp_ratio)) < 1:
        raise ValueError(
            f"width {width}, depth {depth}, num_heads {num_heads}, patch_size {patch_size} and "
            f"int(width * mlp_ratio) = {int(width * mlp_ratio)} must all be at least 1"
        )
    if width % num_heads:
        raise ValueError(f"width {width} is not a multiple of num_heads {num_heads}; change one of them")
    if image_size < patch_size or image_size % patch_size:
        raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}; change one of them")


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
