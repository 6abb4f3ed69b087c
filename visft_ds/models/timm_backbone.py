"""Any model of timm whose feature map follows the size of its image, as a backbone: image -> maps.

A map is what timm's `forward_features` gives: of a plain ViT the normed tokens of the patches, else the last
stage. What lies behind it (pooling, classifier) is left out. timm's `prune_intermediate_layers` ends a model
after a block; a plain ViT keeps its last norm, through which maps of earlier blocks pass, too, where several
are read. Batch norms always compute with the statistics that came with the weights: a step of a few images,
of one task, has others.
Letters: B images, H W pixels, h w feature grid, D width, P tokens in front of the patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from visft_ds.models.eva_vit import Grids, block_number, stack_padded
from visft_ds.pretrained import check_timm

_SIDE = 512  #: of the image that measures a model: every stride divides it
_SMALLEST_GAIN = 1e-2  #: gains of a random model below this are taken for a start at zero


class TimmBackbone(nn.Module):
    """Model of timm after `as_backbone`: the same module with another forward."""

    name: str  #: as timm knows it, with or without tag
    shapes: tuple[tuple[int, int], ...]  #: (D, pixels of the image to a cell) of each map
    width: int  #: D of the last map
    patch_size: int  #: pixels of the image to one cell of the last map, and the least side of an image
    patch: int | None  #: side of a patch of a plain ViT; None for networks that take any number of pixels
    image_size: int  #: the side that stored positions belong to; any size can be fed
    options: dict[str, int]  #: with which timm's model was made, beyond what all are made with
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    classifier_names: tuple[str, ...]
    left_out: dict[str, Tensor]  #: names, and values if there are any, of all that was left out
    layers_read: tuple[int, ...]  #: numbers of the blocks that are read; none: the last
    pruning: str  #: the call that makes timm's model end there, as a line of Python; empty if it is whole
    reading: dict[str, Any]  #: arguments of timm's `forward_intermediates` that give several maps; else empty
    num_prefix_tokens: int  #: of a plain ViT, in front of its patches
    forward_features: Callable[[Tensor], Tensor]
    set_grad_checkpointing: Callable[[bool], None]
    prune_intermediate_layers: Callable[..., Any]
    forward_intermediates: Callable[..., Any]
    #: "block": every block, or stage, is recomputed in the backward pass; or "none": timm knows no other
    #: policies.
    recompute = "none"
    #: Each image of a stream with several sizes is a call, even where those of a batch are alike. For ZeRO-3,
    #: which gathers weights in each call: the number of calls must not depend on what a rank drew.
    one_by_one = False

    def forward(
        self, images: Tensor, frames: Grids | None = None, *, prefixes: bool = False
    ) -> tuple[Tensor, ...]:
        """(B, 3, H, W), already normalised -> the maps (B, D, h, w); with `prefixes`, then the tokens (B, P,
        D) in front of the patches of each, if a plain ViT has any.

        With `frames`, the (height, width) of each image within the padded batch in whole cells, features are
        those of each image alone: images of each size are a batch of their own, and (h, w) is the largest of
        their maps, with 0 beyond each. A mask would not do: timm resizes positions to the padded grid, too,
        convolutions know none, and a masked ViT recomputes nothing.
        """
        self.set_grad_checkpointing(self.recompute != "none")
        if frames is None:
            return self._maps(images, prefixes)
        tensors_of = dict[int, tuple[Tensor, ...]]()  # by place in the batch
        for (height, width), places in self._calls(frames):
            tensors = self._maps(
                torch.stack([images[place, :, :height, :width] for place in places]), prefixes
            )
            for row, place in enumerate(places):
                tensors_of[place] = tuple(tensor[row] for tensor in tensors)
        in_order = [tensors_of[place] for place in range(len(frames))]
        return tuple(_stacked(of_images) for of_images in zip(*in_order, strict=True))

    def _calls(self, frames: Grids) -> list[tuple[tuple[int, int], list[int]]]:
        """(height, width) of each call, and the places in the batch of its images."""
        if self.one_by_one:
            return [(frame, [place]) for place, frame in enumerate(frames)]
        groups = dict[tuple[int, int], list[int]]()
        for place, frame in enumerate(frames):
            groups.setdefault(frame, []).append(place)
        return list(groups.items())

    def _maps(self, images: Tensor, prefixes: bool) -> tuple[Tensor, ...]:
        """`forward` of images that fill the batch."""
        patch = self.patch
        if patch is not None:  # pixels right and below the last whole patch are dropped, as EvaViT does
            images = images[..., : images.shape[-2] // patch * patch, : images.shape[-1] // patch * patch]
        before = self.num_prefix_tokens if patch is not None and prefixes else 0
        if self.reading:
            if not before:
                return tuple(self.forward_intermediates(images, **self.reading))
            pairs = self.forward_intermediates(images, **self.reading, return_prefix_tokens=True)
            return tuple(part for parts in zip(*pairs, strict=True) for part in parts)
        features = self.forward_features(images)
        map_ = self.feature_map(features, images.shape[-2:])
        return (map_, features[:, :before]) if before else (map_,)

    def feature_map(self, features: Tensor, size: Sequence[int]) -> Tensor:
        """Tokens or a map of timm's, of images of this height and width, as (B, D, h, w)."""
        if features.ndim == 4:
            return features.permute(0, 3, 1, 2) if getattr(self, "output_fmt", "NCHW") == "NHWC" else features
        assert self.patch is not None, f"features of shape {tuple(features.shape)}"
        grid = size[0] // self.patch, size[1] // self.patch
        tokens = features[:, self.num_prefix_tokens :]
        return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *grid)

    def train(self, mode: bool = True) -> TimmBackbone:
        """Training mode, of all but batch norms."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.train(False)
        return self

    def describe(self) -> str:
        """A few words for the console."""
        ends = self.ends()
        read = (
            f", read after {', '.join(ends[number] for number in self.layers_read)}"
            if self.layers_read
            else ""
        )
        return f"timm {self.name}, width {self.width}, a cell for {self.patch_size} x {self.patch_size} pixels{read}"

    def ends(self) -> list[str]:
        """Names of the blocks that can be read, by number: those of timm's list of features, and their
        siblings.
        """
        known, found = dict(self.named_modules()), dict[str, None]()
        for info in getattr(self, "feature_info", ()):
            parent, _, leaf = info["module"].rpartition(".")
            siblings = list(known[parent]._modules) if leaf.isdigit() and parent in known else [leaf]
            found |= dict.fromkeys(f"{parent}.{name}" if parent else name for name in siblings)
        pruned = (nn.Sequential, nn.ModuleList)  # timm leaves them empty
        return [
            name
            for name in found
            if name in known and not (type(known[name]) in pruned and not len(known[name]))
        ]

    def read_after(self, layers: Sequence[int]) -> None:
        """Leave out all that lies behind the last of these blocks. Raises ValueError for one that it does not
        have.
        """
        self.layers_read, self.reading = tuple(layers), {}
        if not layers:
            return
        number = block_number(layers, self.ends(), f"timm's {self.name}")
        # EfficientNets count their stem as number 0, if asked for each block.
        index, more = (number + 1, {"extra_blocks": True}) if hasattr(self, "conv_stem") else (number, {})
        before = self.state_dict()
        self.prune_intermediate_layers([index], **more)
        self.left_out |= {name: value for name, value in before.items() if name not in self.state_dict()}
        arguments = "".join(f", {key}={value}" for key, value in more.items())
        self.pruning = f"model.prune_intermediate_layers([{index}]{arguments})"
        if len(layers) > 1:
            indices = [one + index - number for one in layers]
            self.reading = {"indices": indices, "intermediates_only": True, **more}
            self.reading |= {"norm": True} if self.patch is not None else {}
            arguments = "".join(f", {key}={value}" for key, value in self.reading.items())
            self.pruning = f"model.forward_intermediates(images{arguments})"


def _stacked(of_images: Sequence[Tensor]) -> Tensor:
    """Maps (D, h, w) of some images, or their tokens (P, D), as (B, D, h, w), with 0 beyond each, or (B, P,
    D).
    """
    if of_images[0].ndim == 2:
        return torch.stack(list(of_images))
    return stack_padded([map_.permute(1, 2, 0) for map_ in of_images]).permute(0, 3, 1, 2)


def classifier_names(classifier: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Names of the classifiers that timm's configuration of a model tells."""
    return (classifier,) if isinstance(classifier, str) else tuple(classifier or ())


