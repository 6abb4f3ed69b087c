"""Any model of timm whose feature map follows the size of its image, as a backbone: image -> maps.

A map is what timm's `forward_features` gives: of a plain ViT the normed tokens of the patches, else the last
stage. What lies behind it (pooling, classifier) is left out. timm's `prune_intermediate_layers` ends a model
after a block; a plain ViT keeps its last norm, through which maps of earlier blocks pass, too, where several
are read. Batch norms always compute with the statistics that came with the weights: a step of a few images,
of one task, has others.
Letters: B images, H W pixels, h w feature grid, D width, P tokens in front of the patches.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from visft_ds.models.eva_vit import Grids, last_block, stacked
from visft_ds.ops import shapes_alone
from visft_ds.pretrained import check_timm
from visft_ds.settings.bands import Bands

_SIDE = 512  #: of the image that measures a model: every stride divides it
_SMALLEST_GAIN = 1e-2  #: gains of a random model below this are taken for a start at zero
_GAINS = ("weight", "gamma", "gamma_1", "gamma_2")  #: last parts of the names of gains
#: What `_measured` found in this process, by (name, side of an image, layers, bands): the judge builds a
#: model for each variant.
_MEASURED: dict[tuple[Any, ...], tuple[tuple[tuple[int, int], ...], list[str]]] = {}


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
    bands: Bands | None  #: in place of three colours
    first_weight: str  #: name of the weights that see pixels
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
        """Maps (B, D, h, w); with `prefixes`, then the tokens (B, P, D) in front of the patches of each, if a
        plain ViT has any.

        Args:
            images: (B, n, H, W), already normalised.
            frames: (height, width) of each image within the padded batch in pixels, whole cells. Features are
                then those of each image alone: images of each size are a batch of their own, and (h, w) is
                the largest of their maps, with 0 beyond each. A mask would not do: timm resizes positions to
                the padded grid, too, convolutions know none, and a masked ViT recomputes nothing. None: all
                images fill the batch.
        """
        self.set_grad_checkpointing(self.recompute != "none")
        if frames is None:
            return self._features(images, prefixes)
        positions_of = defaultdict[tuple[int, int, int], list[int]](list)  # of the images of each call
        for position, (height, width) in enumerate(frames):
            call = position if self.one_by_one else 0
            positions_of[height, width, call].append(position)
        features_of: dict[int, list[Tensor]] = {}  # by position in the batch
        for (height, width, _), positions in positions_of.items():
            alike = torch.stack([images[position, :, :height, :width] for position in positions])
            features = self._features(alike, prefixes)
            channels_last = [part.permute(0, 2, 3, 1) if part.ndim == 4 else part for part in features]
            for row, position in enumerate(positions):
                features_of[position] = [part[row] for part in channels_last]
        in_order = [features_of[position] for position in range(len(frames))]
        return tuple(stacked(of_images) for of_images in zip(*in_order, strict=True))

    def _features(self, images: Tensor, prefixes: bool) -> tuple[Tensor, ...]:
        """`forward` of images that fill the batch."""
        height, width = images.shape[-2:]
        if self.patch is not None:  # pixels right and below the last whole patch are dropped, as EvaViT does
            height = height // self.patch * self.patch
            width = width // self.patch * self.patch
            images = images[..., :height, :width]
        with_prefix = prefixes and self.patch is not None and self.num_prefix_tokens > 0
        if not self.reading:
            features = self.forward_features(images)
            map_ = self.feature_map(features, (height, width))
            return (map_, features[:, : self.num_prefix_tokens]) if with_prefix else (map_,)
        if not with_prefix:
            return tuple(self.forward_intermediates(images, **self.reading))
        pairs = self.forward_intermediates(images, **self.reading, return_prefix_tokens=True)
        maps, prefix_tokens = zip(*pairs, strict=True)
        return (*maps, *prefix_tokens)

    def feature_map(self, features: Tensor, size: Sequence[int]) -> Tensor:
        """Tokens or a map of timm's, of images of this height and width, as (B, D, h, w)."""
        if features.ndim == 4:
            channels_last = getattr(self, "output_fmt", "NCHW") == "NHWC"
            return features.permute(0, 3, 1, 2) if channels_last else features
        assert self.patch is not None, f"features of shape {tuple(features.shape)}"
        height, width = size
        tokens = features[:, self.num_prefix_tokens :].transpose(1, 2)
        return tokens.reshape(*tokens.shape[:2], height // self.patch, width // self.patch)

    def train(self, mode: bool = True) -> TimmBackbone:
        """Training mode, of all but batch norms."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.train(False)
        return self

    def describe(self) -> str:
        """A few words for the console."""
        side = self.patch_size
        text = f"timm {self.name}, width {self.width}, a cell for {side} x {side} pixels"
        if self.layers_read:
            ends = self.ends()
            text += f", read after {', '.join(ends[number] for number in self.layers_read)}"
        return text

    def ends(self) -> list[str]:
        """Names of the blocks that can be read, by number: those of timm's list of features, and their
        siblings.
        """
        modules = dict(self.named_modules())
        names: dict[str, None] = {}  # each once, in order
        for name in _strides_of(self):
            parent, _, leaf = name.rpartition(".")
            siblings = [name]
            if leaf.isdigit() and parent in modules:
                children = dict(modules[parent].named_children())
                siblings = [name.removesuffix(leaf) + child for child in children]
            names |= dict.fromkeys(siblings)
        return [name for name in names if name in modules and not _is_emptied(modules[name])]

    def read_after(self, layers: Sequence[int]) -> None:
        """Leave out all that lies behind the last of these blocks. Raises ValueError for one that it does not
        have.
        """
        self.layers_read = tuple(layers)
        self.reading = {}
        if not layers:
            return
        last = last_block(layers, self.ends(), f"timm's {self.name}")
        # EfficientNets count their stem as number 0, if asked for each block.
        counts_stem = hasattr(self, "conv_stem")
        shift = int(counts_stem)
        options = {"extra_blocks": True} if counts_stem else {}
        whole = self.state_dict()
        self.prune_intermediate_layers([last + shift], **options)
        self._note_left_out(whole)
        if len(layers) == 1:
            self.pruning = _call("prune_intermediate_layers", f"[{last + shift}]", options)
            return
        self.reading = {
            "indices": [number + shift for number in layers],
            "intermediates_only": True,
            **options,
        }
        if self.patch is not None:
            self.reading["norm"] = True
        self.pruning = _call("forward_intermediates", "images", self.reading)

    def _note_left_out(self, whole: Mapping[str, Tensor]) -> None:
        """Add to `left_out` what it lacks of its earlier state."""
        own = self.state_dict().keys()
        self.left_out |= {name: value for name, value in whole.items() if name not in own}


def _is_emptied(module: nn.Module) -> bool:
    """True of a container that timm left empty when it pruned the model."""
    return type(module) in (nn.Sequential, nn.ModuleList) and not any(module.children())


def _call(method: str, first: str, options: Mapping[str, Any]) -> str:
    """A call of a method of timm's model as a line of Python."""
    arguments = [first, *(f"{name}={value}" for name, value in options.items())]
    return f"model.{method}({', '.join(arguments)})"


def as_backbone(
    model: nn.Module,
    name: str,
    options: Mapping[str, int],
    layers: Sequence[int] = (),
    bands: Bands | None = None,
) -> TimmBackbone:
    """Turn a model of timm into a backbone, in place: `TimmBackbone` comes in front of its class.

    Args:
        model: what `timm.create_model` made with these options.
        name: as timm knows it, with or without tag.
        layers: see `TimmBackbone.read_after`.
        bands: that it was made for; None: three colours.

    Raises:
        ValueError: no map that follows the size of its image, or no such block; a stem that takes no bands.
    """
    from timm.layers import to_2tuple

    # One object, so that names of parameters are timm's, and so is every method that is not ours.
    backbone: Any = model
    backbone.__class__ = type("TimmBackbone", (TimmBackbone, type(model)), {})
    config = backbone.pretrained_cfg
    backbone.name = name
    backbone.options = dict(options)
    backbone.left_out = {}
    backbone.pruning = ""
    backbone.image_size = options.get("img_size", int(config["input_size"][-1]))
    backbone.bands = bands
    backbone.first_weight = f"{config.get('first_conv')}.weight"
    if bands is None:
        backbone.pixel_mean = tuple(config["mean"])
        backbone.pixel_std = tuple(config["std"])
    else:
        _check_stem(backbone, name, len(bands.numbers))
        backbone.pixel_mean = bands.mean
        backbone.pixel_std = bands.std
    classifier = config.get("classifier") or ()
    backbone.classifier_names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    backbone.patch = None
    embed: Any = getattr(backbone, "patch_embed", None)
    if hasattr(backbone, "num_prefix_tokens") and hasattr(embed, "patch_size"):  # a plain ViT
        backbone.patch = int(to_2tuple(embed.patch_size)[0])
    backbone.train()
    backbone.read_after(layers)
    image_size = options.get("img_size")
    kind = (name, image_size, tuple(layers), bands)
    if kind not in _MEASURED:
        if next(backbone.parameters()).is_meta:
            _MEASURED[kind] = _measured(backbone)
        else:
            build_timm(name, image_size=image_size, layers=layers, device="meta", bands=bands)  # measures it
    backbone.shapes, unused = _MEASURED[kind]
    backbone.width, backbone.patch_size = backbone.shapes[-1]
    whole = backbone.state_dict()
    for child in unused:
        setattr(backbone, child, nn.Identity())
    backbone._note_left_out(whole)
    return backbone


def _check_stem(model: nn.Module, name: str, channels: int) -> None:
    """Raise ValueError for a model of timm that does not begin with one convolution of so many channels."""
    modules = dict(model.named_modules())
    first = modules.get(str(model.pretrained_cfg["first_conv"]))  # type: ignore[index]
    if not isinstance(first, nn.Conv2d) or first.in_channels != channels:
        raise ValueError(
            f"timm's {name} does not begin with one plain convolution, and reads three colours only: choose "
            "another --backbone for pictures of bands, a ViT or a convolutional network"
        )


def _measured(backbone: TimmBackbone) -> tuple[tuple[tuple[int, int], ...], list[str]]:
    """(shapes, children whose parameters the maps do not need) of a backbone on the meta device."""
    parameters = dict(backbone.named_parameters())
    try:
        with torch.enable_grad():
            maps = backbone(torch.empty(1, len(backbone.pixel_mean), _SIDE, 2 * _SIDE, device="meta"))
            total = torch.stack([map_.sum() for map_ in maps]).sum()
            gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        shapes = tuple(_shape_of(map_, backbone.patch) for map_ in maps)
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"timm's {backbone.name} gives no map that follows the size of its image, which heads need "
            f"({error}); plain ViTs and convolutional networks do"
        ) from error
    unused = dict.fromkeys(name.partition(".")[0] for name in parameters)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            unused.pop(name.partition(".")[0], None)
    return shapes, [child for child, _ in backbone.named_children() if child in unused]


