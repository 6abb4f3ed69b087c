"""Base weights + adapter -> full weights, streamed tensor by tensor, and the way back.

The change of a weight by fine-tuning is often smaller than the spacing of 16-bit numbers near the weight: base and
merged file then hardly differ. So the arithmetic is fp32, and the report says how much of the change stands in the
file.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from visft_ds.interop import eva_clip, peft, visft
from visft_ds.interop.adapters import LoraAdapter
from visft_ds.interop.backbones import cast, check_names, is_merged
from visft_ds.interop.files import (
    BASE_SHA256,
    VISION_OF,
    Entry,
    TensorInfo,
    WeightFile,
    all_finite,
    base_identity,
    recipe_of_base,
    sha256_file,
    view,
)
from visft_ds.interop.formats import FORMATS, check_format
from visft_ds.interop.layouts import Layout, Tower, tower_in, tower_names
from visft_ds.interop.towers import open_tower
from visft_ds.interop.tuned import TunedWeights
from visft_ds.interop.writers import write_shards, write_torch
from visft_ds.interop.writing import refuse_existing, write_safetensors
from visft_ds.monitor.console import Gauge

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: What can come on top of base weights.
Change = LoraAdapter | TunedWeights
ChangeT = TypeVar("ChangeT", LoraAdapter, TunedWeights, "LoraAdapter | TunedWeights")
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

    `base_sha256` is the hash of the file given as base. `weights` are the names and shapes of the result; `files` what
    was written, the one to open last. `blocks[N]` and `total` are the retained shares; `left_out` names what of the
    base was not written.
    """

    tower: Tower
    source_layout: str
    base_sha256: str
    weights: WeightFile
    left_out: tuple[str, ...]
    blocks: tuple[Share, ...]
    total: Share
    notes: tuple[str, ...]
    files: tuple[Path, ...]


def read_adapter(path: str | Path) -> LoraAdapter:
    """An adapter from a PEFT folder (or a file inside one) or from a ViSFT LoRA file."""
    path = Path(path)
    if path.is_dir():
        return peft.read_peft_adapter(path)
    if path.name in (peft.WEIGHTS, peft.CONFIG):
        return peft.read_peft_adapter(path.parent)
    return visft.read_visft_lora(path)


def scaled(adapter: ChangeT, scale: float) -> ChangeT:
    """The change with `scale` times its effect; any number, also 0 and below. That of an adapter goes into lora_B.

    Raises ValueError for an adapter with magnitudes, whose effect is no multiple of lora_B.
    """
    if scale == 1:
        return adapter
    if isinstance(adapter, TunedWeights):
        return replace(adapter, scale=adapter.scale * scale)
    if adapter.magnitude:
        raise ValueError("an adapter with magnitudes (DoRA) cannot be scaled: its effect is no multiple of lora_B")
    tensors = {name: value * scale if name.endswith("lora_B") else value for name, value in adapter.tensors.items()}
    return replace(adapter, tensors=tensors)


def merge_into_file(
    base: str | Path,
    adapter: Change | None,
    out: str | Path,
    *,
    layout: str = "timm",
    dtype: torch.dtype = torch.float32,
    allow_other_base: bool = False,
    tower: Tower | None = None,
    unmerge: bool = False,
    shard_bytes: int | None = None,
) -> MergeReport:
    """Write base + adapter, or weights that trained themselves in place of the base's, in one of `FORMATS`, tensor by
    tensor; `unmerge`: merged - adapter; without adapter: the base as it is, in another form.

    Peak memory is about two of the largest tensors above the map. The tower is cast to `dtype`; class token, CLIP
    projection and (eva_clip, open_clip) text side are carried over as they are. `tower` adds what the base file does
    not tell (heads, norm placement). `shard_bytes` splits the result where it is larger (see `write_shards`).

    Raises ValueError, before anything is written, for: an existing `out`, a base that has an adapter merged in already
    (`unmerge`: that has none, or another one), an adapter recorded for another base file (unless `allow_other_base`),
    an adapter or a base of another tower, a tower that the library does not have, NaN in the adapter. Raises it, and
    leaves nothing behind, for NaN or infinity in the base and for values that do not fit into `dtype`.
    """
    out = Path(out)
    file, source = open_tower(base)
    found = tower_in(file, source)
    tower = replace(tower or found, class_token=found.class_token)
    check_format(layout, out, tower, sharded=shard_bytes is not None)
    refuse_existing(out)
    check_names(file, source, tower_names(found), found)
    if adapter is not None:
        adapter = adapter.fit(found)
    if unmerge and adapter is not None and (isinstance(adapter, TunedWeights) or adapter.magnitude):
        raise ValueError(
            f"{adapter.describe()}: this cannot be taken out again, what stood in its place is gone; take the base file"
        )
    base_sha256, notes = sha256_file(base), list[str]()
    if adapter is not None:
        base_sha256, notes = check_base(file, adapter, allow_other_base, unmerge)
    blocks, total = tuple(Share() for _ in range(found.depth)), Share()
    merged = _merged(file, source, found, adapter, dtype, -1.0 if unmerge else 1.0, (blocks, total))
    entries = FORMATS[layout].entries(merged, source)
    told = {"tower": tower.to_json(), "lora_merged": "false", "unmerged_from": base_sha256}
    if adapter is None:
        told = _carried(file, source, found, dtype) | {"tower": tower.to_json()}
    elif not unmerge:
        kind = "tuned" if isinstance(adapter, TunedWeights) else "lora"
        told = {
            # Weights that trained themselves are a base like any other.
            "lora_merged": "true" if kind == "lora" else "false",
            BASE_SHA256: base_sha256,
            **recipe_of_base(file),
            kind: json.dumps({**adapter.record(), "sha256": adapter.fingerprint()}),
            "tower": tower.to_json(),
        }
    result = view(merged, entries, told)
    files = _write(result, out, shard_bytes)
    if not found.class_token:
        notes.append("the base has no class token: models that pool by it need class_token=False")
    if layout == "eva_clip" and (missing := eva_clip.missing_parts(entries)):
        notes.append(f"no whole EVA-CLIP: its own code would leave at random {', '.join(missing)}")
    if adapter is not None and not total.wanted:
        notes.append("nothing changes: every lora_B is zero, or what trained is as it was")
    used = {source for entry in entries.values() for source in entry.sources}
    left_out = tuple(name for name in file if name not in used)
    return MergeReport(tower, source.name, base_sha256, result, left_out, blocks, total, tuple(notes), tuple(files))


