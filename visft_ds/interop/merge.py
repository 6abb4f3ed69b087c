"""Base weights + adapter -> full weights in one file, streamed tensor by tensor, and the check that nothing was lost.

The change of a weight by fine-tuning is often smaller than the spacing of 16-bit numbers near the weight: base and
merged file then hardly differ. So the arithmetic is fp32, and the report says how much of the change stands in the
file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from visft_ds.interop import eva_clip, peft, timm, visft
from visft_ds.interop.adapters import LoraAdapter, fit_to_tower, install_adapter
from visft_ds.interop.backbones import cast, check_names, is_merged, load_backbone
from visft_ds.interop.files import (
    TensorInfo,
    WeightFile,
    open_weights,
    refuse_existing,
    sha256_file,
    write_safetensors,
)
from visft_ds.interop.layouts import LAYOUTS, Layout, Tower, find_layout, tower_in, tower_names
from visft_ds.models.eva_vit import PRESETS, EvaViT, build_backbone

FORMATS: dict[str, Callable[[WeightFile, Layout], dict[str, str]]] = {
    "timm": timm.export_names,
    "eva_clip": eva_clip.export_names,
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Below this share, or above this error, the merged weights are not the fine-tuned ones any more.
MIN_RETAINED, MAX_ERROR = 0.9, 0.5


@dataclass
class Share:
    """How much of a wanted change D stands in what was written: the change E = W_out - W_base.

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
        """Whether too little of the change is there to speak of the same model."""
        return self.wanted > 0 and (self.retained < MIN_RETAINED or self.error > MAX_ERROR)


@dataclass(frozen=True)
class MergeReport:
    """What `merge_into_file` did. `blocks[N]` and `total` tell the retained share; `left_out` names what was not
    written."""

    tower: Tower
    source_layout: str
    base_sha256: str
    tensors: int
    left_out: tuple[str, ...]
    blocks: tuple[Share, ...]
    total: Share
    notes: tuple[str, ...] = field(default_factory=tuple)


def read_adapter(path: str | Path) -> LoraAdapter:
    """An adapter from a PEFT folder (or a file inside one) or from a ViSFT LoRA file."""
    path = Path(path)
    if path.is_dir():
        return peft.read_peft_adapter(path)
    if path.name in (peft.WEIGHTS, peft.CONFIG):
        return peft.read_peft_adapter(path.parent)
    return visft.read_visft_lora(path)


def scaled(adapter: LoraAdapter, scale: float) -> LoraAdapter:
    """The adapter with `scale` times its effect; any number, also 0 and below. The factor goes into lora_B."""
    tensors = {name: value * scale if name.endswith("lora_B") else value for name, value in adapter.tensors.items()}
    return replace(adapter, tensors=tensors)


def merge_into_file(
    base: str | Path,
    adapter: LoraAdapter,
    out: str | Path,
    *,
    layout: str = "timm",
    dtype: torch.dtype = torch.float32,
    allow_other_base: bool = False,
    tower: Tower | None = None,
) -> MergeReport:
    """Write base + adapter as safetensors in layout `timm` or `eva_clip`; peak memory is about one tensor above the
    map.

    The tower is cast to `dtype`; class token, CLIP projection and (eva_clip) text side are carried over as they are.
    `tower` adds what the base file does not tell (heads, norm placement) to the metadata of the result.

    Raises ValueError, before anything is written, for: an existing `out`, a base that has an adapter merged in
    already, an adapter recorded for another base file (unless `allow_other_base`), an adapter or a base of another
    tower.
    """
    out = Path(out)
    if layout not in FORMATS:
        raise ValueError(f"unknown format {layout!r}; allowed: {', '.join(FORMATS)}")
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: weights are written as .safetensors only; choose such a name")
    refuse_existing(out)
    file = open_weights(base)
    if is_merged(file):
        raise ValueError(
            f"{base} has an adapter merged in already; merging again would count it twice: give the base file"
        )
    source = find_layout(file)
    found = tower_in(file, source)
    check_names(file, source, tower_names(found), found)
    adapter = fit_to_tower(adapter, found)
    base_sha256, notes = _check_base(base, adapter, allow_other_base)
    prefix = LAYOUTS[layout].prefix
    names = FORMATS[layout](file, source)
    own = {prefix + name for name in tower_names(replace(found, class_token=False))}
    infos = {
        name: TensorInfo(file.shape(old), dtype if name in own else file.dtype(old)) for name, old in names.items()
    }
    changed = {prefix + name for name in adapter.weights()}
    blocks = [Share() for _ in range(found.depth)]
    total = Share()

    def produce(name: str) -> Tensor:
        value = file.get(names[name])
        if name not in changed:
            return cast(value, infos[name].dtype, name)
        inner = name[len(prefix) :]
        weight, delta = value.float(), adapter.delta(inner)
        result = cast(weight + delta, dtype, name)
        effective = result.float() - weight
        for share in (blocks[int(inner.split(".")[1])], total):
            share.add(effective, delta)
        return result

    told = {
        "lora_merged": "true",
        "base_sha256": base_sha256,
        "lora": json.dumps({"rank": adapter.rank, "alpha": adapter.alpha, "targets": adapter.targets}),
        "tower": (tower or found).to_json(),
    }
    write_safetensors(out, infos, produce, told)
    if not found.class_token:
        notes.append("the base has no class token: models that pool by it need class_token=False")
    if not total.wanted:
        notes.append("the adapter changes nothing: every lora_B is zero")
    written = set(names.values())
    left_out = tuple(name for name in file if name not in written)
    return MergeReport(found, source.name, base_sha256, len(infos), left_out, tuple(blocks), total, tuple(notes))


