"""Base weights + adapter -> full weights, streamed tensor by tensor, and the proof of it.

The change of a weight by fine-tuning is often smaller than the spacing of 16-bit numbers near the weight: base and
merged file then hardly differ. So the arithmetic is fp32, and the report says how much of the change stands in the
file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visft_ds.interop import eva_clip, peft, visft, vision_models
from visft_ds.interop.adapter import Adapter
from visft_ds.interop.backbones import cast, check_names, is_merged, load_backbone, load_timm, open_backbone
from visft_ds.interop.files import (
    BASE_SHA256,
    LAYERS,
    TRAINED_ON,
    VISION_OF,
    Entry,
    TensorInfo,
    WeightFile,
    all_finite,
    base_identity,
    examples,
    recipe_of_base,
    sha256_file,
    view,
)
from visft_ds.interop.formats import FORMATS, check_format, config_of
from visft_ds.interop.layouts import TIMM_KEY, Layout, Tower, base_parameters, timm_entry, tower_in, tower_names
from visft_ds.interop.towers import build_tower, open_tower
from visft_ds.interop.tuned import Change, TunedWeights
from visft_ds.interop.writing import refuse_existing, write_safetensors, write_torch
from visft_ds.models import Backbone
from visft_ds.models.timm_backbone import TimmBackbone, build_timm
from visft_ds.monitor.console import gauge

# Below this share, or above this error, the merged weights are not the fine-tuned ones any more.
MIN_RETAINED, MAX_ERROR = 0.9, 0.5


@dataclass
class Share:
    """Share of a wanted change D in the written one, E = W_out - W_base.

    `retained` is <E, D> / |D|^2 (1 = all of it along D); `error` is |E - D| / |D| (0 = exact). Both are needed: where
    the base is finer than the output, rounding W_base itself acts as dither, `retained` stays near 1, and only `error`
    shows that the change drowned. NaN where the adapter changes nothing.
    """

    along: float = 0.0
    wanted: float = 0.0
    missed: float = 0.0

    def add(self, effective: Tensor, delta: Tensor) -> None:
        """Count one weight matrix in."""
        self.along += (effective * delta).sum().item()
        self.wanted += delta.square().sum().item()
        self.missed += (effective - delta).square().sum().item()

    @property
    def retained(self) -> float:
        return self.along / self.wanted if self.wanted else math.nan

    @property
    def error(self) -> float:
        return math.sqrt(self.missed / self.wanted) if self.wanted else math.nan

    @property
    def lost(self) -> bool:
        """Return True if too little of the change is left to speak of the same model."""
        return self.wanted > 0 and (self.retained < MIN_RETAINED or self.error > MAX_ERROR)


@dataclass(frozen=True)
class MergeReport:
    """Report of `merge_into_file`.

    `base_sha256` is the hash of the file given as base. `weights` are the names and shapes of the result, `file` where
    it was written. `blocks[N]` and `total` are the retained shares; `left_out` names what of the base was not written.
    """

    tower: Tower
    source_layout: str
    base_sha256: str
    weights: WeightFile
    left_out: tuple[str, ...]
    blocks: tuple[Share, ...]
    total: Share
    notes: tuple[str, ...]
    file: Path


@dataclass(frozen=True)
class TimmMerge:
    """Report of `merge_timm`. `side_files` are the files (content: JSON) by which a library loads a folder with the
    weights; empty where it cannot, for the reason in `unfit`."""

    backbone: TimmBackbone  #: on the meta device
    base_sha256: str
    total: Share
    side_files: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...]
    unfit: tuple[str, ...] = ()

    def create_call(self, file: Path) -> str | None:
        """Python that builds timm's model and loads a file of these weights, strictly; None where it cannot."""
        if "pretrained_cfg" not in self.side_files.get("config.json", {}):
            return None
        size = "".join(f", {key}={value}" for key, value in self.backbone.options.items())
        classes = self.side_files["config.json"]["num_classes"]
        return f'timm.create_model("{self.backbone.name}", num_classes={classes}{size}, checkpoint_path="{file}")'


