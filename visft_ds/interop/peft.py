"""Adapter folders: our own file, which is read, and beside it PEFT's form, written without importing PEFT.

    lora.safetensors             tensors as in `interop.adapter`, settings in the header
    adapter_model.safetensors    the same for PEFT over timm's model
    adapter_config.json          comes last; a folder without it was not finished, or is not for PEFT
    README.md

PEFT has no LoRA on *slices* of a fused qkv. Ours is put into its plain one on the whole qkv (D width, r rank, G adapted
slices): rank G*r, A as it is, B (3D, G*r) block by block (slice g in columns g*r..(g+1)*r) and zero elsewhere,
lora_alpha G times as large so that alpha / rank stays. File format:
https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field
from torch import Tensor

from visft_ds.config.fields import StrictModel
from visft_ds.config.records import Natural
from visft_ds.interop.adapter import Adapter
from visft_ds.interop.card_data import Publication, front_matter
from visft_ds.interop.files import open_weights
from visft_ds.interop.layouts import Tower, part_of
from visft_ds.interop.timm_names import create_model_call
from visft_ds.interop.writing import save_tensors, write_text
from visft_ds.models.lora import KINDS
from visft_ds.models.timm_backbone import build_timm
from visft_ds.ops.lora import parts_of

FILE = "lora.safetensors"  #: our own file
CONFIG, WEIGHTS, README = "adapter_config.json", "adapter_model.safetensors", "README.md"
_KEY = "visft_module_adapter"


class _Entry(StrictModel):
    """Settings in the header of our own file."""

    model_config = ConfigDict(extra="ignore")

    name: str | None  #: of the model of timm; None for a tower of our own
    rank: Natural
    alpha: float
    targets: list[str]
    places: list[str]  #: layers that the adapter changes
    base_sha256: str | None
    options: dict[str, Natural]
    layers: list[int] = Field(default_factory=list)


#: Where PEFT's `base_model_name_or_path` is null.
NAMELESS = "The base weights have no name on a hub that is known: `adapter_config.json` names no base model."
_SEPARATE = """\
for block in model.blocks:
    block.attn.qkv_bias_separate = True
"""
_NECESSARY = """
The line with `qkv_bias_separate` is **necessary**. Without it timm's EVA attention reads `qkv.weight` directly and
never calls the `qkv` module, so PEFT's adapter changes nothing, receives no gradient, and nothing warns about it.
"""
_LOADING = """\
## Load it with timm and PEFT
{before}
```python
import timm
from peft import PeftModel
from safetensors.torch import load_file

ADAPTER = "."  # this folder

{model}
model = PeftModel.from_pretrained(model, ADAPTER).eval()
```
{after}
`visft merge` of visft_ds reads `lora.safetensors` and adds it into full weights, which need no PEFT.
"""
_OWN_BASE = """
The base weights under timm's names, out of the base file FILE in whatever layout, into this folder FOLDER; by
visft_ds:

```sh
visft merge --base FILE --out FOLDER/base.safetensors
```

