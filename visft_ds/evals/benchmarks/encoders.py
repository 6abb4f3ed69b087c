"""Image encoders for evaluation: what an image becomes in a model of ours, of open_clip or of timm.

Every encoder is a module `(images, kinds) -> {kind: tensor}` that computes all kinds in one forward:

    pooled  (B, D)        one vector of an image, before any projection into a space shared with texts
    clip    (B, E)        the CLIP embedding, of length 1
    patches (B, D, h, w)  the feature map
    clip_patches (B, E, h, w)  each place of it, projected as the class token is; of any length

and takes images as its `preprocess` makes them: RGB, resized and cropped to squares, normalised.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2 as transforms

from visft_ds.evals.benchmarks.dense_sets import CELLS
from visft_ds.evals.benchmarks.text_towers import TextOf, TextTower
from visft_ds.interop.foreign_code import LOCAL, check_config, check_folder, read_config
from visft_ds.interop.timm_names import classes_in
from visft_ds.models.eva_vit import EvaViT, block_names, depth_until
from visft_ds.models.timm_backbone import TimmBackbone

KINDS = ("pooled", "clip", "patches", "clip_patches")
KINDS_WITHOUT_TEXT = ("pooled", "patches")
#: Name -> (mean, std) of the channels of RGB in [0, 1]. EVA-CLIP was trained and is evaluated with CLIP's, ViSFT trains
#: its heads with ImageNet's.
NORMALISATIONS = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
POOLS = ("auto", "token", "mean")
RANDOM = "random"  #: says in place of weights that none are meant

_HUB = "hf-hub:"

Preprocess = Callable[[Image.Image], Tensor]  #: RGB image -> (3, side, side)


@dataclass(frozen=True)
class Encoder:
    """A model that is evaluated."""

    module: nn.Module  #: as the head of this file says, in eval mode, without gradients
    kinds: tuple[str, ...]  #: what it can compute
    preprocess: Preprocess
    normalisation: tuple[Sequence[float], Sequence[float]]  #: (mean, std) of RGB in [0, 1], the last step of it
    side: int  #: of its images, pixels
    settings: Mapping[str, Any]  #: what features depend on beside the weights; "architecture" where these do not tell
    text: TextTower | None
    facts: Mapping[str, str]  #: what was loaded, for people


class Blocks(Protocol):
    """Module of an encoder that can be read after each of its blocks: normed tokens of a ViT, maps as they are."""

    def ends(self) -> list[str]:
        """Names of the blocks, in their order."""

    def end_after(self, block: str) -> None:
        """Leave out all that lies behind a block; from then on it gives what that block does."""

    def block(self, name: str) -> nn.Module:
        """The module whose result is read."""

    def of_block(self, given: Tensor, images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        """Features of images of which a block gives `given`, of KINDS_WITHOUT_TEXT."""


class EvaEncoder(nn.Module):
    """A tower of ours, with the CLIP projection of its file where it has one.

    Args:
        projection: (weight (E, D), bias (E)) on the normed class token, as in EVA-CLIP.
        pool: where `pooled` comes from: the class token ("token"), the mean of the patches ("mean"); "auto": the class
            token where the tower has one.

    Raises:
        ValueError: a class token is asked for, or needed by the projection, and there is none.
    """

    def __init__(self, backbone: EvaViT, projection: tuple[Tensor, Tensor] | None, pool: str = "auto") -> None:
        super().__init__()
        if pool == "token" and backbone.cls_token is None:
            raise ValueError("the tower has no class token to pool by: choose another pooling, mean or auto")
        self.backbone = backbone
        self.by_token = backbone.cls_token is not None and pool != "mean"
        self.head: nn.Linear | None = None
        if projection is not None and backbone.cls_token is not None:
            weight, bias = projection
            if weight.shape[1] != backbone.width:
                raise ValueError(f"the CLIP projection reads width {weight.shape[1]}, the tower has {backbone.width}")
            self.head = nn.Linear(weight.shape[1], weight.shape[0])
            self.head.load_state_dict({"weight": weight, "bias": bias})

    def forward(self, images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        """Features of images (B, 3, H, W)."""
        return self._of_tokens(self.backbone.tokens(images), images, kinds)

    def ends(self) -> list[str]:
        """See `Blocks`."""
        return self.backbone.ends()

    def end_after(self, block: str) -> None:
        """See `Blocks`."""
        self.backbone.end_after(block)
        self.head = None  # it reads the last block

    def block(self, name: str) -> nn.Module:
        """See `Blocks`."""
        return self.backbone.get_submodule(name)

    def of_block(self, given: Tensor, images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        """See `Blocks`."""
        return self._of_tokens(self.backbone.norm(given), images, kinds)

    def _of_tokens(self, tokens: Tensor, images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        first = 0 if self.backbone.cls_token is None else 1
        found: dict[str, Tensor] = {}
        if "pooled" in kinds:
            found["pooled"] = tokens[:, 0] if self.by_token else tokens[:, first:].float().mean(dim=1)
        if "clip" in kinds:
            assert self.head is not None
            found["clip"] = F.normalize(self.head(tokens[:, 0]).float(), dim=-1)
        if "patches" in kinds:
            found["patches"] = self.backbone.feature_map(tokens, self.backbone.grid(images))
        if "clip_patches" in kinds:
            assert self.head is not None
            projected = self.head(tokens[:, first:]).transpose(1, 2)
            found["clip_patches"] = projected.unflatten(2, self.backbone.grid(images))
        return found

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of features that it can compute."""
        return KINDS if self.head is not None else KINDS_WITHOUT_TEXT


