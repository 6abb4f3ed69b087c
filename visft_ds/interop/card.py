"""The model card: README.md of exported weights. What they are, from what, how trained, how to load it.

It holds names of files, hashes, settings and numbers that were measured, never folders or names of people; what nobody
recorded or measured it says so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from visft_ds.interop import onnx, peft
from visft_ds.interop import timm_names as timm
from visft_ds.interop.adapter import Adapter
from visft_ds.interop.card_data import Measurement, Publication, front_matter
from visft_ds.interop.formats import FORMATS
from visft_ds.interop.layouts import Tower
from visft_ds.interop.merge import MergeReport, Share, TimmMerge, Verification
from visft_ds.interop.tuned import Change, TunedWeights
from visft_ds.models import Backbone

_HEADING = ["## How to load it", ""]
_METHOD = "[ViSFT, arXiv 2401.10222](https://arxiv.org/abs/2401.10222)"


@dataclass(frozen=True)
class CardSource:
    """A file that something was made from, without its folder."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Origin:
    """Origin of weights. `trained`: setting -> value; `measured`: numbers of an evaluation of a whole split; both empty
    where nothing is known."""

    base: CardSource | None
    adapters: tuple[CardSource, ...]
    trained: Mapping[str, str] = field(default_factory=dict)
    measured: Sequence[Measurement] = ()
    notes: tuple[str, ...] = ()
    published: Publication | None = None


def merged_card(
    title: str,
    form: str,
    dtype: str,
    change: Change,
    origin: Origin,
    report: MergeReport,
    verification: Verification | None,
    *,
    side_files: Collection[str],
) -> str:
    """README.md of full weights. `side_files`: with these the library loads the folder alone (`formats.side_files`)."""
    tower = report.tower
    what = [
        f"A vision tower of EVA-CLIP ({tower.describe()}) {_how(change)}.",
        f"Names of the tensors: {FORMATS[form].library}. The tower is stored in {dtype}, whatever else the base file "
        f"had is as it was. {len(report.weights)} tensors.",
    ]
    if change.layers_read:
        what.append(
            f"It was trained on what block {max(change.layers_read)} gives, through the last norm. "
            f"visft_ds reads it there by itself, timm by `model.forward_intermediates(images, indices="
            f"{[*change.layers_read]}, norm=True, intermediates_only=True)`."
        )
    loading = [*_HEADING, *_snippet(form, report, side_files)]
    measured = _of_merge(report.total, report.blocks, verification)
    return _card(title, FORMATS[form].library.lower(), origin, _sources(origin, change, tower), what, measured, loading)


def adapter_card(
    title: str,
    form: str,
    adapter: Adapter,
    origin: Origin,
    tower: Tower | None,
    verification: Verification | None,
) -> str:
    """README.md of a LoRA alone; `tower`: of one of our own."""
    model = "a vision tower of EVA-CLIP, without the tower" if tower else f"timm's {adapter.model}, without that model"
    what = [f"The LoRA of a supervised fine-tuning ({_METHOD}) for {model}.", peft.facts(adapter, tower)]
    what += [] if origin.published else [peft.NAMELESS]
    loading = [peft.loading(adapter, tower, origin.published)]
    sources, measured = _sources(origin, adapter, tower), _of_outputs(verification)
    return _card(title, "peft", origin, sources, what, measured, loading, merged=False)


def timm_card(
    title: str,
    form: str,
    dtype: str,
    change: Change,
    origin: Origin,
    report: TimmMerge,
    verification: Verification | None,
) -> str:
    """README.md of a merged model of timm, for timm or transformers."""
    what = [f"timm's {report.backbone.name} {_how(change)}. Stored in {dtype}."]
    notes = [f"{note[0].upper()}{note[1:]}." for note in report.unfit]
    if not report.side_files:
        loading = []
    elif form == "transformers":
        loading = ['FOLDER = "."  # this folder', "from transformers import AutoModel", ""]
        loading += ["model = AutoModel.from_pretrained(FOLDER)"]
        if report.side_files["config.json"]["model_type"] == "clip_vision_model":
            loading += ["# features = model.post_layernorm(model(pixel_values=images).last_hidden_state)"]
        if report.backbone.layers_read:
            what.append(f"It ends after {report.backbone.ends()[-1]}, whose normed tokens it was trained on.")
    else:
        loading = ['FOLDER = "."  # this folder', "import timm", ""]
        loading += ['model = timm.create_model(f"local-dir:{FOLDER}", pretrained=True)']
        if report.backbone.layers_read:
            loading += ["", f"# It was trained on what {report.backbone.ends()[-1]} gives."]
            loading += [report.backbone.pruning, "# features = model.forward_features(images)"]
        else:
            notes.append("transformers loads the folder as `AutoModel.from_pretrained(FOLDER)` (TimmWrapperModel).")
    lines = [*_HEADING, *(_code(loading) if loading else []), *notes, ""]
    measured = _of_merge(report.total, (), verification)
    return _card(title, form, origin, _sources(origin, change, None), what, measured, lines)


