"""Base weights + adapter -> full weights in the form that a library loads, tensor by tensor.

For a comparison with base + adapter, `by_library` is what the library then makes of a file.

A change by fine-tuning is often smaller than the spacing of 16-bit numbers near the weight, and then the file
hardly differs from the base. So sums are fp32, and `Share` says how much of the change is in the file.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from visft_ds.files import write_text
from visft_ds.interop import layouts, transformers_names
from visft_ds.interop.adapter import Adapter, Factors
from visft_ds.interop.formats import ADAPTERS, Written
from visft_ds.interop.weights import Lazy, Tensors, Weights, derived, examples, finite, write_safetensors
from visft_ds.models import Backbone
from visft_ds.models.eva_vit import EvaViT
from visft_ds.models.timm_backbone import TimmBackbone, as_backbone
from visft_ds.ops.lora import ranges_of
from visft_ds.settings.bands import in_words

#: Of what timm knows of pretrained weights, what holds for trained ones too.
_SETTINGS = (
    "input_size",
    "fixed_input_size",
    "interpolation",
    "crop_pct",
    "crop_mode",
    "mean",
    "std",
    "first_conv",
    "classifier",
    "pool_size",
)


@dataclass
class Share:
    """Share of a wanted change D in the written one E: <E, D> / |D|^2, and |E - D| / |D|.

    Both are needed: where the base is finer than the output, its own rounding acts as dither, the first stays
    near 1, and only the second shows that the change drowned.
    """

    along: float = 0.0
    change: float = 0.0
    missed: float = 0.0

    def add(self, effective: Tensor, delta: Tensor) -> None:
        """Count a weight in."""
        self.along += (effective * delta).sum().item()
        self.change += delta.square().sum().item()
        self.missed += (effective - delta).square().sum().item()

    @property
    def retained(self) -> float:
        """Along D; 1: all of it."""
        return self.along / self.change

    @property
    def error(self) -> float:
        """Norm of what is missing over that of the change; 0: exact."""
        return math.sqrt(self.missed / self.change)


def merge(
    tower: Weights, adapter: Adapter | None, dtype: torch.dtype, names: Collection[str], share: Share
) -> Weights:
    """The tensors of a tower with the adapter in them, made when they are read.

    Args:
        names: what becomes `dtype`: the backbone; all else stays as it is.
        share: counts what is read.
    """
    changed = set() if adapter is None else set(adapter.weights())
    assert changed <= tower.keys(), changed - tower.keys()

    def make(name: str, target: torch.dtype) -> Tensor:
        value = tower[name].read()
        if adapter is None or name not in changed:
            return finite(value.to(target), f"{tower.path}: {name}")
        weight = value.float()
        delta = adapter.delta(name).view_as(value)
        result = finite((weight + delta).to(target), f"{tower.path}: {name}")
        share.add(result.float() - weight, delta)
        return result

    merged = {}
    for name, tensor in tower.items():
        target = dtype if name in names else tensor.dtype
        merged[name] = Lazy(tensor.shape, target, partial(make, name, target))
    return Weights(merged, tower.path, tower.metadata)


def timm_model(backbone: Backbone, tower: Tensors) -> tuple[str, dict[str, Any]]:
    """(name, arguments) by which `timm.create_model` makes the model that has all tensors of a tower."""
    classifiers = ["head"] if isinstance(backbone, EvaViT) else backbone.classifier_names
    stored = [tower[f"{name}.weight"] for name in classifiers if f"{name}.weight" in tower]
    arguments: dict[str, Any] = {"num_classes": stored[0].shape[0] if stored else 0}
    if len(backbone.pixel_mean) != 3:
        arguments["in_chans"] = len(backbone.pixel_mean)
    if not isinstance(backbone, EvaViT):
        return backbone.name, arguments | backbone.options
    config = backbone.config
    arguments |= {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
    }
    if "cls_token" not in tower:
        # Ours norms every patch; timm would pool by the class token, or norm what it pooled.
        arguments |= {
            "class_token": False,
            "global_pool": "avg",
            "use_fc_norm": False,
            "use_post_transformer_norm": True,
        }
    name = "eva02_enormous_patch14_clip_224" if config.post_norm else "eva_giant_patch14_clip_224"
    return name, arguments


def _lacking(model: nn.Module, tower: Tensors) -> list[str]:
    """Names of what timm begins with random numbers and a tower does not have: all but scales, biases,
    statistics.
    """
    return [name for name, value in model.state_dict().items() if name not in tower and value.ndim > 1]


def _blocks_in(tower: Tensors) -> int:
    """Number of blocks that a plain ViT's tensors are of."""
    numbers = [int(name.split(".")[1]) for name in tower if name.startswith("blocks.")]
    return 1 + max(numbers, default=-1)