def _check_base(base: str | Path, adapter: LoraAdapter, allow_other: bool) -> tuple[str, list[str]]:
    """(sha256 of the base, notes); ValueError where the adapter was made for another file."""
    base_sha256 = sha256_file(base)
    if adapter.base_sha256 is None:
        return base_sha256, ["the adapter does not record which base file it was trained on: not checked"]
    if adapter.base_sha256 == base_sha256:
        return base_sha256, []
    difference = f"the adapter was trained on the base with sha256 {adapter.base_sha256}, this file has {base_sha256}"
    if not allow_other:
        raise ValueError(
            f"{base}: {difference}. Give that file; or, where this one holds the same weights in another form, allow "
            f"it (--allow-other-base)"
        )
    return base_sha256, [f"allowed: {difference}"]


def resolve_tower(found: Tower, model: str | None = None, given: Mapping[str, float | bool] | None = None) -> Tower:
    """Complete the sizes read from a file with what no tensor tells: number of heads and norm placement.

    Sources, first one wins: `given` (num_heads, post_norm), the preset `model`, the file's metadata, the preset of the
    same sizes. Raises ValueError where nothing tells, where `model` or `given` contradict the file, and for unknown
    names.
    """
    given = dict(given or {})
    allowed = ("width", "depth", "mlp_ratio", "patch_size", "image_size", "num_heads", "post_norm")
    if unknown := [name for name in given if name not in allowed]:
        raise ValueError(f"unknown setting {', '.join(unknown)}; allowed: {', '.join(allowed)}")
    if model is not None and model not in PRESETS:
        raise ValueError(f"unknown model {model!r}; allowed: {', '.join(PRESETS)}")
    name = model or (found.preset() if found.num_heads is None else None)
    if name is not None:
        config = PRESETS[name]
        preset = {field: getattr(config, field) for field in allowed}
        given = {**preset, **given}
    sizes = {
        "width": found.width,
        "depth": found.depth,
        "mlp_ratio": found.mlp_ratio,
        "patch_size": found.patch_size,
        "image_size": found.image_size,
        "num_heads": found.num_heads,
        "post_norm": found.post_norm,
    }
    for key, value in given.items():
        # mlp_ratio is written with few digits in published configurations (4.3637); the hidden width decides.
        same = int(found.width * value) == found.hidden if key == "mlp_ratio" else value == sizes[key]
        if sizes[key] is not None and not same:
            raise ValueError(f"{key}={value} contradicts the file, which has {sizes[key]} ({found.describe()})")
        sizes[key] = value
    heads, post_norm = sizes["num_heads"], sizes["post_norm"]
    if heads is None or post_norm is None:
        raise ValueError(
            f"the file does not tell num_heads and post_norm, and no preset has {found.describe()}: give --model, or "
            f"--set num_heads=N --set post_norm=true|false"
        )
    if found.width % int(heads):
        raise ValueError(f"num_heads={heads} does not divide the width {found.width}")
    return replace(found, num_heads=int(heads), post_norm=bool(post_norm))


def build_tower(tower: Tower, dtype: torch.dtype = torch.float32) -> EvaViT:
    """A model of these sizes with unset weights, to be loaded next."""
    assert tower.num_heads is not None and tower.post_norm is not None
    return build_backbone(
        "debug",  # every field of it is replaced
        dtype=dtype,
        width=tower.width,
        depth=tower.depth,
        num_heads=tower.num_heads,
        mlp_ratio=tower.mlp_ratio,
        patch_size=tower.patch_size,
        image_size=tower.image_size,
        post_norm=tower.post_norm,
        class_token=tower.class_token,
        seed=None,
    )


@dataclass(frozen=True)
class Verification:
    """Outputs of the merged file against base + adapter, on the same images.

    `max_abs` is the largest difference of a feature, `relative` the norm of the difference over the norm of the
    outputs, `effect` the same for base + adapter against base alone. `passed`: `relative` is at most `tolerance`.
    """

    max_abs: float
    relative: float
    effect: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.relative <= self.tolerance


def verify_merge(
    base: str | Path,
    adapter: LoraAdapter,
    merged: str | Path,
    tower: Tower,
    *,
    dtype: torch.dtype,
    images: int = 2,
    seed: int = 0,
) -> Verification:
    """Run base, base + adapter, and the merged file (in fp32, one model at a time) on seeded normal noise as images."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(images, 3, tower.image_size, tower.image_size, generator=generator)
    model = build_tower(tower).eval()
    load_backbone(model, base)
    with torch.no_grad():
        plain = model(pixels)
        install_adapter(model, adapter)
        wanted = model(pixels)
        del model
        model = build_tower(tower).eval()
        load_backbone(model, merged)
        got = model(pixels)
    return Verification(
        max_abs=(got - wanted).abs().max().item(),
        relative=_relative(got, wanted),
        effect=_relative(wanted, plain),
        tolerance=merge_tolerance(dtype),
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
