"""Encode with every model, then score: two phases, so that no process waits while the main one fits a probe."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visft_ds.config.fields import StrictModel
from visft_ds.config.records import as_record
from visft_ds.config.schema import Precision
from visft_ds.evals.benchmarks.cache import Stored, key_of, load_record
from visft_ds.evals.benchmarks.encoders import Encoder
from visft_ds.evals.benchmarks.encoding import Worker, encode_texts, encode_together
from visft_ds.evals.benchmarks.models import LoadOptions, ModelSpec, identity, load_encoder
from visft_ds.evals.benchmarks.protocol import Benchmark, Features, Score
from visft_ds.evals.benchmarks.retention import FIRST, AnswersKept, load_classifier
from visft_ds.evals.benchmarks.scales import Scales
from visft_ds.evals.model import adapter_for
from visft_ds.interop.writing import save_tensors
from visft_ds.parallel import distributed

_AGAIN = " Remove that file: it is made again."


class ScoreEntry(StrictModel):
    """Score in a file of the cache; its numbers are tensors beside."""

    name: str
    said: list[str]
    shows: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Encoded:
    """Cached features of a benchmark by a model."""

    images: Mapping[str, Stored]
    texts: Stored | None


@dataclass(frozen=True)
class Dose:
    """Distance that features moved: without any, a gain says nothing."""

    kind: str  #: of the features, see `encoders`
    change: float  #: |f - f0| / |f0 - mean of f0|, the mean of each channel
    cosine: float  #: mean over images and places


@dataclass(frozen=True)
class Settings:
    """Settings of encoding."""

    device: torch.device
    precision: Precision
    cache: Path
    batch_size: int
    threads: int
    load: LoadOptions


def encode_all(
    specs: Sequence[ModelSpec],
    benchmarks: Sequence[Benchmark],
    settings: Settings,
    tell: Callable[[str, Mapping[str, str]], None],
) -> dict[str, list[Encoded]]:
    """Model -> what it made of each benchmark. Collective; one model is in memory at a time.

    Args:
        tell: called with the label and the facts of each model as it is loaded.

    Raises:
        ValueError: a model that lacks what a benchmark is about, or whatever is wrong with its files.
    """
    groups: dict[str, list[ModelSpec]] = {}
    for spec in specs:
        alike = replace(spec, label="", scale=1.0, adapter=None, trained=None) if spec.adapter else spec
        groups.setdefault(repr((alike, _form(spec))), []).append(spec)
    found: dict[str, list[Encoded]] = {}
    for group in groups.values():
        found |= _encode_with(group, specs[0], benchmarks, settings, tell)
    return {spec.label: found[spec.label] for spec in specs}


def _form(spec: ModelSpec) -> Any:
    """Shape of a model's adapter: those that are alike in it can take turns in one module."""
    if spec.adapter is None:
        return None
    adapter = adapter_for(Path(spec.name), spec.adapter)
    return adapter.describe(), adapter.until, [(name, tuple(value.shape)) for name, value in adapter.tensors.items()]


def _encode_with(
    group: Sequence[ModelSpec],
    first: ModelSpec,
    benchmarks: Sequence[Benchmark],
    settings: Settings,
    tell: Callable[[str, Mapping[str, str]], None],
) -> dict[str, list[Encoded]]:
    """Features of models that differ by their adapter alone, of each benchmark."""
    encoder, label = load_encoder(group[0], settings.load), group[0].label
    for benchmark in benchmarks:
        if benchmark.needs_text and encoder.text is None:
            raise ValueError(
                f"{label} has no text side, which {benchmark.label} compares with. A backbone of ours takes it "
                f"from its own file or from --text FILE, the EVA-CLIP or open_clip file that its base came from, and "
                f"needs a class token and a CLIP projection for it"
            )
    for spec in group:
        adapter = encoder.facts.get("adapter", "").removeprefix(f"{group[0].adapter}").rpartition(", times ")[0]
        told = {"adapter": f"{spec.adapter}{adapter}, times {spec.scale:g}"} if adapter else {}
        tell(spec.label, {**encoder.facts, **told})
    workers: dict[bool, list[Worker]] = {}
    found: list[list[Encoded]] = []
    for benchmark in benchmarks:
        whole = isinstance(benchmark, AnswersKept)
        if whole not in workers:
            workers[whole] = _workers(load_classifier(group[0], first) if whole else encoder, group, settings)
        found.append(encode(workers[whole], benchmark))
    return {spec.label: [of[place] for of in found] for place, spec in enumerate(group)}


def _workers(encoder: Encoder, group: Sequence[ModelSpec], settings: Settings) -> list[Worker]:
    scales = Scales(encoder.module, [tensors_of(spec) for spec in group]) if len(group) > 1 else None
    workers = []
    for number, spec in enumerate(group):
        before = None if scales is None else partial(scales.use, number)
        if before is not None:
            before()
        workers.append(replace(worker_of(encoder, spec.label, settings), before=before))
    return workers


def tensors_of(spec: ModelSpec) -> Mapping[str, Tensor]:
    """The adapter of a model, times its scale."""
    assert spec.adapter is not None
    return adapter_for(Path(spec.name), spec.adapter).scaled(spec.scale).tensors


