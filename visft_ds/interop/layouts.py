"""Names of a vision tower's parameters in each kind of file.

Inside the tower the names are the same everywhere (`patch_embed.proj.weight`, `blocks.N.attn.qkv.weight`, ...); only
the prefix differs, and what else a file may hold besides the tower. D width, h hidden width of the MLP.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from torch import nn

from visft_ds.config.fields import StrictModel
from visft_ds.config.records import Natural
from visft_ds.interop.files import LAYERS, WeightFile, examples
from visft_ds.models import Backbone
from visft_ds.models.eva_vit import PRESETS, Block, EvaViT
from visft_ds.models.timm_backbone import TimmBackbone

#: In the metadata of weights of a model of timm: its settings (JSON).
TIMM_KEY = "timm"
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_ANCHOR = "patch_embed.proj.weight"
# Of every published tower: the CLIP projection is no part of an image -> feature map backbone.
PROJECTION = {"CLIP projection": ("head.weight", "head.bias")}


@dataclass(frozen=True)
class Layout:
    """A naming scheme. `others` lists what a file may hold besides the tower: reason -> beginnings of names."""

    name: str
    prefix: str
    others: Mapping[str, tuple[str, ...]]

    def reason_to_ignore(self, name: str) -> str | None:
        """Why a name outside the tower is expected in such a file; None where it is not."""
        for reason, beginnings in self.others.items():
            if name.startswith(beginnings):
                return reason
        return None


# Names of text towers: reference key dumps of EVA-CLIP, open_clip (EVA02-E-14-plus) and LAVIS (blip2, blip2_t5,
# blip2_opt). Files of the first EVA-CLIP have the text tower outside `text.`, which both libraries convert in loading.
_CLIP = {
    "text tower": (
        *("text.", "transformer.resblocks.", "token_embedding.", "positional_embedding", "text_projection"),
        "ln_final.",
    ),
    "logit scale": ("logit_scale", "logit_bias"),
}
LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("open_clip", "visual.trunk.", _CLIP),
        Layout("eva_clip", "visual.", _CLIP),
        Layout(
            "visft",
            "visft_heads.backbone.0.",
            {"heads of ViSFT": ("visft_heads.",), "loss constants of ViSFT": ("det_losses.",)},
        ),
        Layout(
            "lavis",
            "visual_encoder.",
            {
                "rest of BLIP-2": (
                    "ln_vision.",
                    "query_tokens",
                    *("Qformer.", "vision_proj.", "text_proj.", "itm_head.", "temp"),
                    *("t5_proj.", "t5_model.", "opt_proj.", "opt_model.", "llm_proj.", "llm_model."),
                )
            },
        ),
        Layout("visft_ds", "backbone.", {"heads": ("heads.",)}),
        # Last: every name begins with the empty prefix. Also ViSFT's extracted `_Visual.pt` and LAVIS' `eva_vit_g.pth`.
        Layout("timm", "", {}),
    )
}


class TowerEntry(StrictModel):
    """Entry of a header about the tower in a file; sizes are taken from the tensors."""

    width: int | None = None
    depth: int | None = None
    hidden: int | None = None
    patch_size: int | None = None
    positions: int | None = None
    class_token: bool | None = None
    num_heads: Natural | None = None
    post_norm: bool | None = None


@dataclass(frozen=True)
class Tower:
    """Sizes of a vision tower. `num_heads` and `post_norm` are None where unknown: no tensor's shape shows them."""

    width: int
    depth: int
    hidden: int
    patch_size: int
    positions: int
    class_token: bool
    num_heads: int | None = None
    post_norm: bool | None = None

    @property
    def image_size(self) -> int:
        """Side in pixels of the square image whose patches `pos_embed` (less its class entry) covers."""
        return round((self.positions - 1) ** 0.5) * self.patch_size

    @property
    def mlp_ratio(self) -> float:
        """A ratio with int(width * ratio) == hidden, which hidden / width itself can miss by rounding."""
        ratio = self.hidden / self.width
        return ratio if int(self.width * ratio) == self.hidden else (self.hidden + 0.5) / self.width

    def preset(self) -> str | None:
        """Name of the preset with these sizes, or None."""
        for name, config in PRESETS.items():
            same = (config.width, config.depth, int(config.width * config.mlp_ratio), config.patch_size)
            if same == (self.width, self.depth, self.hidden, self.patch_size):
                return name
        return None

    def describe(self) -> str:
        """`width 1408, depth 40 = eva_g`."""
        text = f"width {self.width}, depth {self.depth}, MLP {self.hidden}"
        if preset := self.preset():
            return f"{text} = {preset}"
        return text

    def to_json(self) -> str:
        """For the metadata of our own files."""
        return json.dumps(asdict(self))


