"""Image encoders for evaluation: what an image becomes in a backbone of ours or of timm, or in a model of
open_clip.

Every encoder is a module `(images, kinds) -> {kind: tensor}` that computes all kinds in one forward:

    pooled  (B, D)        one vector of an image, before any projection into a space shared with texts
    clip    (B, E)        the CLIP embedding, of length 1
    patches (B, D, h, w)  the feature map

and takes images as its `preprocess` makes them: RGB, or bands, resized and cropped to squares, normalised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional as pixels_of

from visft_ds.evals.judge.text import TextTower
from visft_ds.files import reading
from visft_ds.models import Backbone
from visft_ds.models.eva_vit import EvaViT
from visft_ds.pretrained import HUB, HubFile

KINDS = ("pooled", "clip", "patches")
KINDS_WITHOUT_TEXT = ("pooled", "patches")
COARSE = 14  #: least pixels of a cell of an early stage's map: in-context compares all cells with all
#: (mean, std) of the channels of RGB in [0, 1] that EVA-CLIP was trained and is evaluated with.
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

#: What open_clip calls weights in a repository, where its list names no file.
OPEN_CLIP_FILES: tuple[str, ...] = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

#: RGB image, or bands (n, H, W) as shares of their range -> (3 or n, side, side)
Preprocess = Callable[[Image.Image | Tensor], Tensor]


@dataclass(frozen=True)
class Encoder:
    """A model that is evaluated."""

    module: nn.Module  #: as the head of this file says, in eval mode, without gradients
    kinds: tuple[str, ...]  #: what it can compute
    preprocess: Preprocess
    normalisation: tuple[
        Sequence[float], Sequence[float]
    ]  #: (mean, std) of RGB, or of each band, in [0, 1], the last step of it
    side: int  #: of its images, pixels
    text: TextTower | None

    def normalised(self, image: Image.Image | Tensor) -> Tensor:
        """(3, H, W) of an image, a picture or a tensor of bytes, of any size."""
        if isinstance(image, Image.Image):
            image = pixels_of.pil_to_tensor(image)
        pixels = pixels_of.to_dtype(image, torch.float32, scale=True)
        return pixels_of.normalize(pixels, *map(list, self.normalisation))


class BackboneEncoder(nn.Module):
    """A backbone of ours or of timm; `pooled` is its class token, or the mean of the map where there is none.

    `clip` is the projection of the class token into the space of texts, of a tower that ends where its file
    does.
    """

    def __init__(self, backbone: Backbone, projection: nn.Linear | None = None) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.gives_tokens = isinstance(backbone, EvaViT) or backbone.patch is not None
        self.has_class_token = self.gives_tokens and getattr(backbone, "cls_token", None) is not None
        self.head = projection if self.has_class_token else None
        self.kinds = KINDS_WITHOUT_TEXT if self.head is None else KINDS

    def forward(self, images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        """Features of images (B, 3, H, W)."""
        outputs = self.backbone(images, prefixes=True)
        patches = [output for output in outputs if output.ndim == 4][-1]
        return self._features(patches, outputs[-1], images, kinds)

    def of_block(self, output: Tensor, images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        """The same where a block of the backbone gives `output` and is the last."""
        tokens = self.backbone.norm(output) if self.gives_tokens else output
        patches = self.backbone.feature_map(tokens, images.shape[-2:])
        return self._features(patches, tokens, images, kinds)

    def _features(
        self, patches: Tensor, tokens: Tensor, images: Tensor, kinds: Collection[str]
    ) -> dict[str, Tensor]:
        height, width = images.shape[-2:]
        if not self.gives_tokens and patches.shape[-1] * COARSE > width:
            cells = (math.ceil(height / COARSE), math.ceil(width / COARSE))
            patches = F.adaptive_avg_pool2d(patches, cells)
        features = {"patches": patches}
        if "pooled" in kinds:
            features["pooled"] = tokens[:, 0] if self.has_class_token else patches.float().mean(dim=(2, 3))
        if self.head is not None and "clip" in kinds:
            features["clip"] = F.normalize(self.head(tokens[:, 0]).float(), dim=-1)
        return {kind: features[kind] for kind in kinds}


class _OpenClipEncoder(nn.Module):
    """The image side of an open_clip model; `pooled` is what comes before the last projection if timm gives
    it.
    """

    kinds = KINDS

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual: Any = visual

    def forward(self, images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        """Features of images (B, 3, H, W)."""
        trunk = getattr(self.visual, "trunk", None)
        if trunk is None:
            normed = "patches" in kinds  # a tower with an attentional pooler has no norm that fits
            outputs = self.visual.forward_intermediates(images, indices=1, normalize_intermediates=normed)
            (patches,) = outputs["image_intermediates"]
            embedding = outputs["image_features"]
            pooled = embedding
        else:
            tokens, (patches,) = trunk.forward_intermediates(images, indices=1, norm=True)
            embedding = self.visual.head(trunk.forward_head(tokens))
            pooled = trunk.forward_head(tokens, pre_logits=True)
        features = {"pooled": pooled, "clip": F.normalize(embedding.float(), dim=-1), "patches": patches}
        return {kind: features[kind] for kind in kinds}


def square_preprocess(
    side: int, mean: Sequence[float], std: Sequence[float], resized: int | None = None
) -> Preprocess:
    """EVA-CLIP's: the shorter side to `resized` pixels by bicubic interpolation (None: to `side`), the middle
    square of `side` pixels, normalised.

    https://github.com/baaivision/EVA/blob/master/EVA-CLIP/rei/eva_clip/transform.py
    """
    return transforms.Compose(
        [
            transforms.Resize(resized or side, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(side),
            transforms.PILToTensor(),
            transforms.ToDtype(torch.float32, scale=True),
            transforms.Normalize(list(mean), list(std)),
        ]
    )


def check_open_clip_is_here(name: str, weights: str) -> None:
    """Raise ValueError for weights of open_clip, by name, tag or file, that it would have to download."""
    import open_clip

    if name.startswith(HUB):
        repository = name.removeprefix(HUB)
        files = OPEN_CLIP_FILES
    elif weights in open_clip.list_pretrained_tags_by_model(name) and not Path(weights).is_file():
        repository, _, file = open_clip.get_pretrained_cfg(name, weights)["hf_hub"].rpartition("/")
        files = (file,) if file else OPEN_CLIP_FILES
    else:  # in a folder, a file, or an error of open_clip_encoder
        return
    if not any(HubFile(repository, "main", file).cached() for file in files):
        raise ValueError(
            f"open_clip:{name}: its weights ({HUB}{repository}) are not in the hub's cache: add --download, "
            "or give a file"
        )


def open_clip_encoder(name: str, weights: str) -> Encoder:
    """A model of open_clip with its text side.

    Args:
        name: of a built-in architecture, `hf-hub:...` or `local-dir:...`.
        weights: tag or file; empty if the name brings them along.

    Raises:
        ValueError: an unknown name or tag, no weights named, or a configuration that asks for code to be run.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    brings = name.startswith(("hf-hub:", "local-dir:"))
    if not brings and (not weights or name not in open_clip.list_models()):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none of that name"
        raise ValueError(f"open_clip:{name}: give open_clip:NAME:TAG or open_clip:NAME:FILE; tags: {tags}")
    with reading(f"open_clip:{name}", "a model of open_clip"):
        model = open_clip.create_model(name, pretrained=weights or None, load_weights=True)
        model.requires_grad_(False).eval()
        # Code of a repository is not run, and nobody is asked.
        foreign = open_clip.get_model_config(name)["text_cfg"].get("hf_tokenizer_name")
        tokenizer = open_clip.get_tokenizer(name, **({"trust_remote_code": False} if foreign else {}))
    config = model.visual.preprocess_cfg
    visual = _OpenClipEncoder(model.visual)
    size = config["size"]
    return Encoder(
        visual.eval(),
        visual.kinds,
        image_transform_v2(PreprocessCfg(**config), is_train=False),
        (config["mean"], config["std"]),
        size if isinstance(size, int) else int(size[0]),
        TextTower(model, tokenizer, model.encode_text),
    )