def as_backbone(
    model: nn.Module, name: str, options: Mapping[str, int], layers: Sequence[int] = ()
) -> TimmBackbone:
    """Turn a model that `timm.create_model` made with these options into a backbone, in place: `TimmBackbone`
    comes in front of its class. Raises ValueError for one without a map that follows the size of its image,
    or no such block.
    """
    from timm.layers import to_2tuple

    found: Any = model
    found.__class__ = type("TimmBackbone", (TimmBackbone, type(model)), {})
    backbone: TimmBackbone = found
    config, embed = found.pretrained_cfg, getattr(found, "patch_embed", None)
    backbone.name, backbone.options, backbone.left_out, backbone.pruning = name, dict(options), {}, ""
    backbone.image_size = options.get("img_size", int(config["input_size"][-1]))
    backbone.pixel_mean, backbone.pixel_std = tuple(config["mean"]), tuple(config["std"])
    backbone.classifier_names = classifier_names(config.get("classifier"))
    plain = hasattr(model, "num_prefix_tokens") and hasattr(embed, "patch_size")
    backbone.patch = int(to_2tuple(embed.patch_size)[0]) if plain else None  # type: ignore[union-attr]
    backbone.train()
    backbone.read_after(layers)
    if next(model.parameters()).is_meta:
        backbone.shapes, unused = _measured(backbone)
    else:
        twin = build_timm(name, image_size=options.get("img_size"), layers=layers, device="meta")
        backbone.shapes, unused = twin.shapes, [*twin.left_out]
    backbone.width, backbone.patch_size = backbone.shapes[-1]
    before, owners = model.state_dict(), {key.rpartition(".")[0] for key in unused}
    for owner in sorted(owners):  # those inside of others come behind them
        parent, _, leaf = owner.rpartition(".")
        if owner in dict(model.named_modules()):
            setattr(model.get_submodule(parent), leaf, nn.Identity())
    backbone.left_out |= {key: value for key, value in before.items() if key not in model.state_dict()}
    return backbone