def onnx_card(
    title: str,
    file: str,
    change: Change,
    origin: Origin,
    backbone: Backbone,
    total: Share,
    verification: Verification | None,
) -> str:
    """README.md of a backbone as ONNX."""
    side = backbone.image_size
    what = [
        f"{backbone.describe()[0].upper()}{backbone.describe()[1:]}, {_how(change)}.",
        f"A graph of ONNX in fp32: `{onnx.IMAGES}` (B, 3, {side}, {side}), RGB in [0, 1], less the mean "
        f"{_numbers(backbone.pixel_mean)} and divided by {_numbers(backbone.pixel_std)}; `{onnx.FEATURES}` (B, "
        f"{backbone.width}, {side // backbone.patch_size}, {side // backbone.patch_size}). Any B.",
    ]
    loading = ["import onnxruntime", "", f'session = onnxruntime.InferenceSession("{file}")']
    loading += [f'# features = session.run(["{onnx.FEATURES}"], {{"{onnx.IMAGES}": images}})[0]']
    sources, measured = _sources(origin, change, None), _of_merge(total, (), verification)
    return _card(title, "onnx", origin, sources, what, measured, [*_HEADING, *_code(loading)])


def _card(
    title: str,
    library: str,
    origin: Origin,
    sources: list[str],
    what: Sequence[str],
    measured: Mapping[str, str],
    loading: Sequence[str],
    *,
    merged: bool = True,
) -> str:
    numbers = {f"{one.name} ({one.split}, {one.data})": f"{one.value:.4f}" for one in origin.measured}
    front = front_matter(title, library, origin.published, merged=merged, measured=origin.measured)
    lines = [*front, f"# {title}", "", *what, "", *sources]
    lines += fact_table("How it was trained", origin.trained, "Not recorded.")
    lines += fact_table("Measured", {**measured, **numbers}, "Nothing.")
    return "\n".join([*lines, *loading])


def _of_merge(total: Share, blocks: Sequence[Share], verification: Verification | None) -> dict[str, str]:
    """Numbers of a merge, as far as they have a value."""
    measured = {}
    if total.wanted:
        measured["share of the change that is in the file"] = f"{total.retained:.2%}"
        measured["error of the change, norm of what is missing / norm of the change"] = f"{total.error:.2g}"
    if total.wanted and any(block.wanted for block in blocks):
        worst = min((index for index, block in enumerate(blocks) if block.wanted), key=lambda i: blocks[i].retained)
        measured["the share, block with the least"] = f"block {worst}: {blocks[worst].retained:.2%}"
    return measured | _of_outputs(verification)


def _of_outputs(verification: Verification | None) -> dict[str, str]:
    if verification is None:
        return {}
    text = f"{verification.relative:.2g} by {verification.loader} (the effect of the change: {verification.effect:.2g})"
    return {"outputs against base + change, relative difference": text}


def _numbers(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"


def _how(change: Change) -> str:
    if isinstance(change, TunedWeights):
        return f"after a supervised fine-tuning ({_METHOD}) of its own weights"
    return f"with the LoRA of a supervised fine-tuning ({_METHOD}) merged into its weights"


def _sources(origin: Origin, change: Change, tower: Tower | None) -> list[str]:
    if isinstance(change, TunedWeights):
        source, facts = "run", f"Trained: {change.describe()}."
    else:
        source, facts = "adapter", f"Adapter: {peft.facts(change, tower) if tower else f'{change.describe()}.'}"
    rows = [f"| base weights | {origin.base.name} | {origin.base.sha256} |"] if origin.base else []
    rows += [f"| {source} | {adapter.name} | {adapter.sha256} |" for adapter in origin.adapters]
    lines = ["## Made from", "", "| | file | sha256 |", "|---|---|---|", *rows, ""]
    base = origin.published
    where = f" ({base.repository}{f': {base.licence}' if base.licence else ''})" if base else ""
    licence = f"The licence is that of the base weights{where}."
    return [*lines, facts, *(f"{note}." for note in origin.notes), licence, ""]


def fact_table(title: str, facts: Mapping[str, str], empty: str) -> list[str]:
    """Lines of a section with a table of name and value; `empty` says what stands there without facts."""
    if not facts:
        return [f"## {title}", "", empty, ""]
    rows = [" | ".join(cell.replace("|", r"\|") for cell in row) for row in facts.items()]
    return [f"## {title}", "", "| | |", "|---|---|", *(f"| {row} |" for row in rows), ""]


def _snippet(form: str, report: MergeReport, side_files: Collection[str]) -> list[str]:
    tower, file = report.tower, report.file.name
    read = ['FOLDER = "."  # this folder']
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
    read += ["from safetensors.torch import load_file", "", f'weights = load_file(f"{{FOLDER}}/{file}")']
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