Then, in this folder:
"""
_OWN_MODEL = """\
model = {create}
weights = load_file("base.safetensors")
for name in {beside}:  # of a whole CLIP
    weights.pop(name, None)
{adjust}model.load_state_dict(weights)
{separate}"""
_FUSED = """
The fused `qkv` is adapted as one matrix (rank {groups} x {rank}; slices that are not adapted are zero rows of
`lora_B`). Training it further in PEFT also trains those rows; the result no longer fits visft_ds' LoRA on slices.
"""


def save_peft_adapter(
    adapter: Adapter,
    folder: str | Path,
    tower: Tower | None = None,
    *,
    base_model: Publication | None = None,
    card: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter folder; returns it.

    Args:
        tower: of an adapter on a tower of our own, which is timm's model of these sizes.
        base_model: publication of the base weights.
        card: replaces the README.md.

    Raises:
        ValueError: an adapter that does not fit the tower, and where the folder holds an adapter already (unless
            `overwrite`).
    """
    folder = Path(folder)
    if adapter.model is None:
        assert tower is not None
        adapter, tower = adapter.fit(tower), part_of(tower, adapter.layers_read)
    if not overwrite and any((folder / name).exists() for name in (CONFIG, WEIGHTS, FILE, README)):
        raise ValueError(f"{folder} holds an adapter already and is not overwritten: choose another folder")
    (folder / CONFIG).unlink(missing_ok=True)
    tensors = {name: value.float().contiguous() for name, value in adapter.tensors.items()}
    save_tensors(folder / FILE, tensors, {_KEY: json.dumps(_settings(adapter))}, overwrite=overwrite)
    if card is None:
        model = f"timm's {adapter.model}" if tower is None else "an EVA vision tower"
        lines = [f"# LoRA adapter for {model}", "", facts(adapter, tower)]
        lines += [f"Base weights: sha256 {adapter.base_sha256 or 'not recorded'}."]
        lines += [*([] if base_model else [NAMELESS]), "", loading(adapter, tower, base_model)]
        card = "\n".join([*front_matter("adapter", "peft", base_model, merged=False), *lines])
    write_text(folder / README, card, overwrite=overwrite)
    save_tensors(folder / WEIGHTS, peft_tensors(adapter), {}, overwrite=overwrite)
    content = adapter_config(adapter) | {"base_model_name_or_path": base_model and base_model.repository}
    write_text(folder / CONFIG, json.dumps(content, indent=2, sort_keys=True) + "\n", overwrite=overwrite)
    return folder


def read_adapter_folder(folder: Path) -> Adapter:
    """The adapter in a folder of ours. Raises ValueError for any other folder, and for a file that is not whole."""
    if not (folder / FILE).is_file():
        raise ValueError(f"{folder} holds no adapter of visft_ds: {FILE} is not there")
    file = open_weights(folder / FILE)
    if _KEY not in file.metadata:
        raise ValueError(f"{file.path} is no adapter that this project wrote")
    told = file.told(_KEY, _Entry)
    names = [f"{layer}.{kind}" for layer in told.places for kind in KINDS]
    if not names or set(names) != set(file):
        raise ValueError(f"{file.path}: its tensors are not those of the layers that its header names")
    adapter = Adapter(
        told.rank,
        told.alpha,
        tuple(told.targets),
        {name: file.get(name) for name in names},
        told.base_sha256,
        model=told.name,
        options=told.options,
        layers_read=tuple(told.layers),
    )
    for layer in told.places:
        a, b = file.shape(f"{layer}.lora_A"), file.shape(f"{layer}.lora_B")
        parts = len(adapter.adapted(layer)[0])  # each has rows of lora_A of its own
        if len(a) not in (2, 4) or len(b) != 2 or 0 in (*a, *b) or (a[0], b[1]) != (parts * told.rank, told.rank):
            raise ValueError(f"{file.path}: {layer} has lora_A {a} and lora_B {b}, its header says rank {told.rank}")
    return adapter


def is_own_file(path: Path) -> bool:
    """Return True for our own file of an adapter, not for a LoRA of ViSFT that is called so."""
    return path.name == FILE and _KEY in open_weights(path).metadata


def _settings(adapter: Adapter) -> dict[str, Any]:
    """Entry of the header of our own file."""
    return {
        "name": adapter.model,
        **adapter.record(),
        "places": list(adapter.layers()),
        "base_sha256": adapter.base_sha256,
        "options": dict(adapter.options),
        "layers": list(adapter.layers_read),
    }


def reads_past_layers(adapter: Adapter) -> bool:
    """Return True if an adapter on a model of timm is on a fused qkv that timm's EVA reads past the layer."""
    assert adapter.timm is not None
    backbone = build_timm(adapter.timm[0], image_size=adapter.timm[1], device="meta")
    parents = {layer.rpartition(".")[0] for layer in adapter.layers() if layer.endswith(".qkv")}
    return any(hasattr(backbone.get_submodule(parent), "qkv_bias_separate") for parent in parents)


def facts(adapter: Adapter, tower: Tower | None) -> str:
    """Description of an adapter in a sentence or two; `tower`: of one of our own."""
    text = f"R{adapter.describe()[1:]}"
    if tower is not None:
        text += f" of each of the {adapter.depth} blocks ({tower.describe()})"
    if adapter.layers_read:
        text += f". The tower ended after block {max(adapter.layers_read)}: that is where features are to be read"
    return f"{text}."


