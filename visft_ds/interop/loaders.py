"""Exported weights as the libraries they are for load and run them: functions of images, to compare with ours.

Each takes normalised images (B, 3, H, W) and gives the feature map (B, D, h, w), in fp32.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from visft_ds.interop import onnx
from visft_ds.interop.adapter import Adapter
from visft_ds.interop.files import WeightFile, examples, open_weights, view
from visft_ds.interop.formats import FORMATS
from visft_ds.interop.layouts import Tower, part_of
from visft_ds.interop.peft import reads_past_layers
from visft_ds.interop.timm_names import export_entries, model_arguments
from visft_ds.interop.towers import open_tower
from visft_ds.interop.writing import write_text
from visft_ds.models.timm_backbone import TimmBackbone, as_backbone

Features = Callable[[Tensor], Tensor]
#: Format -> module and package of the library that loads it. The other formats are read by no library on PyPI.
_LIBRARIES = {
    "timm": ("timm", "timm"),
    "open_clip": ("open_clip", "open_clip_torch"),
    "transformers": ("transformers", "transformers"),
    "peft": ("peft", "peft"),
    "onnx": ("onnxruntime", "onnxruntime"),
}


def library_of(form: str) -> str | None:
    """Name and version of the library that loads a format; None without one. Raises ValueError where it is missing."""
    if form not in _LIBRARIES:
        return None
    module, package = _LIBRARIES[form]
    if find_spec(module) is None:
        raise ValueError(f"--verify loads --format {form} by {module}, which is not installed: pip install {package}")
    return f"{module} {importlib.import_module(module).__version__}"


def write_json(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write files (name -> content) into a folder."""
    for name, content in files.items():
        write_text(folder / name, json.dumps(content, indent=2) + "\n")


@contextmanager
def as_folder(file: Path, name: str, side_files: Callable[[Path], Mapping[str, Mapping[str, Any]]]) -> Iterator[Path]:
    """A temporary folder beside written weights, as a library looks for them.

    Args:
        file: of the weights.
        name: of that one in a folder.
        side_files: folder -> content of what lies in it beside the weights.
    """
    with TemporaryDirectory(dir=file.parent) as path:
        folder = Path(path)
        (folder / name).symlink_to(file.resolve())
        write_json(folder, side_files(folder))
        yield folder


def load_tower(form: str, folder: Path, tower: Tower, layers: Sequence[int]) -> Features:
    """A tower of our own out of a folder for timm or open_clip; see `as_folder`."""
    block = max(layers) if layers else None
    if form == "open_clip":
        import open_clip

        trunk = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).visual.trunk
        return _timm_features(trunk, tower, block)
    import timm

    if (folder / "config.json").is_file():
        return _timm_features(timm.create_model(f"local-dir:{folder}", pretrained=True), tower, block)
    file = open_weights(folder / FORMATS["timm"].file)
    classes = file.shape("head.weight")[0] if "head.weight" in file else 0
    return _timm_features(_filled(file, tower, list(file), num_classes=classes), tower, block)


def load_model(form: str, folder: Path, backbone: TimmBackbone) -> Features:
    """A model of timm, on the meta device, with the weights of a folder for timm or transformers."""
    if form == "timm":
        import timm

        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        return as_backbone(model, backbone.name, backbone.options, backbone.layers_read).eval()
    from transformers import AutoModel

    model = _from_pretrained(AutoModel, folder)
    # CLIP's last hidden state is that in front of its last norm, which others have behind them.
    norm = model.post_layernorm if model.config.model_type == "clip_vision_model" else torch.nn.Identity()
    return lambda images: _map(norm(model(pixel_values=images).last_hidden_state), images, backbone.patch_size)


def load_peft(folder: Path, base: Path, adapter: Adapter, tower: Tower | None) -> Features:
    """A folder for PEFT over the base on timm's model; `tower`: of one of our own."""
    import timm
    from peft import PeftModel

    if tower is None:
        assert adapter.timm is not None and adapter.model is not None
        model = timm.create_model(adapter.model, num_classes=0, **adapter.options)
        file = open_weights(base)
        model.load_state_dict({name: file.get(name) for name in model.state_dict()})
        for block in model.blocks if reads_past_layers(adapter) else ():
            block.attn.qkv_bias_separate = True
        model = PeftModel.from_pretrained(model, folder).base_model.model
        return as_backbone(model, adapter.model, adapter.options, adapter.layers_read).eval()
    file, layout = open_tower(base)
    tower = part_of(tower, adapter.layers_read)
    model = _filled(view(file, export_entries(file, layout)), tower, None)
    for block in model.blocks:
        block.attn.qkv_bias_separate = True
    return _timm_features(PeftModel.from_pretrained(model, folder).base_model.model, tower, None)


def load_onnx(path: Path) -> Features:
    """A graph of ONNX, which gets one image at a time: it was written with two."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def features(images: Tensor) -> Tensor:
        maps = [session.run([onnx.FEATURES], {onnx.IMAGES: image.numpy()})[0] for image in images.split(1)]
        return torch.cat([torch.from_numpy(map_) for map_ in maps])

    return features


def _from_pretrained(kind: Any, folder: Path) -> Any:
    """A model of transformers. Raises ValueError where it does not take all weights, or would leave some at random."""
    model, found = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if wrong := [f"{name} ({why.replace('_', ' ')})" for why, names in found.items() for name in names]:
        raise ValueError(f"transformers does not load these weights as they are: {examples(wrong)}")
    return model.eval()


def _filled(file: WeightFile, tower: Tower, names: Sequence[str] | None, **more: Any) -> Any:
    """timm's model of a tower with the tensors of a file under timm's names: these, or (None) those that it has."""
    import timm

    name, arguments = model_arguments(tower)
    model = timm.create_model(name, **{**arguments, **more})
    weights = {name: file.get(name) for name in (model.state_dict() if names is None else names)}
    if not tower.class_token:
        weights["pos_embed"] = weights["pos_embed"][:, 1:]
    model.load_state_dict(weights)
    return model


def _timm_features(model: Any, tower: Tower, block: int | None) -> Features:
    model.eval()
    if block is None:
        return lambda images: _map(model.forward_features(images), images, tower.patch_size)
    return lambda images: model.forward_intermediates(images, indices=[block], norm=True, intermediates_only=True)[0]


def _map(tokens: Tensor, images: Tensor, patch_size: int) -> Tensor:
    """(B, N, D) -> (B, D, h, w), without what stands in front of the patches."""
    grid = images.shape[-2] // patch_size, images.shape[-1] // patch_size
    return tokens[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)
