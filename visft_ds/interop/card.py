"""The model card: README.md of exported weights. What they are, from what, how trained, how to load it.

It holds names of files, hashes, settings and numbers that were measured, never folders or names of people; what nobody
recorded or measured it says so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from visft_ds.interop import peft, visft
from visft_ds.interop import timm_names as timm
from visft_ds.interop.adapter import Adapter
from visft_ds.interop.formats import FORMATS
from visft_ds.interop.layouts import Tower
from visft_ds.interop.merge import MergeReport, TimmMerge, Verification
from visft_ds.interop.tuned import Change, TunedWeights

_METHOD = "[ViSFT, arXiv 2401.10222](https://arxiv.org/abs/2401.10222)"


@dataclass(frozen=True)
class CardSource:
    """A file that something was made from, without its folder."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Origin:
    """Origin of weights. `trained`: setting -> value; `measured`: quantity -> value, of an evaluation; both empty
    where nothing is known."""

    base: CardSource | None
    adapters: tuple[CardSource, ...]
    trained: Mapping[str, str] = field(default_factory=dict)
    measured: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def merged_card(
    title: str,
    form: str,
    dtype: str,
    adapter: Change,
    origin: Origin,
    report: MergeReport,
    verification: Verification | None,
    *,
    side_files: Collection[str],
) -> str:
    """README.md of full weights. `side_files`: with these the library loads the folder alone (`formats.side_files`)."""
    tower = report.tower
    what = [
        f"A vision tower of EVA-CLIP ({tower.describe()}) {_how(adapter)}.",
        f"Names of the tensors: {FORMATS[form].library}. The tower is stored in {dtype}, whatever else the base file "
        f"had is as it was. {len(report.weights)} tensors.",
    ]
    if adapter.until is not None:
        what.append(
            f"It was trained on what {adapter.until} gives, normed by the last norm; behind that block it is the base. "
            f"visft_ds reads it there by itself, timm by `model.forward_intermediates(images, indices="
            f"[{adapter.until.rpartition('.')[2]}], norm=True, intermediates_only=True)`."
        )
    measured = {"share of the change that is in the file, of all blocks": f"{report.total.retained:.2%}"}
    if report.blocks and report.total.wanted:
        worst = min(range(len(report.blocks)), key=lambda index: report.blocks[index].retained)
        measured["the same, block with the least"] = f"block {worst}: {report.blocks[worst].retained:.2%}"
        measured["error of the change, |missing| / |change|"] = f"{report.total.error:.2g}"
    if verification is not None:
        measured["outputs against base + change, relative difference"] = (
            f"{verification.relative:.2g} (the effect of the change: {verification.effect:.2g})"
        )
    lines = [*_front(FORMATS[form].library), f"# {title}", "", *what, ""]
    lines += _sources(origin, adapter, tower)
    lines += fact_table("How it was trained", origin.trained, "Not recorded.")
    lines += fact_table("Measured", measured | dict(origin.measured), "Nothing.")
    sharded = len(report.files) > 1
    lines += ["## How to load it", "", *_snippet(form, report, side_files, sharded=sharded)]
    return "\n".join(lines)


def adapter_card(title: str, form: str, adapter: Adapter, origin: Origin, tower: Tower, file: str) -> str:
    """README.md of a LoRA alone."""
    what = f"The LoRA of a supervised fine-tuning ({_METHOD}) for a vision tower of EVA-CLIP, without the tower."
    lines = [*_front("peft"), f"# {title}", "", what, peft.facts(adapter, tower), ""]
    lines += _sources(origin, adapter, tower)
    lines += fact_table("How it was trained", origin.trained, "Not recorded.")
    lines += fact_table("Measured", origin.measured, "Nothing.")
    if form != "visft":
        return "\n".join(lines) + peft.loading(adapter, tower, split=form == "peft_split")
    lines += [
        "## How to load it",
        "",
        f"`{file}` has the names and the form of the files that ViSFT published: `visual.blocks.N.attn.qkv.lora_A` "
        f"(2r, D), `.lora_B` (2D, r), rows of q first, then v; scaling {visft.ALPHA:g}/r. Its own code reads it, and "
        f"`visft merge --adapter {file}` of visft_ds.",
        "",
    ]
    return "\n".join(lines)