def _shape_of(map_: Tensor, patch: int | None) -> tuple[int, int]:
    """(D, pixels to a cell) of the map of an image of `_SIDE` times twice that many pixels.

    Raises:
        ValueError: it does not follow the image.
    """
    if map_.ndim != 4 or map_.shape[3] // map_.shape[2] != 2:
        raise ValueError(f"features of shape {tuple(map_.shape)}")
    _, width, rows, _ = map_.shape
    if patch is not None:
        return width, patch
    # As of Inception's convolutions without padding: a cell would stand for more pixels in a small image.
    if _SIDE % rows:
        raise ValueError(f"{rows} rows of cells for {_SIDE} pixels")
    return width, _SIDE // rows


def build_timm(
    name: str,
    *,
    image_size: int | None = None,
    layers: Sequence[int] = (),
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    bands: Bands | None = None,
) -> TimmBackbone:
    """A model of timm by its name, with timm's random weights; nothing is ever downloaded.

    Gains that timm starts at or near 0 (layer scales, the last norm of a branch) are 1, or a frozen random
    tower would be little more than its stem.

    Args:
        name: with or without the tag of pretrained weights, which decides how images are normalised.
        image_size: side that the position embeddings belong to; None: the model's own.
        layers: see `TimmBackbone.read_after`.
        seed: decides every weight, on one version of timm.
        bands: that it reads; None: three colours.
    """
    channels = 3 if bands is None else len(bands.numbers)
    model, options = build_model(name, image_size, device, seed, channels)
    backbone = as_backbone(model, name, options, layers, bands)
    for key, parameter in backbone.named_parameters():
        is_gain = parameter.ndim == 1 and key.rpartition(".")[2] in _GAINS
        if is_gain and device != "meta" and parameter.abs().max() < _SMALLEST_GAIN:
            parameter.data.fill_(1.0)
        parameter.data = parameter.data.to(dtype)
    return backbone