def _carried(file: WeightFile, source: Layout, tower: Tower, dtype: torch.dtype) -> dict[str, str]:
    """Metadata that a base keeps in another form, with its identity for adapters where no value was rounded."""
    names = ("lora_merged", "base_sha256", "lora", "tuned", "unmerged_from")
    told = {"lora_merged": "false"} | {name: file.metadata[name] for name in names if name in file.metadata}
    own = (source.prefix + name for name in tower_names(replace(tower, class_token=False)))
    exact = all(torch.promote_types(file.dtype(name), dtype) == dtype for name in own)
    return told | ({VISION_OF: base_identity(file)} if exact else {})


def _merged(
    file: WeightFile,
    source: Layout,
    tower: Tower,
    adapter: Change | None,
    dtype: torch.dtype,
    sign: float,
    shares: tuple[tuple[Share, ...], Share],
) -> WeightFile:
    """A view of the base with `sign` times the adapter's change in its weights; what is read counts into `shares`."""
    own = {source.prefix + name for name in tower_names(replace(tower, class_token=False))}
    changed = {source.prefix + name for name in adapter.weights()} if adapter is not None else set()
    blocks, total = shares

    def make(name: str, value: Tensor) -> Tensor:
        if not all_finite(value):
            raise ValueError(f"{file.path}: {name} holds NaN or infinity")
        if name not in changed:
            return cast(value, dtype, name)
        assert adapter is not None
        inner = name[len(source.prefix) :]
        weight = value.float()
        moved, delta = adapter.apply(inner, weight)
        if sign < 0:
            delta = -delta
            moved = weight + delta
        result = cast(moved, dtype, name)
        effective = result.float() - weight  # not in place: fp32 results are `result` itself
        own = [blocks[int(inner.split(".")[1])]] if inner.startswith("blocks.") else []
        for share in (*own, total):
            share.add(effective, delta)
        return result

    entries = {name: Entry.same(file, name) for name in file}
    for name in own:
        entries[name] = Entry((name,), TensorInfo(file.shape(name), dtype), partial(make, name))
    return view(file, entries)


def _write(result: WeightFile, out: Path, shard_bytes: int | None) -> list[Path]:
    infos = result.infos
    with Gauge(f"writing {out.name}", sum(info.nbytes for info in infos.values()) / 1e6, "MB") as gauge:

        def produce(name: str) -> Tensor:
            gauge.add(infos[name].nbytes / 1e6)
            return result.get(name)

        if out.suffix != ".safetensors":
            write_torch(out, infos, produce)
            return [out]
        if shard_bytes is not None:
            return write_shards(out, infos, produce, result.metadata, shard_bytes)
        write_safetensors(out, infos, produce, result.metadata)
        return [out]


def check_base(file: WeightFile, adapter: Change, allow_other: bool, unmerge: bool = False) -> tuple[str, list[str]]:
    """(sha256 of the file, notes); ValueError where the adapter was made for another base.

    `unmerge`: the file has an adapter merged in, which must be this one.
    """
    if is_merged(file) and not unmerge:
        raise ValueError(
            f"{file.path} has an adapter merged in already; merging again would count it twice: give the base file"
        )
    if unmerge and not is_merged(file):
        raise ValueError(
            f"{file.path} does not say that an adapter was merged in (only .safetensors written by this package do): "
            f"nothing to take out. To subtract the adapter all the same, merge it with --scale -1"
        )
    sha256 = sha256_file(file.path)
    base = file.metadata.get(BASE_SHA256) if unmerge else base_identity(file)
    problems = []
    notes = []
    if isinstance(adapter, LoraAdapter) and adapter.base_storage != "full":
        notes.append(f"the adapter was trained over the base stored as {adapter.base_storage}; this is the full one")
    if unmerge:
        merged_in = json.loads(file.metadata.get("lora", "{}")).get("sha256")
        if merged_in is None:
            notes.append("the file does not record which adapter was merged in: not checked")
        elif merged_in != adapter.fingerprint():
            problems.append(
                f"the adapter (with its scale) that was merged in has sha256 {merged_in}, this one "
                f"{adapter.fingerprint()}"
            )
    if adapter.base_sha256 is None:
        notes.append("the adapter does not record which base file it was trained on: not checked")
    elif adapter.base_sha256 != base:
        problems.append(
            f"the adapter was trained on the base with sha256 {adapter.base_sha256}, "
            f"{'the base of this file' if unmerge else 'this file'} has {base}"
        )
    if problems and not allow_other:
        raise ValueError(
            f"{file.path}: {'; '.join(problems)}. Give that one; or, where this one holds the same weights in another "
            f"form, allow it (--allow-other-base)"
        )
    return sha256, [*notes, *(f"allowed: {problem}" for problem in problems)]