def timm_card(title: str, change: Change, report: TimmMerge) -> str:
    """README.md of merged weights."""
    what = "with its LoRA merged in" if isinstance(change, Adapter) else "trained itself"
    snippet = ["```python", 'FOLDER = "."  # this folder', "import timm", ""]
    snippet += ['model = timm.create_model(f"local-dir:{FOLDER}", pretrained=True)', "```"]
    if report.backbone.until is not None:
        snippet[-1:] = ["", f"# It was trained on what {report.backbone.until} gives.", "import torch", ""]
        snippet += [*report.backbone.ending(), "# features = model.forward_features(images)", "```"]
    if report.settings is None:
        snippet = [f"{note[0].upper()}{note[1:]}." for note in report.notes]
    return "\n".join(
        [
            *("---", "library_name: timm", "tags: [vision, visft]", "---", ""),
            f"# {title}",
            "",
            f"timm's {report.backbone.name} after a supervised fine-tuning "
            f"([ViSFT, arXiv 2401.10222](https://arxiv.org/abs/2401.10222)), {what}: {change.describe()}.",
            f"Base weights: sha256 {report.base_sha256}. Change: sha256 {change.fingerprint()}. "
            f"{report.total.retained:.2%} of the change is in the file.",
            "",
            *snippet,
            "",
        ]
    )


def _front(library: str) -> list[str]:
    # Read by the hub. No licence: it is that of the base weights, which is not known here.
    return ["---", f"library_name: {library.lower()}", "tags: [vision, lora, visft]", "---", ""]


def _how(change: Change) -> str:
    if isinstance(change, TunedWeights):
        return f"after a supervised fine-tuning ({_METHOD}) of its own weights"
    return f"with the LoRA of a supervised fine-tuning ({_METHOD}) merged into its weights"


def _sources(origin: Origin, change: Change, tower: Tower) -> list[str]:
    if isinstance(change, TunedWeights):
        source, facts = "run", f"Trained: {change.describe()}."
    else:
        source, facts = "adapter", f"Adapter: {peft.facts(change, tower)}"
    rows = [f"| base weights | {origin.base.name} | {origin.base.sha256} |"] if origin.base else []
    rows += [f"| {source} | {adapter.name} | {adapter.sha256} |" for adapter in origin.adapters]
    lines = ["## Made from", "", "| | file | sha256 |", "|---|---|---|", *rows, ""]
    return [*lines, facts, *(f"{note}." for note in origin.notes), ""]


def fact_table(title: str, facts: Mapping[str, str], empty: str) -> list[str]:
    """Lines of a section with a table of name and value; `empty` says what stands there without facts."""
    if not facts:
        return [f"## {title}", "", empty, ""]
    return [f"## {title}", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items()), ""]


def _snippet(form: str, report: MergeReport, side_files: Collection[str], *, sharded: bool) -> list[str]:
    tower, file = report.tower, report.files[-1].name
    read = ['FOLDER = "."  # this folder']
    if form == "transformers":
        read += ["from transformers import Blip2VisionModel", "", "model = Blip2VisionModel.from_pretrained(FOLDER)"]
        return [
            *_code(read),
            "Inside a whole BLIP-2: `blip2.vision_model.load_state_dict(model.state_dict())`. Its Q-Former was trained "
            "with the 39 blocks and the last norm of the published BLIP-2.",
            "",
        ]
    if form == "lavis":
        return [
            f"`{file}` takes the place of LAVIS' own `eva_vit_g.pth`: name it where `create_eva_vit_g` "
            "(lavis/models/eva_vit.py) names its download. LAVIS reads the first 39 blocks and passes over the rest.",
            "",
        ]
    if form == "eva_clip":
        return [
            f"`{file}` takes the place of the published EVA-CLIP file. EVA-CLIP's own code reads `.pt` only: "
            '`eva_clip.create_model_and_transforms("EVA02-CLIP-bigE-14-plus", pretrained=FILE)`.',
            "",
        ]
    if side_files:
        how = "timm.create_model" if form == "timm" else "open_clip.create_model"
        more = ", pretrained=True" if form == "timm" else ""
        lines = _code([*read, f"import {form}", "", f'model = {how}(f"local-dir:{{FOLDER}}"{more})'])
        if form == "open_clip" and len(side_files) > 1:
            lines += [
                "timm has no name for a tower of this size: `open_clip_config.json` names this folder by its absolute "
                "path. Change `timm_model_name` in it where the folder has moved.",
                "",
            ]
        return lines
    pattern = "*.safetensors" if sharded else file
    read += ["from pathlib import Path", "from safetensors.torch import load_file", "", "weights = {}"]
    read += [f'for file in sorted(Path(FOLDER).glob("{pattern}")):', "    weights |= load_file(file)"]
    if form == "open_clip":
        read += ["", "import open_clip", "", 'model = open_clip.create_model("...")  # the configuration of the base']
    elif tower.num_heads is None or tower.post_norm is None:
        read += ["", "import timm", "", "model = ...  # heads and norms of the tower are not recorded"]
    else:
        rows = report.weights.shape("head.weight")[0] if "head.weight" in report.weights else 0
        if not tower.class_token:
            read += ['weights["pos_embed"] = weights["pos_embed"][:, 1:]  # no class token']
        read += ["", "import timm", "", f"model = {timm.create_model_call(tower, rows)}"]
    return _code([*read, "model.load_state_dict(weights)"])


def _code(lines: list[str]) -> list[str]:
    return ["```python", *lines, "```", ""]