def worker_of(encoder: Encoder, label: str, settings: Settings) -> Worker:
    """Hash a model on the main process, and move it to the device of each. Collective."""
    hashes = None
    if distributed.is_main():
        hashes = (identity(encoder.module), None if encoder.text is None else identity(encoder.text.module))
    images, texts = distributed.broadcast_object(hashes)
    encoder.module.to(settings.device)
    if encoder.text is not None:
        encoder = replace(encoder, text=replace(encoder.text, module=encoder.text.module.to(settings.device)))
    given = settings.device, settings.precision, settings.cache, settings.batch_size, settings.threads
    return Worker(encoder, *given, label, images, texts)


def encode(workers: Sequence[Worker], benchmark: Benchmark) -> list[Encoded]:
    """Features of a benchmark by several models that take the same images. Collective."""
    encoder = workers[0].encoder
    having = {*encoder.kinds, *(["columns"] if "patches" in encoder.kinds else [])}
    kinds = [kind for kind in benchmark.kinds if kind in having]
    if not kinds:
        raise ValueError(f"{benchmark.label} needs {' or '.join(benchmark.kinds)}, which the model does not have")
    with_texts = benchmark.texts and encoder.text is not None
    texts = [encode_texts(worker, benchmark.texts) if with_texts else None for worker in workers]
    sets = {
        name: encode_together(workers, images, kinds, f"{benchmark.label} {name}")
        for name, images in benchmark.sets.items()
    }
    return [Encoded({name: of[place] for name, of in sets.items()}, text) for place, text in enumerate(texts)]


def score(benchmark: Benchmark, encoded: Encoded, first: Encoded, cache: Path) -> dict[str, Score]:
    """Name -> score of one model, out of the cache where it is there. For one process."""
    images = {**encoded.images, **({FIRST: first.images["test"]} if isinstance(benchmark, AnswersKept) else {})}
    what = {
        "features": {name: stored.what for name, stored in images.items()},
        "texts": None if encoded.texts is None else encoded.texts.what,
        "settings": benchmark.settings,
    }
    path = cache / "scores" / f"{key_of(what)}.safetensors"
    record = load_record(path)
    if record is None:
        texts = None if encoded.texts is None else encoded.texts.read()["texts"]
        features = Features({name: stored.read() for name, stored in images.items()}, texts)
        found = list(benchmark.scores(features))
        assert found and all(np.isfinite(score.values).all() and len(score.values) for score in found), benchmark.label
        _save(path, found)
        record = load_record(path)
        assert record is not None
    return {f"{benchmark.label} {score.name}": score for score in _restored(*record)}


def dose(base: Encoded, other: Encoded) -> Dose | None:
    """Distance of the features of a benchmark's test images from the first model's. For one process.

    None where the two have features of other shapes.
    """
    name = "test" if "test" in base.images else next(iter(base.images))
    of_base, of_other = base.images[name].read(), other.images[name].read()
    kind = next((one for one in ("patches", "pooled", "clip") if one in of_base and one in of_other), None)
    if kind is None or of_base[kind].shape != of_other[kind].shape:
        return None
    old, new = of_base[kind], of_other[kind]
    return Dose(kind, moved(old, new), float(torch.nn.functional.cosine_similarity(new, old, dim=1).mean()))


def moved(old: Tensor, new: Tensor) -> float:
    """|f - f0| / |f0 - mean of f0| of features (n, D, ...), the mean of each channel."""
    mean = old.mean(dim=[place for place in range(old.ndim) if place != 1], keepdim=True)
    return float((new - old).norm() / (old - mean).norm().clamp(min=1e-12))


def _save(path: Path, scores: Sequence[Score]) -> None:
    tensors: dict[str, Tensor] = {}
    rest: list[dict[str, Any]] = []
    for number, s in enumerate(scores):
        tensors[f"{number}.values"] = torch.from_numpy(s.values)
        if s.groups is not None:
            tensors[f"{number}.groups"] = torch.from_numpy(s.groups)
        if s.maps is not None:
            tensors[f"{number}.maps"] = torch.from_numpy(s.maps)
        rest.append({"name": s.name, "said": list(s.said), "shows": s.shows, "settings": dict(s.settings)})
    save_tensors(path, tensors, {"scores": json.dumps(rest)}, overwrite=True)


def _restored(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> list[Score]:
    told = as_record(texts.get("scores", ""), list[ScoreEntry], "scores of the cache", _AGAIN)
    if not {f"{number}.values" for number in range(len(told))} <= tensors.keys():
        raise ValueError(f"scores of the cache lack their values.{_AGAIN}")
    scores = []
    for number, rest in enumerate(told):
        values = tensors[f"{number}.values"].numpy()
        groups, maps = (
            tensors[key].numpy() if key in tensors else None for key in (f"{number}.groups", f"{number}.maps")
        )
        scores.append(Score(rest.name, values, groups, rest.said, rest.shows, rest.settings, maps))
    return scores


def check_same_everywhere(benchmarks: Sequence[Benchmark]) -> None:
    """Raise RanksDiffer where the processes do not see the same data."""
    distributed.assert_same_on_all_ranks(
        {
            f"{benchmark.label}, {name}": f"{images.fingerprint[:12]} ({len(images)} images)"
            for benchmark in benchmarks
            for name, images in benchmark.sets.items()
        }
    )
