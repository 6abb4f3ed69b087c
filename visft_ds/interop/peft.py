"""PEFT's adapter folder (adapter_config.json + adapter_model.safetensors), written and read without importing PEFT.

PEFT has no LoRA on *slices* of a fused qkv. Ours is put into its plain one on the whole qkv (D width, r rank, G adapted
slices): rank G*r, A as it is, B (3D, G*r) block by block (slice g in columns g*r..(g+1)*r) and zero elsewhere,
lora_alpha G times as large so that alpha / rank stays. On timm's model with separate q_proj, k_proj, v_proj ("split")
each slice is an adapter of its own. Both maps are exact, both ways. Neither has it groups of
a convolution that share A: of g groups ours is one of rank g*r, with zeros. What PEFT cannot have of a model of timm is
in our own file, which lies beside PEFT's. File format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor

from visft_ds.config.fields import StrictModel
from visft_ds.config.records import Natural, Whole, read_record
from visft_ds.interop.adapter import MODULES, SLICES, Adapter, canonical_targets, rows_of_qkv
from visft_ds.interop.card_data import Publication, front_matter
from visft_ds.interop.files import WeightFile, examples, open_weights
from visft_ds.interop.foreign_code import read_config
from visft_ds.interop.layouts import Tower, part_of
from visft_ds.interop.timm_names import create_model_call
from visft_ds.interop.writing import save_tensors, write_text
from visft_ds.models.lora import KINDS, AdaptedRows
from visft_ds.models.timm_backbone import build_timm

CONFIG, WEIGHTS, README = "adapter_config.json", "adapter_model.safetensors", "README.md"
#: Our own file of an adapter on a model of timm.
TIMM_FILE = "lora.safetensors"
#: Values that PEFT's form may have: zeros of depthwise convolutions could make it many times larger than the model.
LARGEST_PEFT = 2**27
_KEY, _TIMM_KEY = "visft_adapter", "visft_module_adapter"
_NAME = re.compile(
    r"base_model\.model\.(blocks\.\d+\.(attn\.qkv|attn\.[qkv]_proj|attn\.proj|mlp\.fc1|mlp\.fc2))"
    r"\.lora_([AB])\.weight"
)
# Names of modules and ends of them, plain or as re.escape writes them: a pattern without repetition ends at once.
_PLAIN = re.compile(r"\^?(?:\w|\\?[.-])+\$?")
# Settings under which A and B mean something else than (alpha / rank) * B @ A.
_REFUSED = (
    *("use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "modules_to_save", "layer_replication"),
    *("trainable_token_indices", "alora_invocation_tokens", "target_parameters"),
)


class AdapterEntry(StrictModel):
    """Entry of the header of PEFT's file about an adapter on a tower of our own."""

    rank: Natural
    alpha: float
    targets: list[Literal["q", "k", "v", "proj", "fc1", "fc2"]]
    base_sha256: str | None
    base_storage: str = "full"
    until: str | None = None


class AdaptedPlace(StrictModel):
    """Rows of a layer that an adapter changes."""

    slices: list[list[Whole]]
    groups: Natural


class TimmAdapterEntry(StrictModel):
    """Entry of the header of our own file about an adapter on a model of timm."""

    name: str
    rank: Natural
    alpha: float
    targets: list[str]
    places: dict[str, AdaptedPlace]
    base_sha256: str | None
    options: dict[str, Natural]
    until: str | None = None


class PeftConfig(StrictModel):
    """Settings out of PEFT's adapter_config.json that decide what its tensors mean."""

    model_config = ConfigDict(extra="allow")

    lora_alpha: float
    alpha_pattern: dict[str, float] | None = None
    use_dora: bool = False
    use_rslora: bool = False