def read_adapter(path: str | Path) -> Adapter:
    """An adapter from a folder of ours (or a file inside one) or from a ViSFT LoRA file."""
    path = Path(path)
    if path.is_dir():
        return peft.read_adapter_folder(path)
    if path.name in (peft.WEIGHTS, peft.CONFIG) or peft.is_own_file(path):
        return peft.read_adapter_folder(path.parent)
    return visft.read_visft_lora(path)


def merge_into_file(
    base: str | Path,
    adapter: Change | None,
    out: str | Path,
    *,
    layout: str = "timm",
    dtype: torch.dtype = torch.float32,
    allow_other_base: bool = False,
    tower: Tower | None = None,
) -> MergeReport:
    """Write base + adapter, or weights that trained themselves in place of the base's, in one of `FORMATS`, tensor by
    tensor; without adapter: the base as it is, in another form.

    Blocks behind the one that a change ended after stay as they are in the base; the header names that one.
    Peak memory is about two of the largest tensors above the map. The tower is cast to `dtype`; class token, CLIP
    projection and (eva_clip, open_clip) text side are carried over as they are. `tower` adds what the base file does
    not tell (heads, norm placement).

    Raises ValueError, before anything is written, for: an existing `out`, a base that has an adapter merged in already
    an adapter recorded for another base file (unless `allow_other_base`),
    an adapter or a base of another tower, a tower that the library does not have, NaN in the adapter. Raises it, and
    leaves nothing behind, for NaN or infinity in the base and for values that do not fit into `dtype`.
    """
    out = Path(out)
    file, source = open_tower(base)
    found = tower_in(file, source)
    tower = replace(tower or found, class_token=found.class_token)
    check_format(layout, out, tower)
    refuse_existing(out)
    check_names(file, source, tower_names(found), found)
    if adapter is not None:
        adapter = adapter.fit(found)
    base_sha256, notes = sha256_file(base), list[str]()
    if adapter is not None:
        base_sha256, notes = check_base(file, adapter, allow_other_base)
    blocks, total = tuple(Share() for _ in range(found.depth)), Share()
    names = tower_names(replace(found, class_token=False))
    merged = _merged(file, source.prefix, names, adapter, dtype, total, blocks=blocks)
    entries = FORMATS[layout].entries(merged, source)
    header = _carried(file, source, found, dtype) if adapter is None else _header(file, adapter, base_sha256)
    result = view(merged, entries, header | {"tower": tower.to_json()})
    _write(result, out)
    if not found.class_token:
        notes.append("the base has no class token: models that pool by it need class_token=False")
    if layout == "eva_clip" and (missing := eva_clip.missing_parts(entries)):
        notes.append(f"no whole EVA-CLIP: its own code would leave at random {', '.join(missing)}")
    if adapter is not None and not total.wanted:
        notes.append("nothing changes: every lora_B is zero, or what trained is as it was")
    used = {source for entry in entries.values() for source in entry.sources}
    left_out = tuple(name for name in file if name not in used)
    return MergeReport(tower, source.name, base_sha256, result, left_out, blocks, total, tuple(notes), out)


def _carried(file: WeightFile, source: Layout, tower: Tower, dtype: torch.dtype) -> dict[str, str]:
    """Metadata that a base keeps in another form, with its identity for adapters where no value was rounded."""
    names = ("lora_merged", BASE_SHA256, TRAINED_ON, "lora", "tuned", LAYERS)
    metadata = {"lora_merged": "false"} | {name: file.metadata[name] for name in names if name in file.metadata}
    tower_tensors = (source.prefix + name for name in tower_names(replace(tower, class_token=False)))
    exact = all(torch.promote_types(file.dtype(name), dtype) == dtype for name in tower_tensors)
    return metadata | recipe_of_base(file) | ({VISION_OF: base_identity(file)} if exact else {})


def _header(file: WeightFile, change: Change, base_sha256: str) -> dict[str, str]:
    """Metadata of base and change in the weights made of them."""
    kind = "tuned" if isinstance(change, TunedWeights) else "lora"
    return {
        # Weights that trained themselves are a base like any other.
        "lora_merged": "true" if kind == "lora" else "false",
        BASE_SHA256: base_sha256,
        **recipe_of_base(file),
        **({LAYERS: json.dumps(change.layers_read)} if change.layers_read else {}),
        kind: json.dumps({**change.record(), "sha256": change.fingerprint()}),
    }


