"""Any model of timm whose feature map follows the size of its image, as a backbone: image -> feature map.

The feature map is what timm's `forward_features` gives: of a plain ViT the normed tokens of the patches, of a
convolutional network the last stage (its stride is usually 32). What lies behind it (pooling, classifier, the norm of a
classifier's head) takes no part and is left out.

A backbone may end after a block. Of a plain ViT the tokens behind that block pass through the last norm, as in timm's
`forward_intermediates(norm=True)`; of every other network the map is what the block gives, nothing of what follows is
computed, and timm's own list of features (`feature_info`) names the blocks.

Parameters have timm's own names. Batch norms always compute with the statistics that came with the weights: a step of
a few images, of one task, has others, and a frozen backbone must not change.
Letters: B images, H W pixels, h w feature grid, N tokens, D width.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from visft_ds.pretrained import check_timm

#: Gains of a random model below this are taken for a start at zero.
SMALLEST_GAIN = 1e-2


class TimmBackbone(nn.Module):
    """A model of timm behind the interface of `EvaViT`, as far as heads, stages and engines use it.

    It shares the children and parameters of the model it is made of, and replaces its forward.

    Attributes:
        name: as timm knows it, with or without tag.
        width: D. patch_size: pixels of the image to one cell of the feature map, and the least side of an image.
        image_size: the side that stored positions belong to; any size can be fed.
        options: with which timm's model was made, beyond what all are made with.
        pixel_mean, pixel_std: of the channels of RGB in [0, 1], with which it was pretrained.
        left_out: names (and values, where they exist) of what lies behind the feature map.
        until: the block that it was made to end after; None: it is whole.
        behind: names of modules that were removed for that: later ones of a list, and others, which became identities.
    """

    def __init__(self, model: nn.Module, name: str, options: Mapping[str, int], until: str | None = None) -> None:
        """Take a model over that `timm.create_model` made with these options; it then ends after the block `until`.

        Raises ValueError for one that takes images of one size only, has no feature map, or no such block.
        """
        super().__init__()
        timm_model: Any = model
        for store in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[store] = model.__dict__[store]
        self._timm = (timm_model,)  # a tuple, so that it is no child of its own
        config = timm_model.pretrained_cfg
        self.name, self.options = name, dict(options)
        self.image_size = options.get("img_size", int(config["input_size"][-1]))
        self.pixel_mean, self.pixel_std = tuple(config["mean"]), tuple(config["std"])
        self.classifier_names: str | tuple[str, ...] = config.get("classifier") or ()
        self._recompute = "none"
        self.until: str | None = None
        self.behind: tuple[str, ...] = ()
        self.left_out: dict[str, Tensor] = {}
        probe = self._probe()
        probe.train()  # a module begins in training mode by default: batch norms would count the first images
        self._check_map(probe)
        self._leave_out(probe, probe._unused())
        if until is not None:
            self._end(probe, until)
        self.width, self.patch_size = self._measure(probe)
        self.train()

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), already normalised -> (B, D, h, w)."""
        model = self._timm[0]
        patch = self._patch()
        if patch is not None:  # pixels right and below the last whole patch are dropped, as EvaViT does
            images = images[..., : images.shape[-2] // patch * patch, : images.shape[-1] // patch * patch]
        return self._map(model.forward_features(images), images)

    def map_of(self, given: Tensor, images: Tensor) -> Tensor:
        """(B, D, h, w), what it would give for these images if it ended after a block that gives `given`."""
        return self._map(self._timm[0].norm(given) if self._patch() is not None else given, images)

    def _map(self, features: Tensor, images: Tensor) -> Tensor:
        """Tokens or a map of timm's as (B, D, h, w)."""
        model, patch = self._timm[0], self._patch()
        if features.ndim == 4:
            return features.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else features
        if patch is None:
            raise ValueError(f"features of shape {tuple(features.shape)}")
        grid = images.shape[-2] // patch, images.shape[-1] // patch
        tokens = features[:, model.num_prefix_tokens :]
        return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *grid)

    def train(self, mode: bool = True) -> TimmBackbone:
        """Training mode, of all but batch norms."""
        super().train(mode)
        self._timm[0].training = mode
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.train(False)
        return self

    @property
    def recompute(self) -> str:
        """ "block": every block, or stage, is recomputed in the backward pass; "none". timm knows no other policies."""
        return self._recompute

    @recompute.setter
    def recompute(self, policy: str) -> None:
        from timm.layers import set_reentrant_ckpt

        set_reentrant_ckpt(False)  # a reentrant one gives no gradient to adapters behind a frozen stem
        self._recompute = policy
        if policy != "none" or self._timm[0].__dict__.get("grad_checkpointing"):
            self._timm[0].set_grad_checkpointing(policy != "none")

    def describe(self) -> str:
        """A few words for the console."""
        text = f"timm {self.name}, width {self.width}, a cell for {self.patch_size} x {self.patch_size} pixels"
        return text + (f", ends after {self.until}" if self.until else "")

    def ends(self) -> list[str]:
        """Blocks that it can end after, in their order: those of timm's list of features, and their siblings."""
        known, found = dict(self.named_modules()), dict[str, None]()
        for info in getattr(self._timm[0], "feature_info", ()):
            parent, _, leaf = info["module"].rpartition(".")
            siblings = list(known[parent]._modules) if leaf.isdigit() and parent in known else [leaf]
            found |= dict.fromkeys(f"{parent}.{name}" if parent else name for name in siblings)
        return [name for name in found if name in known and name not in self.behind]

    def end_after(self, block: str) -> None:
        """Leave out all that lies behind a block. Raises ValueError for one that is not of `ends`."""
        probe = self._probe()
        self._end(probe, block)
        self.width, self.patch_size = self._measure(probe)

    def ending(self) -> list[str]:
        """Lines of Python that make a `model` of `timm.create_model` end where this backbone does.

        Its `forward_features` then gives what this backbone makes its map of. No lines where it is whole.
        """
        parent = (self.until or "").rpartition(".")[0]
        lines = [f"model.{name} = torch.nn.Identity()" for name in self.behind if "." not in name]
        if len(lines) < len(self.behind):
            lines.append(f"del model.{parent}[{len(self.get_submodule(parent)._modules)}:]")
        return lines

    def settings(self) -> str:
        """Facts for the metadata of a weight file: which model it is of."""
        return json.dumps({"name": self.name, "image_size": self.options.get("img_size")})

    def stored_buffers(self) -> dict[str, Tensor]:
        """The buffers that belong to its weights (statistics of batch norms)."""
        kept = self.state_dict().keys()
        return {name: value for name, value in self.named_buffers() if name in kept}

    def set_buffers(self, values: Mapping[str, Tensor]) -> None:
        """Replace buffers by name, e.g. those on the meta device."""
        for name, value in values.items():
            owner, _, leaf = name.rpartition(".")
            module = self.get_submodule(owner)
            setattr(module, leaf, value)

    def _patch(self) -> int | None:
        """Side of a patch of a plain ViT; None for networks that take any number of pixels."""
        embed: Any = getattr(self._timm[0], "patch_embed", None)
        plain = hasattr(self._timm[0], "num_prefix_tokens") and hasattr(embed, "patch_size")
        return int(embed.patch_size[0]) if plain else None

    def _probe(self) -> TimmBackbone:
        """Itself where it has no values; else the same model as timm builds it, without values."""
        return self if next(self.parameters()).is_meta else _on_meta(self)

    def _check_map(self, probe: TimmBackbone) -> None:
        try:
            features = probe(self._blank(self.image_size, self.image_size))
            if features.ndim == 4:
                return
            reason = f"features of shape {tuple(features.shape)}"
        except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error) or type(error).__name__  # timm's words for what its model cannot do with an image
        raise ValueError(
            f"timm's {self.name} gives no map of rows and columns, which heads need ({reason}); plain ViTs and "
            "convolutional networks do"
        )

    def _unused(self) -> list[str]:
        """Children that the feature map does not need."""
        named = dict(self.named_parameters())
        with torch.enable_grad():
            features = self(self._blank(self.image_size, self.image_size))
            found = torch.autograd.grad(features.sum(), list(named.values()), allow_unused=True)
        used = {name.partition(".")[0] for name, gradient in zip(named, found, strict=True) if gradient is not None}
        return [
            child
            for child, module in self.named_children()
            if any(True for _ in module.parameters()) and child not in used
        ]

    def _end(self, probe: TimmBackbone, block: str) -> None:
        if block not in self.ends():
            near = difflib.get_close_matches(block, self.ends(), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            known = ", ".join(self.ends()) or "no list of its features"
            raise ValueError(f"timm's {self.name} cannot end after {block!r}: it has {known}{hint}")
        behind, _, _ = probe._run_through(block)
        if self._patch() is not None:  # the last norm stays
            behind = []
        parent, _, leaf = block.rpartition(".")
        siblings = list(probe.get_submodule(parent)._modules) if parent else []
        behind += [f"{parent}.{name}" for name in siblings[siblings.index(leaf) + 1 :]] if parent else []
        self.until = block
        self.behind += tuple(name for name in behind if name not in self.behind)
        self._leave_out(probe, behind)
        _, given, features = probe._run_through(block)
        if self._patch() is None and features is not given:
            raise ValueError(
                f"timm's {self.name} cannot end after {block!r}: behind it more is computed than can be left out"
            )

    def _run_through(self, block: str) -> tuple[list[str], Tensor, Tensor]:
        """Run on the meta device: (children that are first called behind a block, what it gives, the features)."""
        called: dict[str, None] = {}
        before: list[str] = []
        given: list[Tensor] = []

        def reached(module: nn.Module, inputs: Any, output: Tensor) -> None:
            before.extend(called)
            given.append(output)

        hooks = [self.get_submodule(block).register_forward_hook(reached)]
        hooks += [
            module.register_forward_pre_hook(lambda *_, child=child: called.setdefault(child))
            for child, module in self.named_children()
        ]
        features: Tensor = self._timm[0].forward_features(self._blank(self.image_size, self.image_size))
        for hook in hooks:
            hook.remove()
        behind = [child for child in called if child not in (*before, block.partition(".")[0])]
        return behind, given[-1], features

    def _leave_out(self, probe: TimmBackbone, names: Iterable[str]) -> None:
        """Remove modules by name, of itself and of its probe: of a list altogether, others become identities."""
        for name in names:
            parent, _, leaf = name.rpartition(".")
            for one in dict.fromkeys((self, probe)):
                if leaf not in one.get_submodule(parent)._modules:
                    continue  # it ended in front of it before
                if one is self:
                    values = self.get_submodule(name).state_dict()
                    self.left_out |= {f"{name}.{key}": value for key, value in values.items()}
                if parent:
                    delattr(one.get_submodule(parent), leaf)
                else:
                    setattr(one._timm[0], leaf, nn.Identity())

    def _measure(self, probe: TimmBackbone) -> tuple[int, int]:
        """(width, stride) by the shapes of three feature maps; a part of a stride may have a row of its own."""
        side = self.image_size
        with torch.no_grad():
            _, width, rows, _ = probe(self._blank(side, side)).shape
            try:
                more = probe(self._blank(side, 33 * side)).shape[3] - rows
                stride = round(32 * side / more) if more else side  # exact to a part of a pixel
                other = probe(self._blank(side + stride, 2 * side + stride // 2)).shape
            except (AssertionError, RuntimeError) as error:  # timm's words for a size that it does not take
                raise ValueError(f"timm's {self.name} takes images of one size only: {error}") from error
        if other[2] <= rows or other[3] < 2 * rows - 1:
            raise ValueError(f"timm's {self.name} has a feature map that does not follow the size of its image")
        return int(width), stride

    @staticmethod
    def _blank(height: int, width: int) -> Tensor:
        return torch.empty(1, 3, height, width, device="meta")


def _on_meta(backbone: TimmBackbone) -> TimmBackbone:
    """The same shapes without values."""
    probe = object.__new__(TimmBackbone)
    probe.__dict__.update(backbone.__dict__)
    model, _ = build_model(backbone.name, backbone.options.get("img_size"), device="meta")
    probe.__dict__["_timm"] = (model,)
    for store in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        probe.__dict__[store] = model.__dict__[store]
    return probe


def fine_map(name: str) -> tuple[str | None, int]:
    """(block whose map has a cell for 16 pixels, None for all of the tower; side of an image of some 20 cells)."""
    model, _ = build_model(name, None, device="meta")
    known = [(str(info["module"]), int(info["reduction"])) for info in getattr(model, "feature_info", ())]
    fine = [(block, stride) for block, stride in known if stride <= 16] or [("", 16)]
    block, stride = fine[-1]
    return (None, 320 // stride * stride) if fine[-1:] == known[-1:] or not block else (block, 320)


def build_timm(
    name: str,
    *,
    image_size: int | None = None,
    until: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> TimmBackbone:
    """A model of timm by its name, with random weights; nothing is ever downloaded.

    They are timm's own but for gains that it starts at or near 0 (layer scales, the last norm of a residual branch),
    which are 1: a frozen random tower would be little more than its stem.

    Args:
        name: with or without the tag of pretrained weights, which decides how images are normalised.
        image_size: side that the position embeddings belong to; None: the model's own.
        until: ends it after this block.
        device: "cpu", or "meta" for shapes without memory.
        dtype: of the parameters.
        seed: decides every weight, on one version of timm.

    Raises:
        ValueError: timm is not installed, an unknown name (with the nearest ones) or block, or a model that is no
            backbone.
    """
    model, options = build_model(name, image_size, device=device, seed=seed)
    backbone = TimmBackbone(model, name, options, until)
    if device != "meta":
        _open_gains(backbone)
    for parameter in backbone.parameters():
        parameter.data = parameter.data.to(dtype)
    return backbone


@torch.no_grad()
def _open_gains(backbone: TimmBackbone) -> None:
    for name, parameter in backbone.named_parameters():
        is_gain = name.rpartition(".")[2] in ("weight", "gamma", "gamma_1", "gamma_2")
        if is_gain and parameter.ndim == 1 and parameter.abs().max() < SMALLEST_GAIN:
            parameter.fill_(1.0)


def build_model(name: str, image_size: int | None, *, device: str, seed: int = 0) -> tuple[nn.Module, dict[str, int]]:
    """timm's model itself, without classifier, and what of its size was given (networks without positions have none).

    Raises ValueError as `build_timm`.
    """
    check_timm(name)
    import timm

    options: list[dict[str, Any]] = [{"dynamic_img_size": True}, {}]
    if image_size is not None:
        options = [{"dynamic_img_size": True, "img_size": image_size}, {"img_size": image_size}, {}]
    with torch.random.fork_rng(devices=[]), torch.device(device):
        for more in options:
            torch.manual_seed(seed)
            try:
                model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **more)
            except TypeError as error:  # convolutional networks take neither
                if more == options[-1] or "unexpected keyword argument" not in str(error):
                    raise
                continue
            except RuntimeError as error:  # its word for an unknown tag
                raise ValueError(f"timm's {name}: {error}") from error
            return model, {key: value for key, value in more.items() if key == "img_size"}
    raise AssertionError("unreachable: the last try returns or raises")


def timm_version() -> str:
    """Random weights are a function of the seed on one version of timm."""
    return version("timm")