_FUSED = """\
The fused `qkv` is adapted as one matrix (rank {groups} x {rank}; slices that are not adapted are zero rows of
`lora_B`). Training it further in PEFT also trains those rows; the result no longer fits visft_ds' LoRA on slices.

"""
_HEAD = """\
# LoRA adapter for {model}

{facts}
Base weights: sha256 {base}.
{nameless}
"""
#: Where PEFT's `base_model_name_or_path` is null.
NAMELESS = "The base weights have no name on a hub that is known: `adapter_config.json` names no base model."
_SPLIT = """\
for name in [name for name in weights if name.endswith("attn.qkv.weight")]:
    stem = name.removesuffix("qkv.weight")
    for part, value in zip("qkv", weights.pop(name).chunk(3)):
        weights[f"{stem}{part}_proj.weight"] = value.clone()
    for part in "qv":
        weights[f"{stem}{part}_proj.bias"] = weights.pop(f"{stem}{part}_bias")
"""
_SEPARATE = """\
for block in model.blocks:
    block.attn.qkv_bias_separate = True
"""
_NECESSARY = """
The line with `qkv_bias_separate` is **necessary**. Without it timm's EVA attention reads `qkv.weight` directly and
never calls the `qkv` module, so PEFT's adapter changes nothing, receives no gradient, and nothing warns about it.
"""
_UNFUSED = """
The model is built with separate projections of q, k and v (`qkv_fused=False`), which the base weights are cut for.
"""
_LOADING = """\
{fused}## Load it with timm and PEFT

The base weights under timm's names, out of the base file FILE in whatever layout, into this folder FOLDER; by
visft_ds:

```sh
visft merge --base FILE --out FOLDER/base.safetensors
```

Then, in this folder:

```python
import timm
from peft import PeftModel
from safetensors.torch import load_file

ADAPTER = "."  # this folder
BASE = "base.safetensors"  # the base weights, under timm's names

model = {create}
weights = load_file(BASE)
for name in {beside}:  # of a whole CLIP
    weights.pop(name, None)
{adjust}model.load_state_dict(weights)
{separate}model = PeftModel.from_pretrained(model, ADAPTER).eval()
```
{why}
`visft merge` of visft_ds adds the adapter into full weights, which need no PEFT.
"""

_TIMM_LOADING = """\
## Load it with timm and PEFT

```python
import timm
from peft import PeftModel
from safetensors.torch import load_file

ADAPTER = "."  # this folder

{base}
{ending}model = PeftModel.from_pretrained(model, ADAPTER).eval()
```
"""


