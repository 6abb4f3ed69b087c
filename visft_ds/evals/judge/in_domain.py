"""Were models trained on the images that they are judged on? By what runs record and shards hold; nothing is
guessed.

A run names its shards, whose index has size and crc32 of each image; an image that is judged is one of those
if both are equal. Models without a run, shards that are gone or behind a URL, and images that were stored
anew are not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

from visft_ds.config.record import recorded_config
from visft_ds.data.fetch import is_url
from visft_ds.data.shards import Manifest, manifest_path
from visft_ds.evals.judge.benchmark import Benchmark, ImageSet
from visft_ds.evals.judge.model_text import ModelSpec
from visft_ds.run_files import run_around


def trained_on(models: Sequence[ModelSpec], benchmarks: Sequence[Benchmark]) -> list[str]:
    """`segmentation/coco (150 of 181 of train, 0 of 20 of test)` for each data set with images that one of
    the models was trained on.
    """
    shards = {location for spec in models for location in _shards_of(spec)}
    known: set[tuple[int, int]] = set()
    for root, split in shards:
        if not is_url(root) and manifest_path(Path(root), split).is_file():
            known.update(Manifest.load(root, split).index[["image_size", "image_crc32"]].tolist())
    if not known:
        return []
    in_domain = []
    for benchmark in benchmarks:
        sets = benchmark.sets_for(has_text=False)  # others are the same images once more
        counts = {name: _count(images, known) for name, images in sets.items()}
        if any(counts.values()):
            parts = [f"{count} of {len(sets[name])} of {name}" for name, count in counts.items()]
            in_domain.append(f"{benchmark.label} ({', '.join(parts)})")
    return in_domain


def _shards_of(spec: ModelSpec) -> list[tuple[str, str]]:
    """(folder or URL, split) of the shards that a model's backbone was trained on, if a run says so."""
    run = run_around(spec.adapter or Path(spec.name))
    if run is None:
        return []
    config = recorded_config(run).visft
    return [] if config.stage == 1 else [(entry.root, entry.split) for entry in config.data.training_sets()]


def _count(images: ImageSet, known: set[tuple[int, int]]) -> int:
    """Number of the images that are known by (bytes, crc32)."""
    sizes = {size for size, _ in known}
    count = 0
    for stored in images.stored:
        if isinstance(stored, Path):
            size = stored.stat().st_size
            if size not in sizes:  # which spares reading it
                continue
            stored = size, crc32(stored.read_bytes())
        count += stored in known
    return count