def _shorter(model: nn.Module, tower: Tensors) -> dict[str, Any]:
    """Arguments by which timm makes a plain ViT without the blocks and the pooling that a tower lacks."""
    from timm.models.eva import Eva

    arguments: dict[str, Any] = {"depth": _blocks_in(tower)}
    if hasattr(model, "attn_pool") and "attn_pool.latent" not in tower:
        arguments["global_pool"] = "avg"
        # The last norm stays where it is, in front of the pooling.
        arguments["use_fc_norm" if isinstance(model, Eva) else "fc_norm"] = False
    return arguments


def timm(tower: Weights, file: Weights, backbone: Backbone) -> Written:
    """timm's names and config.json, by which `timm.create_model("local-dir:FOLDER", pretrained=True)` loads
    it.

    transformers' AutoModel loads the same folder (TimmWrapperModel). A plain ViT whose base ends before its
    last block is written as a shorter one. Norms behind the map that the base lacks are as timm begins with
    them.

    Raises ValueError for a base that lacks more: timm would fill it with random numbers.
    """
    from timm import create_model

    name, arguments = timm_model(backbone, tower)
    with torch.device("meta"):
        model: Any = create_model(name, **arguments)
        if _lacking(model, tower) and (isinstance(backbone, EvaViT) or backbone.patch is not None):
            arguments |= _shorter(model, tower)
            model = create_model(name, **arguments)
    tensors = dict(tower)
    if isinstance(backbone, EvaViT) and "cls_token" not in tower:  # timm has no position for it then
        count = model.pos_embed.shape[1]
        tensors["pos_embed"] = derived(lambda positions: positions[:, -count:], tower["pos_embed"])
    lacking = _lacking(model, tensors)
    if lacking:
        raise ValueError(
            f"{file.path} lacks {examples(lacking)}, which timm would fill with random numbers: "
            "give --backbone with the whole network, or --format onnx --tasks none, which ends where the "
            "training read"
        )
    names = model.state_dict().keys()
    if names - tensors.keys():
        with torch.random.fork_rng(devices=[]):
            initial = create_model(name, **arguments).state_dict()
        tensors = {key: Lazy.of(value) for key, value in initial.items()} | tensors
    num_classes = arguments.pop("num_classes")
    known = model.pretrained_cfg
    settings = {key: known[key] for key in _SETTINGS if known.get(key) is not None}
    if "img_size" in arguments:
        settings["input_size"] = [3, arguments["img_size"], arguments["img_size"]]
    if backbone.bands is not None:
        settings |= {"mean": list(backbone.pixel_mean), "std": list(backbone.pixel_std)}
        settings["input_size"] = [len(backbone.pixel_mean), *settings["input_size"][1:]]
    config = {
        "architecture": known["architecture"],
        "num_classes": num_classes,
        "num_features": model.num_features,
        "model_args": arguments,
        "pretrained_cfg": settings | {"num_classes": num_classes},
    }
    return Written(Weights({key: tensors[key] for key in names}, tower.path), {"config.json": config})