class FeatureMapEncoder(nn.Module):
    """A backbone that gives a feature map and nothing else; `pooled` is its mean."""

    def __init__(self, backbone: TimmBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        """Features of images (B, 3, H, W)."""
        patches: Tensor = self.backbone(images)
        return self._of_map(patches if self.backbone.until is None else _coarse(patches), kinds)

    def ends(self) -> list[str]:
        """See `Blocks`."""
        return self.backbone.ends()

    def end_after(self, block: str) -> None:
        """See `Blocks`."""
        self.backbone.end_after(block)

    def block(self, name: str) -> nn.Module:
        """See `Blocks`."""
        return self.backbone.get_submodule(name)

    def of_block(self, given: Tensor, images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        """See `Blocks`."""
        return self._of_map(_coarse(self.backbone.map_of(given, images)), kinds)

    def _of_map(self, patches: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        found = {"pooled": patches.float().mean(dim=(2, 3)), "patches": patches}
        return {kind: value for kind, value in found.items() if kind in kinds}


def _coarse(patches: Tensor) -> Tensor:
    """A map of an early block, averaged to no more places than are judged."""
    height, width = (min(side, CELLS) for side in patches.shape[-2:])
    return patches if (height, width) == patches.shape[-2:] else F.adaptive_avg_pool2d(patches, (height, width))


class _OpenClipEncoder(nn.Module):
    """The image side of an open_clip model; `pooled` is what comes before the last projection where timm gives it."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        self.until: str | None = None

    def forward(self, images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        if self.until is not None:
            given: list[Tensor] = []
            hook = self.block(self.until).register_forward_hook(lambda *parts: given.append(parts[-1]))
            self.visual(images)
            hook.remove()
            return self.of_block(given[0], images, kinds)
        found: dict[str, Tensor] = {}
        trunk: Any = getattr(self.visual, "trunk", None)
        if trunk is not None:  # one forward for all
            tokens = trunk.forward_features(images)
            if "pooled" in kinds:
                found["pooled"] = trunk.forward_head(tokens, pre_logits=True)
            if "clip" in kinds:
                embedding = self.visual.head(trunk.forward_head(tokens))  # type: ignore[operator]
                found["clip"] = F.normalize(embedding.float(), dim=-1)
            if "patches" in kinds:
                found["patches"] = _patches(trunk, tokens)
            return found
        if "patches" in kinds or "clip_patches" in kinds:
            outputs = self.visual.forward_intermediates(images, indices=1, normalize_intermediates=True)  # type: ignore[operator]
            found["patches"], embedding = outputs["image_intermediates"][-1], outputs["image_features"]
            if "clip_patches" in kinds:
                found["clip_patches"] = torch.einsum("bdhw,de->behw", found["patches"], self.visual.proj)
        else:
            embedding = self.visual(images)
        found["pooled"], found["clip"] = embedding, F.normalize(embedding.float(), dim=-1)
        return {kind: found[kind] for kind in kinds}

    def ends(self) -> list[str]:
        """See `Blocks`; none of a network that is no plain ViT with a class token."""
        plain = hasattr(self.visual, "transformer") and self.kinds == KINDS
        return block_names(len(self.visual.transformer.resblocks)) if plain else []  # type: ignore[union-attr,arg-type]

    def end_after(self, block: str) -> None:
        """See `Blocks`."""
        blocks: Any = self.visual.transformer.resblocks  # type: ignore[union-attr]
        del blocks[depth_until(block, len(blocks)) :]
        self.until = block

    def block(self, name: str) -> nn.Module:
        """See `Blocks`."""
        return self.visual.get_submodule(name.replace("blocks", "transformer.resblocks"))

    def of_block(self, given: Tensor, images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        """See `Blocks`; `pooled` is the class token."""
        visual: Any = self.visual
        tokens = visual.ln_post(given if visual.transformer.batch_first else given.transpose(0, 1))
        grid = tuple(side // size for side, size in zip(images.shape[-2:], visual.patch_size, strict=True))
        found = {"pooled": tokens[:, 0], "patches": tokens[:, 1:].transpose(1, 2).unflatten(2, grid)}
        return {kind: value for kind, value in found.items() if kind in kinds}

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of features that it can compute."""
        by_token = getattr(self.visual, "proj", None) is not None and getattr(self.visual, "attn_pool", 0) is None
        return KINDS if by_token else KINDS[:3]


class _TimmEncoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        tokens = self.model.forward_features(images)
        found: dict[str, Tensor] = {}
        if "pooled" in kinds:
            found["pooled"] = self.model.forward_head(tokens, pre_logits=True)
        if "patches" in kinds:
            found["patches"] = _patches(self.model, tokens)
        return found


def _patches(model: Any, tokens: Tensor) -> Tensor:
    """The feature map out of what timm's `forward_features` returns."""
    if tokens.ndim == 4:
        return tokens.permute(0, 3, 1, 2) if str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC") else tokens
    height, width = model.patch_embed.grid_size
    return tokens[:, model.num_prefix_tokens :].transpose(1, 2).reshape(tokens.shape[0], -1, height, width)


def square_preprocess(side: int, mean: Sequence[float], std: Sequence[float]) -> Preprocess:
    """EVA-CLIP's: the shorter side to `side` pixels by bicubic interpolation, the middle square, normalised.

    https://github.com/baaivision/EVA/blob/master/EVA-CLIP/rei/eva_clip/transform.py
    """
    return transforms.Compose(
        [eva_crop(side), transforms.ToDtype(torch.float32, scale=True), transforms.Normalize(list(mean), list(std))]
    )


def eva_crop(side: int) -> Preprocess:
    """The same up to the pixels, (3, side, side) uint8."""
    return transforms.Compose(
        [
            transforms.Resize(side, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(side),
            transforms.PILToTensor(),
        ]
    )


def open_clip_encoder(name: str, weights: str | None) -> Encoder:
    """A model of open_clip with its text side.

    Args:
        name: of a built-in architecture, `hf-hub:...` or `local-dir:...`, or the path of a JSON configuration.
        weights: tag or file; "random" for none; None where the name brings them along.

    Raises:
        ValueError: an unknown name or tag, no weights named, or a configuration that asks for code to be run.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    if Path(name).suffix == ".json":
        check_config(read_config(Path(name)), name)
        open_clip.add_model_config(Path(name))
        name = Path(name).stem
    brings = name.startswith((_HUB, LOCAL))
    if not brings and name not in open_clip.list_models():
        raise ValueError(
            f"open_clip has no model {name!r}; python -c 'import open_clip; print(open_clip.list_models())'"
        )
    if brings == (weights is not None):
        raise ValueError(
            f"open_clip:{name} brings its weights along: leave {weights!r} out"
            if brings
            else f"say which weights: open_clip:{name}:TAG, open_clip:{name}:FILE, or open_clip:{name}:{RANDOM}. "
            f"Tags: {', '.join(open_clip.list_pretrained_tags_by_model(name)) or 'none'}"
        )
    if name.startswith(LOCAL):
        check_folder(Path(name.removeprefix(LOCAL)))
    try:
        if name.startswith(_HUB):
            check_config(open_clip.get_model_config(name), name)
        model = open_clip.create_model(
            name, pretrained=None if weights == RANDOM else weights, load_weights=weights != RANDOM
        )
    # Its words for an unknown tag, a failed download and another shape.
    except (RuntimeError, FileNotFoundError) as error:
        raise ValueError(f"open_clip:{name}: {error}") from error
    config, visual = model.visual.preprocess_cfg, _OpenClipEncoder(model.visual)
    # What the search may not have seen, such as files of a repository, is not run either, and nobody is asked whether.
    foreign = open_clip.get_model_config(name)["text_cfg"].get("hf_tokenizer_name")
    tokenizer = open_clip.get_tokenizer(name, **({"trust_remote_code": False} if foreign else {}))
    return Encoder(
        visual.requires_grad_(False).eval(),
        visual.kinds,
        image_transform_v2(PreprocessCfg(**config), is_train=False),
        (config["mean"], config["std"]),
        _side(config["size"]),
        {"preprocess": json.dumps(config, sort_keys=True), "architecture": open_clip.get_model_config(name)},
        TextTower(TextOf(model.requires_grad_(False).eval()), tokenizer, f"open_clip {name}"),
        {"backbone": f"open_clip {name}, weights {weights or 'of its repository'}"},
    )


def timm_encoder(name: str, weights: str | None) -> Encoder:
    """A model of timm, without text side.

    Args:
        name: of the model, with or without tag.
        weights: file; "random" for none; None: timm's own, which may be downloaded.

    Raises:
        ValueError: an unknown name, or a file that is not there or of another model.
    """
    import timm

    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}; python -c 'import timm; print(timm.list_models(\"*vit*\"))'")
    own_file = weights is not None and weights != RANDOM
    if own_file and not Path(str(weights)).is_file():
        raise ValueError(f"timm:{name}: {weights} is no file; give one, {RANDOM}, or nothing for timm's own weights")
    facts = {"backbone": f"timm {name}, weights {weights or 'of timm'}"}
    try:
        if own_file:
            model, left_out = _timm_of_file(name, str(weights))
            facts |= {"left out": f"the classifier: {', '.join(left_out)}"} if left_out else {}
        else:
            model = timm.create_model(name, pretrained=weights is None, num_classes=0)
    # Its words for tensors that do not fit, for weights it does not have, and for pickles (by version).
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"timm:{name}: {error}") from error
    config = timm.data.resolve_model_data_config(model)
    return Encoder(
        _TimmEncoder(model).requires_grad_(False).eval(),
        KINDS_WITHOUT_TEXT,
        timm.data.create_transform(**config, is_training=False),
        (config["mean"], config["std"]),
        int(config["input_size"][-1]),
        {
            "preprocess": json.dumps({key: config[key] for key in sorted(config)}),
            "architecture": name.partition(".")[0],
        },
        None,
        facts,
    )


def _timm_of_file(name: str, path: str) -> tuple[Any, list[str]]:
    """(a model of timm without classifier, names of the classifier's tensors that its file has).

    timm itself accounts for every key of the file, against the model with as many classes.
    """
    import timm

    if Path(path).suffix in (".npz", ".npy"):  # of JAX: timm's models read these themselves
        return timm.create_model(name, num_classes=0, checkpoint_path=path), []
    try:
        values = timm.models.load_state_dict(path, weights_only=True)  # older versions would run the code of a pickle
    except (SafetensorError, EOFError) as error:  # the latter of an empty file
        raise ValueError(f"timm:{name}: {path} is no whole weight file ({error})") from error
    except RuntimeError as error:
        raise ValueError(f"timm:{name}: {path}: {error}") from error
    known = timm.get_pretrained_cfg(name)
    shapes = {key: value.shape for key, value in values.items()}
    model = timm.create_model(name, num_classes=classes_in(known.classifier if known else None, shapes))
    model.load_state_dict(values)
    model.reset_classifier(0)
    return model, sorted(values.keys() - model.state_dict().keys())


def _side(size: int | tuple[int, int] | list[int]) -> int:
    return size if isinstance(size, int) else int(size[0])