def build_model(
    name: str,
    image_size: int | None,
    device: str,
    seed: int,
    channels: int = 3,
) -> tuple[nn.Module, dict[str, int]]:
    """timm's model itself, without classifier, and its option of a size (CNNs have no positions and take
    none).
    """
    check_timm(name)
    import timm
    from timm.layers import set_reentrant_ckpt

    set_reentrant_ckpt(False)  # a reentrant checkpoint gives no gradient to adapters behind a frozen stem
    size = {} if image_size is None else {"img_size": image_size}
    choices: list[dict[str, Any]] = [{"dynamic_img_size": True, **size}, size, {}]
    colours = {} if channels == 3 else {"in_chans": channels}
    on_device = shapes_alone() if device == "meta" else torch.device(device)
    with torch.random.fork_rng(devices=[]), on_device:
        for options in choices:
            torch.manual_seed(seed)
            try:
                model: nn.Module = timm.create_model(
                    name, pretrained=False, num_classes=0, **options, **colours
                )
            except TypeError as error:  # convolutional networks take neither
                if not options or "unexpected keyword argument" not in str(error):
                    raise
            except RuntimeError as error:  # its word for an unknown tag
                raise ValueError(f"timm's {name}: {error}") from error
            else:
                return model, size if options else {}
    raise AssertionError


