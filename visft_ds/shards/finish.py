"""The last step of a conversion: index and manifest are written, everything is reported."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from visft_ds.data.shards import INDEX_DTYPE, Manifest, ShardFile, fingerprint, index_path
from visft_ds.names import shown_name
from visft_ds.shards.outputs import Output
from visft_ds.shards.shard_writer import Planned
from visft_ds.shards.source import CocoSource, SourceImage
from visft_ds.tasks.vocabulary import caption_words

_DETAILS = 8  # why images were left out: so many are shown, all are in the manifest


@dataclass(frozen=True)
class BuildReport:
    """Result of a build, or its forecast (`dry_run`)."""

    split: str
    out: str
    dry_run: bool
    shards: int
    shards_kept: int
    bytes: int
    counts: Mapping[str, int]
    findings: Sequence[Mapping[str, Any]]
    quarantine: Sequence[Mapping[str, Any]]
    fingerprint: str | None


def write_manifest(
    output: Output,
    split: str,
    options: Mapping[str, Any],
    source: CocoSource,
    records: Sequence[Mapping[str, Any]],
    quarantine: Sequence[Mapping[str, Any]],
    *,
    out: str,
    kept: int,
) -> BuildReport:
    """Write index and manifest.

    Args:
        output, out: where the shards are; its name for the report.
        split: name of the split.
        options: as the manifest records them.
        source: the annotations; its findings are completed.
        records: of all shards in order.
        quarantine: all images that were left out as unusable.
        kept: number of shards that an earlier build had finished, for the report.

    Raises:
        ValueError: no usable image.
    """
    rows = [(number, *row) for number, record in enumerate(records) for row in record["rows"]]
    if not rows:
        raise ValueError(f"no image of the data set is usable: {'; '.join(left_out(quarantine))}")
    index = np.array(rows, dtype=INDEX_DTYPE)
    for record in records:
        source.findings.extend(record["findings"])
    source.findings.extend(_quarantined(quarantine))
    chosen = set(index["image_id"].tolist())
    images = [image for image in source.images if image.image_id in chosen]
    counts = {**_counts(images), "quarantined": len(quarantine)}
    shards = [ShardFile(r["name"], r["count"], r["bytes"], r["sha256"]) for r in records]
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=False)
    manifest = Manifest(
        root=Path(out),
        split=split,
        categories=tuple(source.categories),
        counts=counts,
        shards=tuple(shards),
        vocabulary=_vocabulary(images),
        left_out=[(bad["file_name"], f"{bad['reason']} ({bad['detail']})") for bad in quarantine],
        findings={each["kind"]: (each["count"], each["examples"]) for each in source.findings.listed()},
        options=options,
        sources=source.files,
        fingerprint=fingerprint(source.categories, index),
        index_sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
    )
    output.write(index_path(Path(), split).name, buffer.getvalue())
    manifest.save()
    return BuildReport(
        split=split,
        out=out,
        dry_run=False,
        shards=len(shards),
        shards_kept=kept,
        bytes=sum(shard.bytes for shard in shards),
        counts=counts,
        findings=source.findings.listed(),
        quarantine=quarantine,
        fingerprint=manifest.fingerprint,
    )


def dry_report(
    split: str, out: str, source: CocoSource, plan: Sequence[Sequence[Planned]], quarantine: Sequence[Mapping[str, Any]]
) -> BuildReport:
    """Forecast of a build from the JSON files and the sizes of the image files.

    `bytes` is that of images and labels, without tar headers and padding. The findings of `source` are completed.
    """
    source.findings.extend(_quarantined(quarantine))
    samples = [sample for shard in plan for sample in shard]
    return BuildReport(
        split=split,
        out=out,
        dry_run=True,
        shards=len(plan),
        shards_kept=0,
        bytes=sum(sample.size + len(sample.image.label) for sample in samples),
        counts={**_counts([sample.image for sample in samples]), "quarantined": len(quarantine)},
        findings=source.findings.listed(),
        quarantine=quarantine,
        fingerprint=None,
    )


def _quarantined(quarantine: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for bad in quarantine:
        yield "quarantined", f"{shown_name(bad['file_name'])}: {bad['reason']} ({bad['detail']})"


def left_out(quarantine: Sequence[Mapping[str, Any]]) -> list[str]:
    """Reasons why images were left out, a line for each of the most frequent details with an example."""
    first = {(bad["reason"], bad["detail"]): bad["file_name"] for bad in reversed(quarantine)}
    counts = Counter((bad["reason"], bad["detail"]) for bad in quarantine).most_common(_DETAILS)
    lines = [f"{count} x {why[0]} ({why[1]}), for instance {shown_name(first[why])}" for why, count in counts]
    rest = len(quarantine) - sum(count for _, count in counts)
    return [*lines, f"{rest} for other reasons"] if rest else lines


def _counts(images: Sequence[SourceImage]) -> dict[str, int]:
    return {
        "images": len(images),
        "annotations": sum(image.annotations for image in images),
        "crowds": sum(image.crowds for image in images),
        "trainable": sum(image.trainable for image in images),
        "captions": sum(len(image.captions) for image in images),
        "images_without_trainable": sum(image.trainable == 0 for image in images),
        "images_without_captions": sum(not image.captions for image in images),
        "empty": sum(not image.annotations and not image.captions for image in images),
    }


def _vocabulary(images: Sequence[SourceImage]) -> dict[str, int]:
    return dict(Counter(word for image in images for caption in image.captions for word in caption_words(caption)))