def _merged(
    file: WeightFile,
    prefix: str,
    names: Iterable[str],
    change: Change | None,
    dtype: torch.dtype,
    total: Share,
    *,
    blocks: Sequence[Share] = (),
) -> WeightFile:
    """A view of the base with the change in its weights.

    Args:
        names: without `prefix`, the model's weights, which become `dtype`; all else stays as it is.
        total, blocks: count what is read of all weights, and of those of a block.
    """
    changed = set(change.weights()) if change is not None else set()

    def make(inner: str, value: Tensor) -> Tensor:
        name = prefix + inner
        if not all_finite(value):
            raise ValueError(f"{file.path}: {name} holds NaN or infinity")
        if inner not in changed:
            return cast(value, dtype, name)
        assert change is not None
        weight = value.float()
        moved, delta = change.apply(inner, weight)
        result = cast(moved, dtype, name)
        effective = result.float() - weight  # not in place: fp32 results are `result` itself
        of_block = [blocks[int(inner.split(".")[1])]] if blocks and inner.startswith("blocks.") else []
        for share in (*of_block, total):
            share.add(effective, delta)
        return result

    entries = {name: Entry.same(file, name) for name in file}
    for inner in names:
        name = prefix + inner
        entries[name] = Entry((name,), TensorInfo(file.shape(name), dtype), partial(make, inner))
    return view(file, entries)


def _write(result: WeightFile, out: Path) -> None:
    infos = result.infos
    with gauge(f"writing {out.name}", sum(info.nbytes for info in infos.values()) / 1e6, "MB") as bar:

        def produce(name: str) -> Tensor:
            bar.update(infos[name].nbytes / 1e6)
            return result.get(name)

        if out.suffix != ".safetensors":
            write_torch(out, infos, produce)
        else:
            write_safetensors(out, infos, produce, result.metadata)