def fine_maps(name: str) -> tuple[dict[int, int], int]:
    """({8 and 16: number of the block whose map has a cell for so many pixels}; side of an image of some 20
    cells of 16). Empty: the last block is read.
    """
    backbone = build_timm(name, device="meta")
    strides = _strides_of(backbone)
    *_, last = [0, *strides.values()]
    if 0 < last <= 16:
        return {}, 320 // last * last
    numbers = dict[int, int]()
    ends = backbone.ends()
    for block, stride in strides.items():
        for cell in (8, 16):
            if stride <= cell:
                numbers[cell] = ends.index(block)
    return numbers, 320


def scene_maps(name: str) -> list[int]:
    """Numbers of the blocks for a head of label maps: the last ones of strides 8, 16 and 32, and of a plain
    ViT, all of whose maps have one stride, the ends of its quarters.
    """
    backbone = build_timm(name, device="meta")
    ends = backbone.ends()
    if backbone.patch is not None:
        return sorted({math.ceil(len(ends) * quarter / 4) - 1 for quarter in (1, 2, 3, 4)})
    modules = {stride: module for module, stride in _strides_of(backbone).items() if 8 <= stride <= 32}
    return [ends.index(module) for module in modules.values()]


def _strides_of(backbone: TimmBackbone) -> dict[str, int]:
    """Module -> pixels of the image to a cell of its map, of timm's list of features."""
    return {info["module"]: info["reduction"] for info in getattr(backbone, "feature_info", ())}