def open_clip(tower: Weights, file: Weights, backbone: Backbone) -> Written:
    """A whole model of open_clip, with its text side as it is and the configuration that it has of EVA's two.

    Raises ValueError for a base that is not a whole one.
    """
    from open_clip import constants, get_model_config

    if backbone.bands is not None:
        raise ValueError(
            f"the model reads {in_words(backbone.bands)}, and open_clip's configuration knows three colours "
            "only: give --format timm"
        )
    blocks = _blocks_in(tower)
    if isinstance(backbone, EvaViT) and blocks < backbone.config.depth:
        raise ValueError(
            f"{file.path} has {blocks} of {backbone.config.depth} blocks, and the rest would be random: "
            "give --backbone with the whole tower, or --format timm, which writes a shorter one"
        )
    prefix = layouts.prefix_of(file) if isinstance(backbone, EvaViT) else ""
    beside = {name: tensor for name, tensor in file.items() if not name.startswith(prefix)}
    if "text.positional_embedding" not in beside or not {"cls_token", "head.weight"} <= tower.keys():
        raise ValueError(
            f"{file.path} has no class token, CLIP projection and text tower, which whole CLIPs of EVA have: "
            "give EVA-CLIP's or open_clip's file with --backbone"
        )
    tensors = {f"visual.trunk.{name}": tensor for name, tensor in tower.items()}
    is_large = isinstance(backbone, EvaViT) and backbone.post_norm
    model = get_model_config("EVA02-E-14-plus" if is_large else "EVA01-g-14-plus")
    model["custom_text"] = True
    model["vision_cfg"]["image_size"] = backbone.image_size
    images = {"mean": constants.OPENAI_DATASET_MEAN, "std": constants.OPENAI_DATASET_STD}
    config = {"model_cfg": model, "preprocess_cfg": images}
    return Written(Weights(tensors | beside, file.path), {"open_clip_config.json": config})


#: Format of whole weights -> their content, of the tensors of a tower, the whole base file, and the same
#: model of ours. Raises ValueError: the library has no such model, or the base lacks a part of it.
CONTENT = {"open_clip": open_clip, "timm": timm, "transformers": transformers_names.written}


def by_library(form: str, folder: Path) -> Any:
    """The tower that the library of a format of whole weights makes of a folder."""
    if form == "transformers":
        return _by_transformers(folder)
    if form == "open_clip":
        import open_clip

        return open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).visual.trunk
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def _by_transformers(folder: Path) -> Any:
    """The model of transformers in a folder, in fp32; its class of BLIP-2's tower is unknown to AutoModel."""
    import transformers

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    transformers.utils.logging.disable_progress_bar()
    return getattr(transformers, config["architectures"][0]).from_pretrained(folder, dtype=torch.float32)


def _maps_of(model: Any, backbone: Backbone) -> Callable[[Tensor], Sequence[Tensor]]:
    """(B, 3, H, W) -> maps (B, D, h, w) by a library's model that ends where training read; `backbone`: the
    same of ours.

    transformers' classes of whole towers give the last map alone.
    """
    model.eval()
    if hasattr(model, "config"):
        # CLIP's last hidden state is in front of its last norm, which others have behind them.
        norm = model.post_layernorm if model.config.model_type == "clip_vision_model" else nn.Identity()
        return lambda images: [_map(norm(model(pixel_values=images).last_hidden_state), images, backbone)]
    layers = list(backbone.layers_read)
    if isinstance(backbone, TimmBackbone):
        return as_backbone(model, backbone.name, backbone.options, layers, backbone.bands).eval()
    if len(layers) > 1:
        return partial(model.forward_intermediates, indices=layers, norm=True, intermediates_only=True)
    if layers:
        model.prune_intermediate_layers(layers)
    return lambda images: [_map(model.forward_features(images), images, backbone)]


