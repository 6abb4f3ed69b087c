"""Captions that do not fit their pictures, by what a captioner thinks of them beside other pictures.

Letters: B pictures, n captions, T ids of a caption, S = T - 1 steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from visft_ds import distributed
from visft_ds.data.dataset import read_raw
from visft_ds.data.samples import RawSample
from visft_ds.data.shards import ShardReader
from visft_ds.evals.labels.doubts import Doubt
from visft_ds.monitor.console import gauge
from visft_ds.ops import DTYPES
from visft_ds.predict.loading import LoadedModel, source_of
from visft_ds.prepare.model import choose_precision
from visft_ds.randomness import generator
from visft_ds.settings.task_schema import Stream
from visft_ds.tasks.transform import pipeline_of
from visft_ds.tasks.vocabulary import caption_words

_PICTURES = 8  # at least, in each of which the captions of all are tried


def caption_doubts(run: Path, reader: ShardReader, indices: Sequence[int]) -> list[Doubt]:
    """A doubt for each caption, the highest score first.

    The score is p(others) / (p(own) + p(others)): the probability of the caption by the captioner for its own
    picture, and the mean of those for others of the split. Below 0.5 it fits its own better.
    """
    source = source_of(run, tasks="captioning")
    device = distributed.local_device()
    precision, _ = choose_precision(source.precision, device)
    model, streams = source.build(precision, device)
    (stream,) = streams.values()
    doubts = list[Doubt]()
    with gauge("looking at captions", len(indices), "images") as bar:
        for part in np.array_split(indices, max(1, len(indices) // _PICTURES)):
            samples = [read_raw(reader, int(index)) for index in part]
            doubts += _doubts_of_pictures(model, stream, samples)
            bar.update(len(samples))
    return sorted(doubts, key=lambda doubt: -doubt.score)


def _doubts_of_pictures(model: LoadedModel, stream: Stream, samples: Sequence[RawSample]) -> list[Doubt]:
    """The doubts about the captions of some pictures, each of which is tried in all of them."""
    owners = list[int]()
    captions = list[str]()
    for number, sample in enumerate(samples):
        usable = [caption for caption in sample.captions if caption_words(caption)]
        owners += [number] * len(usable)
        captions += usable
    if not captions or len(samples) < 2:
        return []
    fits = _log_likelihoods(model, stream, samples, captions)
    own = fits[torch.arange(len(captions)), owners]
    fits[torch.arange(len(captions)), owners] = -math.inf
    others = fits.logsumexp(dim=1) - math.log(len(samples) - 1)
    scores = torch.sigmoid(others - own).tolist()
    return [
        Doubt("caption", score, samples[owner].image_id, {"caption": caption}, None)
        for caption, owner, score in zip(captions, owners, scores, strict=True)
    ]


@torch.no_grad()
def _log_likelihoods(
    model: LoadedModel, stream: Stream, samples: Sequence[RawSample], captions: Sequence[str]
) -> Tensor:
    """(n, B) logarithms of the probability of each caption for each picture."""
    assert model.vocabulary is not None
    ids = [torch.tensor(model.vocabulary.encode(caption_words(caption))) for caption in captions]
    lengths = torch.tensor([len(of_caption) for of_caption in ids], device=model.device)
    tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(model.device)  # (n, T)
    steps = torch.arange(1, tokens.shape[1], device=model.device)
    inside = steps < lengths[:, None]  # (n, S)
    pipeline = pipeline_of(stream, model.vocabulary, train=False)
    columns = []
    with torch.autocast(model.device.type, DTYPES[model.precision], enabled=model.precision != "fp32"):
        for sample in samples:
            batch = pipeline.collate([pipeline.transform(sample, generator(0))])
            repeated = []
            for map_ in model.module.features(batch.to(model.device)):
                features = map_.features.expand(len(captions), -1, -1, -1)
                valid = map_.valid.expand(len(captions), -1, -1)
                repeated.append(replace(map_, features=features, valid=valid))
            scores = model.module.heads["captioning"](repeated, tokens, lengths).scores
            of_words = scores.log_softmax(dim=-1).gather(2, tokens[:, 1:, None])[..., 0]
            columns.append((of_words * inside).sum(dim=1).double().cpu())
    return torch.stack(columns, dim=1)
