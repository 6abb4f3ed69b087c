"""From raw samples to caption targets."""

from __future__ import annotations

import numpy as np
import pytest

from tests.options import alone
from visft_ds.data.samples import RawSample
from visft_ds.randomness import generator
from visft_ds.tasks.transform import ImageTransform, collate_joint
from visft_ds.tasks.vocabulary import Vocabulary

VOCABULARY = Vocabulary(tuple("abcdef"))  # <unk> 7, <start> 8, <end> 9
LONG = "a " * 51


def raw(*captions: str, image: bool = True, index: int = 0) -> RawSample:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8) if image else None
    return RawSample(index, 100 + index, (5, 9), pixels, (), captions)


def tokens(sample_of: ImageTransform, *captions: str, key: int = 0) -> list[int]:
    return list(sample_of(raw(*captions), generator(key)).targets["captioning"]["tokens"].tolist())


def test_the_caption_belongs_to_the_key() -> None:
    transform = alone("captioning", True, vocabulary=VOCABULARY)
    captions = ("a", "b", "c", "d", "e")
    drawn = [tokens(transform, *captions, key=key)[1] for key in range(200)]
    assert drawn == [tokens(transform, *captions, key=key)[1] for key in range(200)]
    assert set(drawn) == {1, 2, 3, 4, 5}
    # A process without pixels arrives at the same caption.
    blind = [transform(raw(*captions, image=False), generator(key)) for key in range(200)]
    assert [sample.targets["captioning"]["tokens"][1] for sample in blind] == drawn


def test_evaluation_and_fixed_captions_draw_nothing() -> None:
    for train, choice in ((False, "random"), (False, "first"), (True, "first")):
        transform, random = (
            alone("captioning", train, vocabulary=VOCABULARY, caption_choice=choice),
            generator(3),
        )
        sample = transform(raw("...", "b c", "d", "d e"), random)
        assert sample.targets["captioning"]["tokens"].tolist() == [8, 2, 3, 9]
        assert random.integers(1 << 60) == generator(3).integers(1 << 60)


def test_long_and_wordless_captions_are_never_drawn() -> None:
    transform = alone("captioning", True, vocabulary=VOCABULARY)
    captions = (LONG, "a " * 500, "", "!?", "\U0001f600", "b zebra", "c " * 50)
    drawn = {tuple(tokens(transform, *captions, key=key)) for key in range(60)}
    assert drawn == {(8, 2, 7, 9), (8, *[3] * 50, 9)}
    assert tokens(alone("captioning", True, vocabulary=VOCABULARY, max_words=51), LONG) == [8, *[1] * 51, 9]


@pytest.mark.parametrize("captions", [(), ("",), ("?!", LONG)])
def test_without_a_usable_caption_there_is_nothing_to_learn(captions: tuple[str, ...]) -> None:
    transform = alone("captioning", True, vocabulary=VOCABULARY, size=14)
    batch = collate_joint([transform(raw(*captions), generator(0))])
    targets = batch.targets["captioning"]
    assert targets.lengths.tolist() == [1]  # never 0
    assert targets.tokens.tolist() == [[8, 0]]  # two ids, so that the head has a step to make
    assert targets.references == (captions,)
