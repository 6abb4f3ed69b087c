"""Pictures of captions: what stands where, and that the glow lies where the attention is."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from visft_ds.tasks.captioning.pictures import draw_caption
from visft_ds.tasks.pictures import Picture, split_panels

TITLE = 26  # pixels
SMALL = (448 - 3 * 6) // 4  # width of a small picture at the usual size


def _gray(height: int, width: int) -> Picture:
    return np.full((height, width, 3), 128, dtype=np.uint8)


def _attention(*cells: tuple[int, int], grid: int = 4) -> npt.NDArray[np.float32]:
    """All weight of each word on one cell (row, column)."""
    attention = np.zeros((len(cells), grid, grid), dtype=np.float32)
    for word, cell in enumerate(cells):
        attention[(word, *cell)] = 1
    return attention


def _written(picture: Picture) -> npt.NDArray[np.bool_]:
    """Rows with anything on the paper."""
    return (picture != picture[-1, -1]).any(axis=(1, 2))


def test_image_on_both_sides_captions_below() -> None:
    truth, prediction = split_panels(draw_caption(_gray(100, 200), ["a cat", "two cats"], "a dog", ["a", "dog"], None))
    assert truth.shape == prediction.shape and truth.shape[1] == 448
    for panel, lines in ((truth, 2), (prediction, 1)):
        assert (panel[TITLE : TITLE + 224] == 128).all()
        below = _written(panel[TITLE + 224 :]).astype(int)
        assert (np.diff(below) == 1).sum() == lines
    assert not np.array_equal(truth[TITLE + 224 :], prediction[TITLE + 224 :])


def test_three_references_at_most() -> None:
    def truth(count: int) -> Picture:
        return split_panels(draw_caption(_gray(10, 10), ["a cat"] * count, "", [], None))[0]

    assert truth(2).shape < truth(3).shape == truth(5).shape
    # the title says that there are more
    assert not np.array_equal(truth(3)[:TITLE], truth(5)[:TITLE])
    assert np.array_equal(truth(3)[TITLE:], truth(5)[TITLE:])


@pytest.mark.parametrize("shape", [(100, 200), (200, 100)])
def test_glow_where_the_head_looked(shape: tuple[int, int]) -> None:
    """Cells of the grid cover the whole image, whatever its shape; one small picture for each word."""
    cells = [(0, 0), (3, 3), (0, 3)]
    words = ["one", "two", "three"]
    picture = draw_caption(_gray(*shape), ["a"], "one two three", words, _attention(*cells))
    without = draw_caption(_gray(*shape), ["a"], "one two three", words, None)
    _, prediction = split_panels(picture)
    height, width = (SMALL // 2, SMALL) if shape[0] < shape[1] else (SMALL, SMALL // 2)
    top = without.shape[0]  # small pictures begin below everything else
    for place, (row, column) in enumerate(cells):
        left = place * (SMALL + 6)
        small = prediction[top : top + height, left : left + width].astype(int)
        glow = small[..., 0] - small[..., 2]  # red to yellow against blue; gray elsewhere
        y, x = np.unravel_index(glow.argmax(), glow.shape)
        assert (y * 4 // height, x * 4 // width) == (row, column)
        assert glow.max() > 80 and glow[height // 2, width // 2] < 10
    # nothing behind the last word
    assert not _written(prediction[top:, 3 * (SMALL + 6) :]).any()


def test_even_attention_glows_less_than_a_peak() -> None:
    """Where the head looked everywhere alike, no place may look chosen, by noise least of all."""
    noise = np.random.default_rng(0).uniform(0.99, 1.01, (1, 4, 4)).astype(np.float32) / 16

    def strongest(attention: npt.NDArray[np.float32]) -> int:
        picture = draw_caption(_gray(64, 64), [], "a", ["a"], attention).astype(int)
        return int(np.abs(picture[..., 0] - picture[..., 2]).max())

    assert strongest(noise) < strongest(_attention((1, 1))) / 2
    # no attention at all is no division by zero; the paper and title have a little colour of their own
    assert strongest(np.zeros((1, 4, 4), dtype=np.float32)) < 10


def test_twelve_small_pictures_then_a_count() -> None:
    def height(count: int) -> int:
        return draw_caption(_gray(50, 50), [], "", ["w"] * count, _attention(*[(0, 0)] * count)).shape[0]

    row = SMALL + 20 + 6
    assert [height(n) - height(0) for n in (1, 4, 5, 12)] == [row, row, 2 * row, 3 * row]
    assert height(13) == height(50) == height(12) + 20 + 6


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (4000, 6000)])
def test_any_size(size: tuple[int, int]) -> None:
    picture = draw_caption(_gray(*size), ["a cat"] * 5, "a cat", ["a", "cat"], _attention((0, 0), (1, 1)), side=300)
    truth, prediction = split_panels(picture)
    assert truth.shape == prediction.shape and picture.dtype == np.uint8


@pytest.mark.parametrize(
    "caption",
    ["", " \n ", "word " * 50, "word " * 500, "x" * 1000, "a\nb\tc\x00d", "a " + "y" * 200 + " b"],
    ids=["empty", "blank", "50 words", "500 words", "long word", "control characters", "long word between"],
)
def test_any_caption(caption: str) -> None:
    """Text stays in its panel, and the picture does not grow with it beyond measure."""
    words = caption.split()
    picture = draw_caption(_gray(40, 80), [caption] * 3, caption, words, _attention(*[(0, 0)] * len(words)))
    truth, prediction = split_panels(picture)
    paper = prediction[-1, -1]
    # a line that ran over the right edge would be cut off inside a letter; letters of a full line end before it
    assert (truth[TITLE + 224 :, -1] == paper).all() and (prediction[-30:, -1] == paper).all()
    assert picture.shape[0] < 1100 and (picture[:, 448:460] == paper).all()


def test_empty_caption_and_no_references_say_so() -> None:
    truth, prediction = split_panels(draw_caption(_gray(40, 80), [], "", [], np.zeros((0, 4, 4))))
    assert _written(truth[TITLE + 224 :]).any() and _written(prediction[TITLE + 224 :]).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5])
def test_impossible_attention(value: float) -> None:
    attention = _attention((0, 0))
    attention[0, 1, 1] = value
    with pytest.raises(ValueError, match="negative or not finite"):
        draw_caption(_gray(10, 10), [], "cat", ["cat"], attention)