def tower_of(backbone: EvaViT) -> Tower:
    """The sizes of a model at hand; from its attributes, since ZeRO-3 leaves parameters without their shapes."""
    first: Block = backbone.blocks[0]  # type: ignore[assignment]
    return Tower(
        width=backbone.width,
        depth=backbone.depth,
        hidden=first.mlp.fc1.out_features,
        patch_size=backbone.patch_size,
        positions=1 + (backbone.image_size // backbone.patch_size) ** 2,
        class_token=backbone.cls_token is not None,
        num_heads=backbone.num_heads,
        post_norm=backbone.post_norm,
    )


def tower_metadata(backbone: Backbone) -> dict[str, str]:
    """Metadata that describe a backbone in the file of its weights."""
    layers = {LAYERS: json.dumps(backbone.layers_read)} if backbone.layers_read else {}
    if isinstance(backbone, TimmBackbone):
        return {TIMM_KEY: timm_entry(backbone), **layers}
    return {"tower": tower_of(backbone).to_json(), **layers}


def timm_entry(backbone: TimmBackbone) -> str:
    """Entry of a header about the model of timm that weights are of."""
    return json.dumps({"name": backbone.name, "image_size": backbone.options.get("img_size")})


def base_parameters(backbone: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of the tower itself, without what LoRA added."""
    return {name: parameter for name, parameter in backbone.named_parameters() if not is_lora(name)}


def is_lora(name: str) -> bool:
    """Return True if a parameter belongs to an adapter."""
    return name.endswith((".lora_A", ".lora_B", ".lora_A.weight", ".lora_B.weight"))


def find_layout(file: WeightFile) -> Layout:
    """The naming scheme of a file that holds a vision tower.

    Raises ValueError where there is no tower, or more than one.
    """
    found = [layout for layout in LAYOUTS.values() if layout.prefix + _ANCHOR in file]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(repr(layout.prefix) for layout in found)
        raise ValueError(f"{file.path}: more than one vision tower, under the prefixes {names}; keep one")
    lora = [name for name in file if is_lora(name)]
    if lora:
        raise ValueError(
            f"{file.path}: this is a LoRA adapter ({examples(lora, 1)}), not the weights of a tower; give the base "
            f"file here and this one as the adapter"
        )
    prefixes = ", ".join(repr(layout.prefix) for layout in LAYOUTS.values())
    raise ValueError(
        f"{file.path}: no EVA vision tower found: looked for {_ANCHOR} under the prefixes {prefixes}; the file has "
        f"{examples(file.infos)}"
    )


def tower_in(file: WeightFile, layout: Layout) -> Tower:
    """The sizes of the tower in a file, from shapes and (in our own files) metadata."""
    prefix = layout.prefix
    missing = [name for name in ("blocks.0.mlp.fc1.weight", "pos_embed") if prefix + name not in file]
    if missing:
        raise ValueError(f"{file.path}: the tower under {prefix!r} lacks {', '.join(missing)}: not an EVA ViT")
    axes = {_ANCHOR: 4, "blocks.0.mlp.fc1.weight": 2, "pos_embed": 3}
    shapes = {name: file.shape(prefix + name) for name in axes}
    depth = depth_of(name[len(prefix) :] for name in file if name.startswith(prefix))
    if depth > len(file) or any(len(shape) != axes[name] or 0 in shape for name, shape in shapes.items()):
        raise ValueError(f"{file.path}: the tower under {prefix!r} has {depth} blocks and {shapes}: not an EVA ViT")
    width, _, patch_size, _ = shapes[_ANCHOR]
    told = file.told("tower", TowerEntry) if "tower" in file.metadata else TowerEntry()
    return Tower(
        width=width,
        depth=depth,
        hidden=file.shape(prefix + "blocks.0.mlp.fc1.weight")[0],
        patch_size=patch_size,
        positions=file.shape(prefix + "pos_embed")[1],
        class_token=prefix + "cls_token" in file,
        num_heads=told.num_heads,
        post_norm=told.post_norm,
    )


def depth_of(names: Iterable[str]) -> int:
    """Number of blocks by the highest index among names that begin with `blocks.N.`."""
    return 1 + max((int(match[1]) for name in names if (match := _BLOCK.match(name))), default=-1)


def part_of(tower: Tower, layers: Sequence[int]) -> Tower:
    """The tower up to the last of the blocks that are read, or all of it. Raises ValueError for one that it lacks."""
    if layers and max(layers) >= tower.depth:
        raise ValueError(f"layers {list(layers)}: the tower has blocks 0 to {tower.depth - 1}")
    return replace(tower, depth=max(layers) + 1) if layers else tower


def layers_in(file: WeightFile) -> tuple[int, ...]:
    """The blocks whose maps are read of the backbone in a file, as its header says."""
    return tuple(json.loads(file.metadata.get(LAYERS, "[]")))


def tower_names(tower: Tower) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything an EvaViT of these sizes has, by the published key tables."""
    width, hidden, patch = tower.width, tower.hidden, tower.patch_size
    names: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "pos_embed": (1, tower.positions, width),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    if tower.class_token:
        names["cls_token"] = (1, 1, width)
    for index in range(tower.depth):
        block: dict[str, tuple[int, ...]] = {
            "norm1.weight": (width,),
            "norm1.bias": (width,),
            "norm2.weight": (width,),
            "norm2.bias": (width,),
            "attn.qkv.weight": (3 * width, width),
            "attn.q_bias": (width,),
            "attn.v_bias": (width,),
            "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,),
            "mlp.fc1.weight": (hidden, width),
            "mlp.fc1.bias": (hidden,),
            "mlp.fc2.weight": (width, hidden),
            "mlp.fc2.bias": (width,),
        }
        names.update({f"blocks.{index}.{name}": shape for name, shape in block.items()})
    return names