def merge_timm(
    base: str | Path,
    change: Change,
    out: str | Path,
    *,
    layout: str = "timm",
    dtype: torch.dtype = torch.float32,
    allow_other: bool = False,
) -> TimmMerge:
    """Write base + change as safetensors: under timm's names, with all that the base has beside the backbone, or
    (`layout`) as the class of transformers that has this model.

    Raises ValueError, before anything is written, for an existing `out` or another suffix than .safetensors, a base of
    another model or with an adapter merged in already, a change that was made on another base (unless `allow_other`),
    and a model that transformers does not have; and, leaving nothing behind, as `merge_into_file` does.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: weights for {layout} are written as .safetensors only; choose such a name")
    refuse_existing(out)
    assert change.timm is not None
    name, image_size = change.timm
    backbone = build_timm(name, image_size=image_size, layers=change.layers_read, device="meta")
    opened = open_backbone(backbone, base)
    file, parameters = opened.file, base_parameters(backbone)
    if is_merged(file):
        raise ValueError(f"{base} has an adapter merged in already; merging again would count it twice: give the base")
    if foreign := sorted(set(change.weights()) - parameters.keys() - set(opened.stored)):
        raise ValueError(f"{base} has nothing of the names that were changed: {examples(foreign)}")
    sha256, notes = check_timm_base(base, change, allow_other=allow_other)
    total = Share()
    merged = _merged(file, "", parameters, change, dtype, total)
    side_files: dict[str, dict[str, Any]] = {}
    unfit: list[str] = []
    if layout == "transformers":
        side_files = vision_models.settings(backbone, pooled=vision_models.has_pooling(file, backbone), dtype=dtype)
        merged = view(merged, vision_models.export_entries(merged, backbone))
    else:
        config, unfit = config_of(backbone, {key: info.shape for key, info in merged.infos.items()})
        side_files = {} if config is None else {"config.json": config}
    metadata = {TIMM_KEY: timm_entry(backbone)} if layout == "timm" else {}
    write_safetensors(out, merged.infos, merged.get, metadata | _header(file, change, sha256))
    return TimmMerge(backbone, sha256, total, side_files, tuple(notes), tuple(unfit))


def check_timm_base(base: str | Path, change: Change, *, allow_other: bool) -> tuple[str, list[str]]:
    """(sha256 of the file, notes). Raises ValueError where the change was made on another base that is not allowed."""
    sha256 = sha256_file(base)
    if change.base_sha256 is None:
        return sha256, ["it is not recorded on which base file this was trained: not checked"]
    if change.base_sha256 == sha256:
        return sha256, []
    problem = f"this was trained on the base with sha256 {change.base_sha256}, {base} has {sha256}"
    if not allow_other:
        raise ValueError(f"{problem}: give that one, or allow it (--allow-other-base)")
    return sha256, [f"allowed: {problem}"]


def check_base(file: WeightFile, adapter: Change, allow_other: bool) -> tuple[str, list[str]]:
    """(sha256 of the file, notes); ValueError where the adapter was made for another base."""
    if is_merged(file):
        raise ValueError(
            f"{file.path} has an adapter merged in already; merging again would count it twice: give the base file"
        )
    sha256 = sha256_file(file.path)
    base = base_identity(file)
    problems = []
    notes = []
    if adapter.base_sha256 is None:
        notes.append("the adapter does not record which base file it was trained on: not checked")
    elif adapter.base_sha256 != base:
        problems.append(f"the adapter was trained on the base with sha256 {adapter.base_sha256}, this file has {base}")
    if problems and not allow_other:
        raise ValueError(
            f"{file.path}: {'; '.join(problems)}. Give that one; or, where this one holds the same weights in another "
            f"form, allow it (--allow-other-base)"
        )
    return sha256, [*notes, *(f"allowed: {problem}" for problem in problems)]


@dataclass(frozen=True)
class Verification:
    """Outputs of the merged file against base + adapter, on the same images.

    `max_abs` is the largest difference of a feature, `relative` the norm of the difference over the norm of the
    outputs, `effect` the same for base + adapter against base alone. `passed`: `relative` is at most `tolerance`.
    `loader` is the library, and its version, that loaded and ran the result.
    """

    max_abs: float
    relative: float
    effect: float
    tolerance: float
    loader: str = "visft_ds"

    @property
    def passed(self) -> bool:
        return self.relative <= self.tolerance


def verify_merge(
    base: str | Path,
    change: Change | None,
    merged: str | Path,
    tower: Tower | None,
    *,
    dtype: torch.dtype,
    images: int = 2,
    seed: int = 0,
    loader: str = "visft_ds",
    load_result: Callable[[], Callable[[Tensor], Tensor]] | None = None,
) -> Verification:
    """Run base, base + change, and the merged file (in fp32, one model at a time) on seeded normal noise as images.

    `tower`: sizes of one of our own; None for the model of timm that the change is of. `load_result` loads the result
    by a library of others, `loader`; None: as we do.
    """

    def load(path: str | Path) -> Backbone:
        if tower is None:
            assert change is not None and change.timm is not None
            return load_timm(path, *change.timm, torch.float32, change.layers_read)[0].eval()
        built = build_tower(tower, layers=() if change is None else change.layers_read).eval()
        load_backbone(built, path)
        return built

    model = load(base)
    side = model.image_size
    pixels = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        plain = model(pixels)
        if change is not None:
            change.install(model)
        wanted = model(pixels)
    del model
    result: Callable[[Tensor], Tensor] = load(merged) if load_result is None else load_result()
    with torch.no_grad():
        got = result(pixels)
    return Verification(
        max_abs=(got - wanted).abs().max().item(),
        relative=_relative(got, wanted),
        effect=_relative(wanted, plain),
        tolerance=merge_tolerance(dtype),
        loader=loader,
    )


def _relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def merge_tolerance(dtype: torch.dtype) -> float:
    """Largest relative difference of the outputs that rounding the weights to `dtype` explains: 8 half-eps.

    Measured on towers of 2 to 64 blocks with random weights of std 0.02 to 0.05: 0.4 (pre-norm) to 3 (post-norm)
    half-eps. Post-norm towers with weights of std 0.2 amplify rounding up to a thousandfold, and fail here.
    Never below 1e-5, which the order of fp32 additions, B(Ax) against (BA)x, costs by itself.
    """
    return max(1e-5, 8 * torch.finfo(dtype).eps / 2)