def _measured(backbone: TimmBackbone) -> tuple[tuple[tuple[int, int], ...], list[str]]:
    """(shapes, parameters of children that the maps do not need) of a backbone on the meta device."""
    named = dict(backbone.named_parameters())
    try:
        with torch.enable_grad():
            maps = backbone(torch.empty(1, 3, _SIDE, 2 * _SIDE, device="meta"))
            total = torch.stack([one.sum() for one in maps]).sum()
            gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        sizes = [one.shape for one in maps]
        wrong = [tuple(size) for size in sizes if len(size) != 4 or size[3] // size[2] != 2]
        if wrong:
            raise ValueError(f"features of shape {wrong[0]}")
        # As of Inception's convolutions without padding: a cell would stand for more pixels in a small image.
        uneven = [size[2] for size in sizes if backbone.patch is None and _SIDE % size[2]]
        if uneven:
            raise ValueError(f"{uneven[0]} rows of cells for {_SIDE} pixels")
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"timm's {backbone.name} gives no map that follows the size of its image, which heads need ({error}); "
            "plain ViTs and convolutional networks do"
        ) from error
    used = {
        name.partition(".")[0]
        for name, gradient in zip(named, gradients, strict=True)
        if gradient is not None
    }
    unused = [name for name in named if name.partition(".")[0] not in used]
    return tuple((size[1], backbone.patch or _SIDE // size[2]) for size in sizes), unused


def build_timm(
    name: str,
    *,
    image_size: int | None = None,
    layers: Sequence[int] = (),
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> TimmBackbone:
    """A model of timm by its name, with timm's random weights; nothing is ever downloaded.

    Gains that timm starts at or near 0 (layer scales, the last norm of a branch) are 1, or a frozen random
    tower would be little more than its stem.

    Args:
        name: with or without the tag of pretrained weights, which decides how images are normalised.
        image_size: side that the position embeddings belong to; None: the model's own.
        layers: see `TimmBackbone.read_after`.
        seed: decides every weight, on one version of timm.
    """
    backbone = as_backbone(*build_model(name, image_size, device, seed), layers)
    for key, parameter in backbone.named_parameters():
        gain = parameter.ndim == 1 and key.rpartition(".")[2] in ("weight", "gamma", "gamma_1", "gamma_2")
        if gain and device != "meta" and parameter.abs().max() < _SMALLEST_GAIN:
            parameter.data.fill_(1.0)
        parameter.data = parameter.data.to(dtype)
    return backbone


def build_model(
    name: str, image_size: int | None, device: str, seed: int
) -> tuple[nn.Module, str, dict[str, int]]:
    """timm's model itself, without classifier, its name, and what of its size was given (CNNs have no
    positions).
    """
    check_timm(name)
    import timm
    from timm.layers import set_reentrant_ckpt

    set_reentrant_ckpt(False)  # a reentrant checkpoint gives no gradient to adapters behind a frozen stem
    size = {} if image_size is None else {"img_size": image_size}
    with torch.random.fork_rng(devices=[]), torch.device(device):
        for more in ({"dynamic_img_size": True, **size}, size, dict[str, Any]()):
            torch.manual_seed(seed)
            try:
                model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **more)
            except TypeError as error:  # convolutional networks take neither
                if not more or "unexpected keyword argument" not in str(error):
                    raise
                continue
            except RuntimeError as error:  # its word for an unknown tag
                raise ValueError(f"timm's {name}: {error}") from error
            return model, name, {key: value for key, value in more.items() if key == "img_size"}
    raise AssertionError


def fine_map(name: str) -> tuple[int | None, int]:
    """(number of the block whose map has a cell for 16 pixels, None: the last; side of an image of some 20
    cells).
    """
    backbone = build_timm(name, device="meta")
    known = [(str(info["module"]), int(info["reduction"])) for info in getattr(backbone, "feature_info", ())]
    block, stride = ([one for one in known if one[1] <= 16] or [("", 16)])[-1]
    if not block or (block, stride) == known[-1]:
        return None, 320 // stride * stride
    return backbone.ends().index(block), 320
