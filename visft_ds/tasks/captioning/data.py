"""Captions of a sample: which one a head learns from, as ids, and all of them as references.

Letters: B images, T caption length in ids, `<start>` and `<end>` included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from visft_ds.data.samples import Arrays, RawSample, Targets
from visft_ds.data.transforms import Op
from visft_ds.tasks.vocabulary import Vocabulary, caption_words


@dataclass(frozen=True)
class CaptionTargets(Targets):
    """A caption per image, and all its reference captions.

    An image without a caption that can be learned has length 1 (`<start>` alone): nothing is to be predicted
    for it, and it counts neither as a caption nor as tokens.
    """

    tokens: Tensor  #: (B, T) int64, `<start> word ... <end>`, filled up with 0; T is at least 2
    lengths: Tensor  #: (B,) int64, ids of each caption, `<start>` and `<end>` included; at least 1
    references: tuple[tuple[str, ...], ...]  #: the captions of each image as stored
    host: ClassVar = ("references",)
    head_inputs: ClassVar = {"captions": "tokens", "lengths": "lengths"}


def caption_targets(
    words: Vocabulary,
    random: bool,
    most: int,
    raw: RawSample,
    ops: Sequence[Op],
    generator: np.random.Generator,
) -> Arrays:
    """Ids (T,) int64 of one of the captions, and all of them as they are (captions,) str objects.

    The caption is one of those with 1 to `most` words: one that is drawn from `generator` if `random`, else
    the first. If an image has none, no caption is given (see `CaptionTargets`), never an empty or a cut one.
    """
    cut = [caption_words(caption) for caption in raw.captions]
    usable = [caption for caption in cut if 1 <= len(caption) <= most]
    tokens = words.encode([])[:1]
    if usable:
        tokens = words.encode(usable[int(generator.integers(0, len(usable))) if random else 0])
    references = np.array(list(raw.captions), dtype=object)
    return {"tokens": np.array(tokens, dtype=np.int64), "references": references}
