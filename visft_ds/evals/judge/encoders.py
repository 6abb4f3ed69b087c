"""Image encoders for evaluation: what an image becomes in a model of ours, of open_clip or of timm.

Every encoder is a module `(images, kinds) -> {kind: tensor}` that computes all kinds in one forward:

    pooled  (B, D)        one vector of an image, before any projection into a space shared with texts
    clip    (B, E)        the CLIP embedding, of length 1
    patches (B, D, h, w)  the feature map

and takes images as its `preprocess` makes them: RGB, resized and cropped to squares, normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2 as transforms

from visft_ds.evals.judge.text import TextTower
from visft_ds.files import reading
from visft_ds.models.eva_vit import EvaViT
from visft_ds.models.timm_backbone import TimmBackbone, classifier_names

KINDS = ("pooled", "clip", "patches")
KINDS_WITHOUT_TEXT = ("pooled", "patches")
COARSE = 14  #: least pixels of a cell of an early stage's map: in-context compares all cells with all
#: (mean, std) of the channels of RGB in [0, 1] that EVA-CLIP was trained and is evaluated with.
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

Preprocess = Callable[[Image.Image], Tensor]  #: RGB image -> (3, side, side)


@dataclass(frozen=True)
class Encoder:
    """A model that is evaluated."""

    module: nn.Module  #: as the head of this file says, in eval mode, without gradients
    kinds: tuple[str, ...]  #: what it can compute
    preprocess: Preprocess
    normalisation: tuple[Sequence[float], Sequence[float]]  #: (mean, std) of RGB in [0, 1], the last step of it
    side: int  #: of its images, pixels
    text: TextTower | None


class EvaEncoder(nn.Module):
    """A tower of ours, with the CLIP projection (of the normed class token) of its file if it has one; `pooled` is the
    class token, or the mean of the patches of a tower without.
    """

    def __init__(self, backbone: EvaViT, projection: nn.Linear | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = None if backbone.cls_token is None else projection
        self.kinds = KINDS if self.head is not None else KINDS_WITHOUT_TEXT

    def forward(self, images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        """Features of images (B, 3, H, W)."""
        return self._of_tokens(self.backbone.tokens(images)[-1], images, kinds)

    def of_block(self, given: Tensor, images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        """The same where a block of the backbone gives `given` and is the last."""
        return self._of_tokens(self.backbone.norm(given), images, kinds)

    def _of_tokens(self, tokens: Tensor, images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        first = 0 if self.backbone.cls_token is None else 1
        found: dict[str, Tensor] = {}
        if "pooled" in kinds:
            found["pooled"] = tokens[:, 0] if first else tokens[:, first:].float().mean(dim=1)
        if "clip" in kinds:
            assert self.head is not None
            found["clip"] = F.normalize(self.head(tokens[:, 0]).float(), dim=-1)
        if "patches" in kinds:
            found["patches"] = self.backbone.feature_map(tokens, images.shape[-2:])
        return found


class FeatureMapEncoder(nn.Module):
    """A backbone that gives a feature map and nothing else; `pooled` is its mean."""

    kinds = KINDS_WITHOUT_TEXT

    def __init__(self, backbone: TimmBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        """Features of images (B, 3, H, W)."""
        patches: Tensor = self.backbone(images)[-1]
        return self._of_map(self._coarse(patches, images) if self.backbone.layers_read else patches, kinds)

    def of_block(self, given: Tensor, images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        """The same where a block of the backbone gives `given` and is the last."""
        return self._of_map(self._coarse(self.backbone.map_of(given, images), images), kinds)

    def _coarse(self, patches: Tensor, images: Tensor) -> Tensor:
        """A map of an early stage of a convolutional network, averaged to a cell for COARSE pixels."""
        if self.backbone.patch is not None or patches.shape[-1] * COARSE <= images.shape[-1]:
            return patches
        height, width = (-(-side // COARSE) for side in images.shape[-2:])
        return F.adaptive_avg_pool2d(patches, (height, width))

    def _of_map(self, patches: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        found = {"pooled": patches.float().mean(dim=(2, 3)), "patches": patches}
        return {kind: value for kind, value in found.items() if kind in kinds}


class _OpenClipEncoder(nn.Module):
    """The image side of an open_clip model; `pooled` is what comes before the last projection if timm gives it."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        self.kinds = KINDS

    def forward(self, images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        trunk: Any = getattr(self.visual, "trunk", None)
        if trunk is not None:  # one forward for all
            tokens = trunk.forward_features(images)
            found["pooled"] = trunk.forward_head(tokens, pre_logits=True)
            found["clip"] = F.normalize(self.visual.head(trunk.forward_head(tokens)).float(), dim=-1)  # type: ignore[operator]
            found["patches"] = _patches(trunk, tokens, images)
            return {kind: found[kind] for kind in kinds}
        if "patches" in kinds:
            outputs = self.visual.forward_intermediates(images, indices=1, normalize_intermediates=True)  # type: ignore[operator]
            found["patches"], embedding = outputs["image_intermediates"][-1], outputs["image_features"]
        else:
            embedding = self.visual(images)
        found["pooled"], found["clip"] = embedding, F.normalize(embedding.float(), dim=-1)
        return {kind: found[kind] for kind in kinds}


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
            found["patches"] = _patches(self.model, tokens, images)
        return found


def _patches(model: Any, tokens: Tensor, images: Tensor) -> Tensor:
    """The feature map out of what timm's `forward_features` returns."""
    if tokens.ndim == 4:
        return tokens.permute(0, 3, 1, 2) if str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC") else tokens
    height, width = (images.shape[axis + 2] // model.patch_embed.patch_size[axis] for axis in (0, 1))
    return tokens[:, model.num_prefix_tokens :].transpose(1, 2).reshape(tokens.shape[0], -1, height, width)


def square_preprocess(side: int, mean: Sequence[float], std: Sequence[float]) -> Preprocess:
    """EVA-CLIP's: the shorter side to `side` pixels by bicubic interpolation, the middle square, normalised.

    https://github.com/baaivision/EVA/blob/master/EVA-CLIP/rei/eva_clip/transform.py
    """
    return transforms.Compose(
        [
            transforms.Resize(side, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(side),
            transforms.PILToTensor(),
            transforms.ToDtype(torch.float32, scale=True),
            transforms.Normalize(list(mean), list(std)),
        ]
    )


def open_clip_encoder(name: str, weights: str | None) -> Encoder:
    """A model of open_clip with its text side.

    Args:
        name: of a built-in architecture, `hf-hub:...` or `local-dir:...`.
        weights: tag or file; None if the name brings them along.

    Raises:
        ValueError: an unknown name or tag, no weights named, or a configuration that asks for code to be run.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    brings = name.startswith(("hf-hub:", "local-dir:"))
    if not brings and (weights is None or name not in open_clip.list_models()):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none of that name"
        raise ValueError(f"open_clip:{name}: give open_clip:NAME:TAG or open_clip:NAME:FILE; tags: {tags}")
    with reading(f"open_clip:{name}", "a model of open_clip"):
        model = open_clip.create_model(name, pretrained=weights, load_weights=True).requires_grad_(False).eval()
        # Code of a repository is not run, and nobody is asked.
        foreign = open_clip.get_model_config(name)["text_cfg"].get("hf_tokenizer_name")
        tokenizer = open_clip.get_tokenizer(name, **({"trust_remote_code": False} if foreign else {}))
    config, visual = model.visual.preprocess_cfg, _OpenClipEncoder(model.visual)
    size = config["size"]
    return Encoder(
        visual.eval(),
        visual.kinds,
        image_transform_v2(PreprocessCfg(**config), is_train=False),
        (config["mean"], config["std"]),
        size if isinstance(size, int) else int(size[0]),
        TextTower(model, tokenizer, model.encode_text),
    )


def timm_encoder(name: str, weights: str | None) -> Encoder:
    """A model of timm, without text side.

    Args:
        name: of the model, with or without tag, `hf-hub:...` or `local-dir:...`.
        weights: file; None: timm's own, which may be downloaded.

    Raises:
        ValueError: an unknown name, or a file that is not there or of another model.
    """
    import timm

    brings = name.startswith(("hf-hub:", "local-dir:"))
    if not brings and not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}; python -c 'import timm; print(timm.list_models(\"*vit*\"))'")
    with reading(weights or f"timm:{name}", f"weights of timm's {name}"):
        options = {"pretrained": weights is None, "num_classes": 0}
        try:
            model = timm.create_model(name, **options, dynamic_img_size=True)
        except TypeError:  # convolutional networks take any size
            model = timm.create_model(name, **options)
        if weights is not None:
            values = timm.models.load_state_dict(weights, weights_only=True)  # older versions would run code of pickles
            classifiers = classifier_names(model.pretrained_cfg.get("classifier"))
            heads = tuple(f"{one.partition('.')[0]}." for one in classifiers)
            own = model.state_dict().keys()
            model.load_state_dict(
                {name: one for name, one in values.items() if name in own or not name.startswith(heads)}
            )
    config = timm.data.resolve_model_data_config(model)
    return Encoder(
        _TimmEncoder(model).requires_grad_(False).eval(),
        KINDS_WITHOUT_TEXT,
        timm.data.create_transform(**config, is_training=False),
        (config["mean"], config["std"]),
        int(config["input_size"][-1]),
        None,
    )
