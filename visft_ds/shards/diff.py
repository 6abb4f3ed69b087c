"""What differs between two splits, from their manifests and indices; only labels that differ are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from visft_ds.data.labels import parse_label
from visft_ds.data.manifest import Manifest
from visft_ds.data.shards import ShardReader

_PIXELS = ("image_size", "image_crc32")
_LABELS = ("label_size", "label_crc32")


@dataclass(frozen=True)
class LabelChange:
    """How the labels of an image differ: ids of annotations, texts of captions, names of other fields."""

    image_id: int
    annotations_added: tuple[int, ...]
    annotations_removed: tuple[int, ...]
    annotations_changed: Mapping[int, tuple[str, ...]]  #: id -> which of its fields
    captions_added: tuple[str, ...]
    captions_removed: tuple[str, ...]
    fields_changed: tuple[str, ...]
    reordered: bool  #: annotations or captions are the same in another order, or only written otherwise


@dataclass(frozen=True)
class SplitDifference:
    """What the second split has otherwise than the first."""

    options: Mapping[str, tuple[Any, Any]]  #: name -> (first, second); tells of the making, not of the content
    categories_added: tuple[tuple[int, str], ...]  #: raw id and name
    categories_removed: tuple[tuple[int, str], ...]
    counts: Mapping[str, tuple[int, int]]
    only_first: tuple[int, ...]  #: image ids
    only_second: tuple[int, ...]
    pixels: tuple[int, ...]  #: image ids whose image files differ
    labels: tuple[LabelChange, ...]
    order: bool  #: the samples that both have come in another order
    shards: bool  #: the samples are cut into shards otherwise

    @property
    def same_content(self) -> bool:
        """Whether training on either is the same: options and the cutting into shards do not matter."""
        parts = (self.categories_added, self.categories_removed, self.only_first, self.only_second, self.pixels)
        return not (any(parts) or self.labels or self.order)


def diff(first: Manifest, second: Manifest) -> SplitDifference:
    """Compare two splits. Raises ValueError where a label that must be read is damaged."""
    tables = [{(one.coco_id, one.name) for one in manifest.categories} for manifest in (first, second)]
    a, b = _shared_rows(first, second)
    pixels = _differing(a, b, _PIXELS)
    labels = np.flatnonzero(_differing(a, b, _LABELS))
    kinds = sorted(first.counts.keys() | second.counts.keys())
    counts = {kind: (first.counts.get(kind, 0), second.counts.get(kind, 0)) for kind in kinds}
    one, other = first.index["image_id"], second.index["image_id"]
    return SplitDifference(
        options=_differing_options(first.options, second.options),
        categories_added=tuple(sorted(tables[1] - tables[0])),
        categories_removed=tuple(sorted(tables[0] - tables[1])),
        counts={kind: pair for kind, pair in counts.items() if pair[0] != pair[1]},
        only_first=tuple(np.setdiff1d(one, other).tolist()),
        only_second=tuple(np.setdiff1d(other, one).tolist()),
        pixels=tuple(a["image_id"][pixels].tolist()),
        labels=tuple(_label_changes(first, second, a["image_id"][labels].tolist())),
        order=not np.array_equal(one[np.isin(one, other)], other[np.isin(other, one)]),
        shards=[shard.count for shard in first.shards] != [shard.count for shard in second.shards],
    )


def report(difference: SplitDifference) -> dict[str, Any]:
    """The difference as plain data, for JSON."""
    return {**asdict(difference), "same_content": difference.same_content}


def _differing_options(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = sorted(first.keys() | second.keys())
    return {name: (first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)}


def _shared_rows(first: Manifest, second: Manifest) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The index rows of images that both have, by ascending image id."""
    rows = []
    for manifest in (first, second):
        ids, places = np.unique(manifest.index["image_id"], return_index=True)
        rows.append((ids, manifest.index[places]))
    (first_ids, first_rows), (second_ids, second_rows) = rows
    return first_rows[np.isin(first_ids, second_ids)], second_rows[np.isin(second_ids, first_ids)]


def _differing(first: npt.NDArray[Any], second: npt.NDArray[Any], columns: tuple[str, ...]) -> npt.NDArray[np.bool_]:
    differing: npt.NDArray[np.bool_] = np.any([first[column] != second[column] for column in columns], axis=0)
    return differing


def _label_changes(first: Manifest, second: Manifest, image_ids: list[int]) -> Iterator[LabelChange]:
    wanted = np.array(image_ids, dtype=np.int64)
    places = []
    for manifest in (first, second):
        order = np.argsort(manifest.index["image_id"])
        places.append(order[np.searchsorted(manifest.index["image_id"], wanted, sorter=order)].tolist())
    with ShardReader(first) as one, ShardReader(second) as other:
        for image_id, before, after in zip(image_ids, *places, strict=True):
            pairs = ((one, before), (other, after))
            labels = [parse_label(reader.read(index, "labels")[1] or b"") for reader, index in pairs]
            yield _label_change(image_id, *labels)


def _label_change(image_id: int, first: Mapping[str, Any], second: Mapping[str, Any]) -> LabelChange:
    before, after = ({one["id"]: one for one in label["annotations"]} for label in (first, second))
    captions = [Counter(label["captions"]) for label in (first, second)]
    changed = {
        number: tuple(
            name for name in sorted(old.keys() | after[number].keys()) if old.get(name) != after[number].get(name)
        )
        for number, old in before.items()
        if number in after and old != after[number]
    }
    change = LabelChange(
        image_id=image_id,
        annotations_added=tuple(sorted(after.keys() - before.keys())),
        annotations_removed=tuple(sorted(before.keys() - after.keys())),
        annotations_changed=changed,
        captions_added=tuple((captions[1] - captions[0]).elements()),
        captions_removed=tuple((captions[0] - captions[1]).elements()),
        fields_changed=tuple(
            name
            for name in sorted((first.keys() | second.keys()) - {"annotations", "captions"})
            if first.get(name) != second.get(name)
        ),
        reordered=False,
    )
    nothing = not any(getattr(change, name) for name in asdict(change) if name != "image_id")
    return LabelChange(**{**vars(change), "reordered": nothing})