def _of_base(form: str, file: Weights, backbone: Backbone) -> Any:
    """The model of timm, or of transformers, with the weights of a base, for an adapter of this format."""
    tower = layouts.tower_in(file, backbone)
    if form == "peft_transformers":
        tensors, files = transformers_names.written(tower, file, backbone)
        with TemporaryDirectory() as folder:  # the names in its files are not those of its modules
            write_safetensors(Path(folder) / "model.safetensors", tensors, {})
            write_text(Path(folder) / "config.json", json.dumps(files["config.json"]))
            return _by_transformers(Path(folder))
    from timm import create_model

    tensors, files = timm(tower, file, backbone)
    config = files["config.json"]
    model = create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"])
    model.load_state_dict({name: tensor.read() for name, tensor in tensors.items()})
    return model


def for_transformers(adapter: Adapter, file: Weights, backbone: Backbone) -> Adapter:
    """The adapter by the names of the modules of transformers' class, which has q, k and v apart.

    Raises ValueError for a model of no such class.
    """
    from transformers import AutoConfig, AutoModel

    if isinstance(backbone, EvaViT):
        raise ValueError("BLIP-2 has q, k and v of EVA in one layer: give --format peft or transformers")
    config = transformers_names.written(file, file, backbone).files["config.json"]
    with torch.device("meta"):
        modules = [name for name, _ in AutoModel.from_config(AutoConfig.for_model(**config)).named_modules()]
    layers = {}
    left = sum(len(factors.b) for factors in adapter.layers.values())
    for name, (ours, part, parts) in transformers_names.layers_of(backbone, adapter.layers).items():
        rows, slices, a, b = adapter.layers[ours]
        height = rows // parts
        first = height * part
        for outputs, of_a, of_b in ranges_of(slices, adapter.rank):
            if outputs.start <= first and first + height <= outputs.stop:
                theirs = next(module for module in modules if f".{module}".endswith(f".{name}"))
                begin = of_b.start + first - outputs.start
                layers[theirs] = Factors(height, ((0, height),), a[of_a], b[begin : begin + height])
                left -= height
    if left:
        raise ValueError(f"{adapter.path}: it adapts parts of q, k or v, which transformers' class has whole")
    return replace(adapter, model=None, targets=(), layers=layers)


@torch.no_grad()
def difference(
    form: str, folder: Path, file: Weights, model: layouts.Description, adapter: Adapter | None
) -> tuple[float, float]:
    """|computed - ours| / |ours| by the library of a format, and by layers of PEFT that are not merged (0 for
    other formats): on two images of seeded noise, the largest one of the maps there are.

    Ours is base + adapter. One model is in memory at a time.
    """
    tower: Backbone = layouts.load_backbone(file.path, model).eval()
    side = tower.image_size
    shape = (2, len(tower.pixel_mean), side, side)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if adapter is not None:
        adapter.install(tower)
    expected = tower(images)
    del tower
    empty = layouts.built(model, "meta")
    if form not in ADAPTERS:
        return _largest(_maps_of(by_library(form, folder), empty)(images), expected), 0.0
    from peft import PeftModel

    trunk = _of_base(form, file, empty)
    maps_of = _maps_of(trunk, empty)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what PEFT calls
        wrapped = PeftModel.from_pretrained(trunk, folder).eval()
    in_layers = _largest(maps_of(images), expected)
    wrapped.merge_and_unload()
    return _largest(maps_of(images), expected), in_layers


def _largest(maps: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative difference of maps from the last ones of those that were expected."""
    pairs = zip(maps, expected[-len(maps) :], strict=True)
    return max(float((computed.float() - ours).norm() / ours.norm()) for computed, ours in pairs)


def _map(tokens: Tensor, images: Tensor, backbone: Backbone) -> Tensor:
    """(B, N, D) -> (B, D, h, w), without what stands in front of the patches."""
    grid = [side // backbone.patch_size for side in images.shape[-2:]]
    return tokens[:, -math.prod(grid) :].transpose(1, 2).unflatten(2, grid)