def loading(adapter: Adapter, tower: Tower | None, published: Publication | None) -> str:
    """The part of a README.md that says how PEFT + timm load an adapter folder."""
    if tower is None:
        return _timm_loading(adapter, published)
    # timm keeps no position for a class token that it does not have.
    adjust = "" if tower.class_token else 'weights["pos_embed"] = weights["pos_embed"][:, 1:]\n'
    if adapter.layers_read:
        block = max(adapter.layers_read)
        adjust += f"weights = {{name: weights[name] for name in model.state_dict()}}  # up to block {block}\n"
    beside = ("head.weight", "head.bias") if tower.class_token else ("head.weight", "head.bias", "cls_token")
    model = _OWN_MODEL.format(create=create_model_call(tower), beside=beside, adjust=adjust, separate=_SEPARATE)
    fused = _FUSED.format(groups=len(adapter.slices()), rank=adapter.rank) if adapter.slices() else ""
    return _LOADING.format(before=_OWN_BASE, model=model.rstrip(), after=_NECESSARY + fused)


def _timm_loading(adapter: Adapter, published: Publication | None) -> str:
    size = "".join(f", {key}={value}" for key, value in adapter.options.items())
    lines = [f'model = timm.create_model("{adapter.model}", num_classes=0{size}, pretrained=True)']
    if published is None:
        lines = [
            f'BASE = "model.safetensors"  # put the path of your base weights here: sha256 {adapter.base_sha256}',
            f'model = timm.create_model("{adapter.model}", num_classes=0{size})',
            "weights = load_file(BASE)",
            "model.load_state_dict({name: weights[name] for name in model.state_dict()})  # without a classifier",
        ]
    past = reads_past_layers(adapter)
    lines += [_SEPARATE.rstrip()] if past else []
    if adapter.timm is not None and adapter.layers_read:
        name, image_size = adapter.timm
        backbone = build_timm(name, image_size=image_size, layers=adapter.layers_read, device="meta")
        lines += [f"# It was trained on what {backbone.ends()[-1]} gives.", backbone.pruning]
    return _LOADING.format(before="", model="\n".join(lines), after=_NECESSARY if past else "")


def adapter_config(adapter: Adapter) -> dict[str, Any]:
    """Arguments of PEFT's LoraConfig."""
    factor = 1
    targets: list[str] | str
    if adapter.model is None:
        # With the parent's name: a bare "proj" would also match patch_embed.proj.
        modules = adapter.modules()
        factors = {"attn.qkv": len(adapter.slices())} if "attn.qkv" in modules else {}
        if modules == ("attn.qkv",):
            factor, factors = factors["attn.qkv"], {}
        targets = list(modules)
    else:
        # Whole names: "conv1" alone would be the conv1 of every block.
        targets = "|".join(re.escape(layer) for layer in adapter.layers())
        factors = {re.escape(layer): len(adapter.adapted(layer)[0]) for layer in adapter.layers()}
    factors = {name: count for name, count in factors.items() if count > 1}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "r": adapter.rank * factor,
        "lora_alpha": adapter.alpha * factor,
        "rank_pattern": {name: adapter.rank * count for name, count in factors.items()},
        "alpha_pattern": {name: adapter.alpha * count for name, count in factors.items()},
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }


def peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Its tensors, fp32, under the names of PEFT's file."""
    tensors: dict[str, Tensor] = {}
    for layer in adapter.layers():
        slices, rows = adapter.adapted(layer)
        a, b = adapter.factors(layer)
        if slices != ((0, rows),):  # zero outside one block of columns a slice
            dense = b.new_zeros(rows, len(slices) * adapter.rank)
            for lo, hi, columns, rows_of_b in parts_of(slices, adapter.rank):
                dense[lo:hi, columns] = b[rows_of_b]
            b = dense
        if a.ndim == 4:
            b = b[:, :, None, None]
        stem = f"base_model.model.{layer}"
        tensors |= {f"{stem}.lora_A.weight": a.contiguous(), f"{stem}.lora_B.weight": b.contiguous()}
    return tensors