def save_peft_adapter(
    adapter: Adapter,
    folder: str | Path,
    tower: Tower | None = None,
    *,
    split: bool = False,
    base_model: Publication | None = None,
    card: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter folder that PEFT loads onto timm's model; returns the folder.

    An adapter on a model of timm also has a file of our own, and no other where PEFT cannot compute with it.
    adapter_config.json comes last: a folder without it was not finished, or is not for PEFT.

    Args:
        tower: of an adapter on a tower of our own, which is timm's model of these sizes.
        split: for the model with separate q, k and v instead of the fused one.
        base_model: publication of the base weights.
        card: replaces the README.md.

    Raises:
        ValueError: an adapter that does not fit the tower, and where the folder holds an adapter already (unless
            `overwrite`).
    """
    folder = Path(folder)
    reason = None if adapter.model is None else why_no_peft(adapter)
    if adapter.model is None:
        assert tower is not None
        adapter, tower = adapter.fit(tower), part_of(tower, adapter.until)
    config = folder / CONFIG
    if not overwrite and any((folder / name).exists() for name in (CONFIG, WEIGHTS, TIMM_FILE, README)):
        raise ValueError(f"{folder} holds an adapter already and is not overwritten: choose another folder")
    if overwrite:
        config.unlink(missing_ok=True)
    header = {_KEY: json.dumps(_settings(adapter))} if adapter.model is None else {}
    if adapter.model is not None:
        tensors = {name: value.float().contiguous() for name, value in adapter.tensors.items()}
        save_tensors(folder / TIMM_FILE, tensors, {_TIMM_KEY: json.dumps(_timm_settings(adapter))}, overwrite=overwrite)
    if reason is None:
        save_tensors(folder / WEIGHTS, peft_tensors(adapter, split), header, overwrite=overwrite)
    if card is None:
        card = _readme(adapter, tower, base_model, split=split)
    write_text(folder / README, card, overwrite=overwrite)
    if reason is None:
        content = adapter_config(adapter, split) | {"base_model_name_or_path": base_model and base_model.repository}
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        write_text(config, text, overwrite=overwrite)
    return folder


def _settings(adapter: Adapter) -> dict[str, Any]:
    """Entry of the header of PEFT's file about an adapter on a tower of our own."""
    settings = {name: getattr(adapter, name) for name in ("rank", "alpha", "targets", "base_sha256")}
    settings |= {} if adapter.base_storage == "full" else {"base_storage": adapter.base_storage}
    return settings if adapter.until is None else {**settings, "until": adapter.until}


def _timm_settings(adapter: Adapter) -> dict[str, Any]:
    """Entry of the header of our own file about an adapter on a model of timm."""
    return {
        "name": adapter.model,
        **adapter.record(),
        "places": _places(adapter),
        "base_sha256": adapter.base_sha256,
        "options": dict(adapter.options),
        **({} if adapter.until is None else {"until": adapter.until}),
    }


def _places(adapter: Adapter) -> dict[str, Any]:
    adapted = {layer: adapter.adapted(layer) for layer in adapter.layers()}
    return {n: {"slices": [list(edges) for edges in rows.slices], "groups": rows.groups} for n, rows in adapted.items()}


def why_no_peft(adapter: Adapter) -> str | None:
    """Why PEFT cannot compute with an adapter on a model of timm; None where it can."""
    adapted = {layer: adapter.adapted(layer) for layer in adapter.layers()}
    grouped = [layer for layer, rows in adapted.items() if rows.groups > 1]
    size = sum(adapted[layer].groups ** 2 * adapter.tensors[f"{layer}.lora_A"].numel() for layer in grouped)
    if size > LARGEST_PEFT:
        return f"as updates of convolutions without groups they would have {size:,} values, nearly all of them zero"
    return None


def reads_past_layers(adapter: Adapter) -> bool:
    """Return True if an adapter on a model of timm is on a fused qkv that timm's EVA reads past the layer."""
    assert adapter.timm is not None
    backbone = build_timm(adapter.timm[0], image_size=adapter.timm[1], device="meta")
    parents = {layer.rpartition(".")[0] for layer in adapter.layers() if layer.endswith(".qkv")}
    return any(hasattr(backbone.get_submodule(parent), "qkv_bias_separate") for parent in parents)


def _ending(adapter: Adapter) -> str:
    """Lines that end a model of timm where the adapter's tower ended; none where it was whole."""
    if adapter.timm is None or adapter.until is None:
        return ""
    name, image_size = adapter.timm
    lines = build_timm(name, image_size=image_size, until=adapter.until, device="meta").ending()
    return f"# It was trained on what {adapter.until} gives.\nimport torch\n" + "".join(f"{line}\n" for line in lines)


def _readme(adapter: Adapter, tower: Tower | None, base_model: Publication | None, *, split: bool) -> str:
    model = f"timm's {adapter.model}" if tower is None else "an EVA vision tower"
    base, nameless = adapter.base_sha256 or "not recorded", "" if base_model else f"{NAMELESS}\n"
    head = _HEAD.format(model=model, facts=facts(adapter, tower), base=base, nameless=nameless)
    front = front_matter("adapter", "peft", base_model, merged=False)
    return "\n".join(front) + "\n" + head + loading(adapter, tower, base_model, split=split)


def facts(adapter: Adapter, tower: Tower | None) -> str:
    """Description of an adapter in a sentence or two; `tower`: of one of our own."""
    if tower is None:
        text = f"{adapter.describe()}. `{TIMM_FILE}` is what `visft merge` of visft_ds reads to add it into full "
        return f"{text}weights, which need nothing else."
    text = (
        f"Rank {adapter.rank}, alpha {adapter.alpha:g}, on {', '.join(adapter.targets)} of each of the "
        f"{adapter.depth} blocks ({tower.describe()})."
    )
    if adapter.until is not None:
        text += f" The tower ended there, after {adapter.until}: that is where features are to be read."
    if adapter.base_storage != "full":
        text += f" It was trained over the base stored as {adapter.base_storage}; it is used and merged with the base "
        text += "in full precision."
    return text


def loading(adapter: Adapter, tower: Tower | None, published: Publication | None, *, split: bool) -> str:
    """The part of a README.md that says how PEFT + timm load an adapter folder, or why they do not."""
    if tower is None:
        if reason := why_no_peft(adapter):
            return f"It is not in PEFT's form: {reason}.\n"
        size = "".join(f", {key}={value}" for key, value in adapter.options.items())
        separate, why = (_SEPARATE, _NECESSARY) if reads_past_layers(adapter) else ("", "")
        ending = separate + _ending(adapter)
        base = f'model = timm.create_model("{adapter.model}", num_classes=0{size}, pretrained=True)'
        if published is None:
            base = (
                f'BASE = "model.safetensors"  # put the path of your base weights here: sha256 {adapter.base_sha256}\n'
                f'model = timm.create_model("{adapter.model}", num_classes=0{size})\n'
                "weights = load_file(BASE)\n"
                "model.load_state_dict({name: weights[name] for name in model.state_dict()})  # without a classifier"
            )
        return _TIMM_LOADING.format(base=base, ending=ending) + why
    # timm keeps no position for a class token that it does not have.
    adjust = "" if tower.class_token else 'weights["pos_embed"] = weights["pos_embed"][:, 1:]\n'
    adjust += _SPLIT if split else ""
    if adapter.until is not None:
        adjust += f"weights = {{name: weights[name] for name in model.state_dict()}}  # up to {adapter.until}\n"
    fused = bool(adapter.slices()) and not split
    return _LOADING.format(
        fused=_FUSED.format(groups=len(adapter.slices()), rank=adapter.rank) if fused else "",
        create=create_model_call(tower, **({"qkv_fused": False} if split else {})),
        beside=("head.weight", "head.bias") if tower.class_token else ("head.weight", "head.bias", "cls_token"),
        adjust=adjust,
        separate="" if split else _SEPARATE,
        why=_UNFUSED if split else _NECESSARY,
    )


def adapter_config(adapter: Adapter, split: bool) -> dict[str, Any]:
    """Arguments of PEFT's LoraConfig; `split` as in `save_peft_adapter`."""
    factor = 1
    targets: list[str] | str
    if adapter.model is None:
        # With the parent's name: a bare "proj" would also match patch_embed.proj.
        modules = adapter.modules()
        if split:
            modules = (*(f"attn.{name}_proj" for name in adapter.slices()), *(m for m in modules if m != "attn.qkv"))
        factors = {"attn.qkv": len(adapter.slices())} if "attn.qkv" in modules else {}
        if modules == ("attn.qkv",):
            factor, factors = factors["attn.qkv"], {}
        targets = list(modules)
    else:
        # Whole names: "conv1" alone would be the conv1 of every block.
        targets = "|".join(re.escape(layer) for layer in adapter.layers())
        factors = {re.escape(layer): _factor(adapter.adapted(layer)) for layer in adapter.layers()}
    factors = {name: count for name, count in factors.items() if count > 1}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
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


def _factor(rows: AdaptedRows) -> int:
    """PEFT's rank of a layer over ours."""
    return max(len(rows.slices), rows.groups)


def peft_tensors(adapter: Adapter, split: bool) -> dict[str, Tensor]:
    """Its tensors, fp32, under the names of PEFT's file; `split` as in `save_peft_adapter`."""
    tensors: dict[str, Tensor] = {}
    if split:
        adapter = _separated(adapter)
    for layer in adapter.layers():
        rows = adapter.adapted(layer)
        a, b = adapter.factors(layer)
        if rows.groups > 1:
            a = _spread_groups(a, rows.groups)
        if not rows.unsliced:
            b = _spread(b, rows, adapter.rank)
        if a.ndim == 4:
            b = b[:, :, None, None]
        stem = f"base_model.model.{layer}"
        tensors |= {f"{stem}.lora_A.weight": a.contiguous(), f"{stem}.lora_B.weight": b.contiguous()}
    return tensors


def _separated(adapter: Adapter) -> Adapter:
    """The same on a model with separate projections of q, k and v."""
    tensors: dict[str, Tensor] = {}
    for name, value in adapter.tensors.items():
        names = [name]
        if ".attn.qkv." in name:
            names = [name.replace(".attn.qkv.", f".attn.{part}_proj.") for part in adapter.slices()]
        tensors |= dict(zip(names, value.chunk(len(names)), strict=True))
    return replace(adapter, tensors=tensors)


def _spread(stacked: Tensor, rows: AdaptedRows, rank: int) -> Tensor:
    """lora_B of ours (adapted rows, r) -> PEFT's (all rows, G*r), zero outside the blocks."""
    result = stacked.new_zeros(rows.rows, len(rows.slices) * rank)
    for changed, columns, rows_of_b in rows.parts(rank):
        result[changed, columns] = stacked[rows_of_b]
    return result


def _gather(dense: Tensor, slices: tuple[str, ...], rank: int) -> Tensor | None:
    """The inverse of `_spread` for slices of a fused qkv; None where something stands outside the blocks."""
    rows = rows_of_qkv(slices, len(dense) // 3)
    stacked = torch.cat([dense[changed, columns] for changed, columns, _ in rows.parts(rank)])
    return stacked if torch.equal(_spread(stacked, rows, rank), dense) else None


def _spread_groups(a: Tensor, groups: int) -> Tensor:
    """lora_A of ours (r, in / g, k, k), which all groups share -> PEFT's (g*r, in, k, k).

    Group i of the output sees rows i*r.. of it, which see group i of the input.
    """
    spread = a.new_zeros(groups, a.shape[0], groups, *a.shape[1:])
    for group in range(groups):
        spread[group, :, group] = a
    return spread.flatten(2, 3).flatten(0, 1)


def _own_name(name: str) -> str:
    """Name of a tensor of PEFT's file in ours."""
    return name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix("_vector")


def read_peft_adapter(folder: str | Path) -> Adapter:
    """Read an adapter folder, ours or one that PEFT wrote for timm's EVA, into LoRA on slices, exactly.

    Raises ValueError for settings and structures that LoRA on slices cannot express (DoRA, biases,
    different ranks, a lora_B that is not zero outside one block a slice), for incomplete folders, and for settings that
    ask for code to be run or could run for ever.
    """
    folder = Path(folder)
    if (folder / TIMM_FILE).is_file():
        return _read_timm(folder / TIMM_FILE)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} holds no adapter: {CONFIG} and {WEIGHTS} are needed")
    config = _read_config(folder)
    file = open_weights(folder / WEIGHTS)
    foreign = [name for name in file if not _NAME.fullmatch(name)]
    if foreign or not len(file):
        raise ValueError(
            f"{file.path}: not an adapter for the blocks of timm's EVA: {examples(foreign)}. Expected are names like "
            f"base_model.model.blocks.0.attn.qkv.lora_A.weight (qkv or q_proj, k_proj, v_proj; proj, fc1, fc2)"
        )
    for name in file:
        for partner in {name.replace(".lora_A.", ".lora_B."), name.replace(".lora_B.", ".lora_A.")} - set(file):
            file.get(partner)  # raises
        shape, axes = file.shape(name), 1 if name.endswith("_vector") else 2
        if len(shape) != axes or 0 in shape:
            raise ValueError(
                f"{file.path}: {name} has the shape {shape}: it is no matrix of an adapter, or an empty one"
            )
    told = file.told(_KEY, AdapterEntry) if _KEY in file.metadata else None
    modules = {_NAME.fullmatch(name)[2] for name in file}  # type: ignore[index]
    split = tuple(part for part in SLICES if f"attn.{part}_proj" in modules)
    if split and "attn.qkv" in modules:
        raise ValueError(f"{file.path}: adapts the fused qkv and separate projections at once; no model has both")
    if config.use_dora:
        raise ValueError(f"{file.path}: use_dora is true; merge DoRA with PEFT (merge_and_unload) and load the weights")
    slices = _slices(file, told) if "attn.qkv" in modules else split
    targets = canonical_targets((*slices, *(target for target in ("proj", "fc1", "fc2") if MODULES[target] in modules)))
    rank, scaling = _rank_and_scaling(file, config, len(slices))
    tensors = _stacked(file, split) if split else {}
    for name in file:
        our_name = _own_name(name)
        if "_proj.lora_" in our_name:
            continue
        value = file.get(name).float()
        if our_name.endswith("attn.qkv.lora_B"):
            gathered = _gather(value, slices, rank)
            if gathered is None:
                raise ValueError(_not_sparse(name, slices, rank, file))
            value = gathered
        tensors[our_name] = value
    base, storage, until = (told.base_sha256, told.base_storage, told.until) if told else (None, "full", None)
    return Adapter(rank, scaling * rank, targets, tensors, base, storage, until=until)


def is_timm_file(path: Path) -> bool:
    """Return True for our own file of an adapter on a model of timm, not for a LoRA of ViSFT that is called so."""
    return path.name == TIMM_FILE and _TIMM_KEY in open_weights(path).metadata


def _read_timm(path: Path) -> Adapter:
    """Read our own file of an adapter on a model of timm. Raises ValueError for another file."""
    file = open_weights(path)
    if _TIMM_KEY not in file.metadata:
        raise ValueError(f"{file.path} is no adapter that this project wrote for a model of timm")
    told = file.told(_TIMM_KEY, TimmAdapterEntry)
    names = [f"{layer}.{kind}" for layer in told.places for kind in KINDS]
    whole = bool(names) and set(names) == set(file)
    for layer, place in told.places.items() if whole else ():
        a, b = file.shape(f"{layer}.lora_A"), file.shape(f"{layer}.lora_B")
        parts = max(len(place.slices), 1)  # each has rows of lora_A of its own
        if len(a) not in (2, 4) or len(b) != 2 or 0 in (*a, *b) or (a[0], b[1]) != (parts * told.rank, told.rank):
            raise ValueError(f"{file.path}: {layer} has lora_A {a} and lora_B {b}, its header says rank {told.rank}")
    adapter = Adapter(
        told.rank,
        told.alpha,
        tuple(told.targets),
        {name: file.get(name) for name in names} if whole else {},
        told.base_sha256,
        model=told.name,
        options=told.options,
        groups={layer: place.groups for layer, place in told.places.items() if place.groups > 1},
        until=told.until,
    )
    places = {layer: place.model_dump() for layer, place in told.places.items()}
    if not whole or _places(adapter) != places:
        raise ValueError(f"{file.path}: its tensors are not those of the layers that its header names")
    return adapter


def _stacked(file: WeightFile, slices: tuple[str, ...]) -> dict[str, Tensor]:
    """Separate adapters of q, k, v as one of the fused qkv, in our stacking."""
    first = f".attn.{slices[0]}_proj."
    tensors = {}
    for name in (name for name in file if first in name):
        parts = [name.replace(first, f".attn.{part}_proj.") for part in slices]
        tensors[_own_name(name.replace(first, ".attn.qkv."))] = torch.cat([file.get(part).float() for part in parts])
    read = len(tensors) * len(slices)
    if read != sum("_proj.lora_" in name for name in file):
        raise ValueError(f"{file.path}: not every block has the same of q_proj, k_proj, v_proj adapted")
    return tensors


def _read_config(folder: Path) -> PeftConfig:
    config = read_config(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: adapters of type {config.get('peft_type')!r} are not LoRA; allowed: LORA")
    given = [f"{name}={config[name]!r}" for name in _REFUSED if config.get(name)]
    if config.get("bias", "none") != "none":
        given.append(f"bias={config['bias']!r}")
    if given:
        raise ValueError(f"{folder}: plain LoRA cannot express {', '.join(given)}; merge this adapter with PEFT itself")
    found = read_record(folder / CONFIG, PeftConfig)
    if unsafe := [repr(name) for name in found.alpha_pattern or {} if not _PLAIN.fullmatch(name)]:
        raise ValueError(
            f"{folder / CONFIG}: alpha_pattern has regular expressions, which a file could make run for ever: "
            f"{examples(unsafe)}. Allowed are names of modules or ends of them (attn.qkv, blocks.0.mlp.fc1): name each "
            f"module"
        )
    return found


def _slices(file: WeightFile, told: AdapterEntry | None) -> tuple[str, ...]:
    """The adapted slices: as our metadata says, else those where some block has a value in lora_B."""
    used: set[str] = {name for name in SLICES if told is not None and name in told.targets}
    for name in file if told is None else ():
        if name.endswith("attn.qkv.lora_B.weight"):
            parts = file.get(name).chunk(3)
            used.update(SLICES[index] for index, part in enumerate(parts) if part.any())
    if not used:
        raise ValueError(f"{file.path}: every lora_B of qkv is zero: this adapter changes nothing and was not trained")
    return tuple(name for name in SLICES if name in used)


def _rank_and_scaling(file: WeightFile, config: PeftConfig, groups: int) -> tuple[int, float]:
    """Our one rank and one factor, where all modules of a PEFT adapter agree on them."""
    found: dict[tuple[int, float], str] = {}
    for name in file:
        match = _NAME.fullmatch(name)
        if match is None or match[3] != "A":
            continue
        rows = file.shape(name)[0]
        if file.shape(name.replace(".lora_A.", ".lora_B."))[1] != rows:
            raise ValueError(f"{file.path}: lora_A and lora_B of {match[1]} have different ranks")
        count = groups if match[2] == "attn.qkv" else 1
        if rows % count:
            raise ValueError(_not_sparse(name, None, rows, file))
        alpha = _pattern(config.alpha_pattern or {}, match[1], config.lora_alpha)
        divisor = rows**0.5 if config.use_rslora else rows
        found.setdefault((rows // count, alpha / divisor), match[1])
    if len(found) > 1:
        shown = ", ".join(f"{name}: rank {rank}, scaling {scaling:g}" for (rank, scaling), name in found.items())
        raise ValueError(f"{file.path}: one rank and one scaling for all modules are needed, found {shown}")
    return next(iter(found))


def _pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the end of the module's name, at a dot."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _not_sparse(name: str, slices: tuple[str, ...] | None, rank: int, file: WeightFile) -> str:
    blocks = f"{'+'.join(slices)} of rank {rank}" if slices else f"rank {rank}"
    return (
        f"{file.path}: {name} cannot be split into separate adapters of q, k and v ({blocks}): its lora_B has values "
        f"outside one block of columns a slice. PEFT trained the fused qkv as one matrix, which LoRA on slices does "
        f"not express; merge it with PEFT (merge_and_unload) and load the merged weights as a base instead"
    )
