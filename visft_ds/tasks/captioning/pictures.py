"""Pictures of generated captions next to the true ones, with the attention for each word.

One small copy of the image per word shows the attention weights, as figure 2 of "Show, Attend and Tell"
(arXiv 1502.03044) does. The weights lie on a grid over the whole image, whatever its shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from visft_ds.tasks.pictures import INK, Colour, Picture, letters, paper, scaled, side_by_side

_FADED: Colour = (130, 130, 132)
_TEXT_SIZE = 15
_LINE = 20  # height of a line of text, pixels
_SPACE = 6  # between parts of a panel, pixels
_LABEL = 42  # width of the column that says what a text is, pixels
_MARGIN = 3  # free at the end of a line, since letters may be wider than their measure, pixels
_REFERENCES = 3  # true captions shown
_REFERENCE_LINES, CAPTION_LINES = 4, 8  # what is longer ends in an ellipsis
_WORDS = 12  # words with a picture of their own
_ELLIPSIS = "…"

#: Weak to strong attention: colour and opacity on the image in faded gray.
_HEAT = ((70, 0, 110, 0.0), (200, 20, 90, 0.2), (250, 120, 10, 0.6), (255, 240, 90, 0.75))
#: Attention that is no more peaked than this many times the even distribution is not drawn at full strength.
_PEAKED = 3.0


def draw_caption(
    image: Picture,
    references: Sequence[str],
    caption: str,
    words: Sequence[str],
    attention: npt.NDArray[np.floating] | None,
    *,
    side: int = 448,
    columns: int = 4,
) -> Picture:
    """The image with true captions on the left, with the predicted one on the right.

    Args:
        image: (H, W, 3) uint8 RGB.
        references: true captions; the first three are shown.
        caption: the predicted one; may be empty.
        words: its words as the head chose them; the first twelve get a small picture each.
        attention: (len(words), h, w) weights of each word, at least 0, over a grid that covers the whole image; None
            for no small pictures.
        side: width of a panel and length of the longer side of the image, pixels.
        columns: small pictures in a row.

    Raises ValueError for attention that is negative or not finite, as of a head whose training has diverged.
    """
    assert columns >= 1, columns
    base = scaled(image, side)
    shown = references[:_REFERENCES]
    truth = [_on_paper(base, side)]
    truth += [text_lines("true:", reference, side, _REFERENCE_LINES) for reference in shown or [""]]
    prediction = [_on_paper(base, side), text_lines("", caption, side, CAPTION_LINES)]
    if attention is not None:
        _check(attention, words)
        prediction += _small_pictures(base, words, attention, side, columns)
    count = f"{len(shown)} of {len(references)}" if len(shown) < len(references) else f"{len(shown)}"
    captions = "caption" if len(references) == 1 else "captions"
    return side_by_side((_stack(truth), f"ground truth: {count} {captions}"), (_stack(prediction), "predicted caption"))


def _check(attention: npt.NDArray[np.floating], words: Sequence[str]) -> None:
    assert attention.ndim == 3 and len(attention) == len(words), (attention.shape, len(words))
    if attention.size and not (np.isfinite(attention).all() and attention.min() >= 0):
        raise ValueError(
            f"attention of the words {' '.join(words)!r:.80} has values that are negative or not finite; weights are "
            "finite and at least 0. Look at the losses of the training: they may have diverged"
        )


def _small_pictures(
    base: Image.Image, words: Sequence[str], attention: npt.NDArray[np.floating], side: int, columns: int
) -> list[Picture]:
    """Rows of small pictures with their words, then how many words have none."""
    width = max(1, (side - (columns - 1) * _SPACE) // columns)
    small = base.copy()
    small.thumbnail((width, width), Image.Resampling.BICUBIC)
    cells = []
    for word, weights in list(zip(words, attention, strict=True))[:_WORDS]:
        cell = paper(small.height + _LINE, width + _SPACE)
        cell[: small.height, : small.width] = _heated(small, weights)
        cells.append(_written(cell, [(0, small.height + _LINE / 2, _shorten(_clean(word), width), INK)]))
    rows = [np.concatenate(cells[start : start + columns], axis=1) for start in range(0, len(cells), columns)]
    if len(words) > _WORDS:
        more = len(words) - _WORDS
        line = _shorten(f"{_ELLIPSIS} {more} more word{'s' if more > 1 else ''}", side)
        rows.append(_written(paper(_LINE, side), [(0, _LINE / 2, line, _FADED)]))
    return [row[:, :side] for row in rows]


def _heated(small: Image.Image, weights: npt.NDArray[np.floating]) -> Picture:
    """The image in faded gray, in glowing colours where the weights are large."""
    values = weights.astype(np.float64)
    strongest = max(float(values.max()), _PEAKED * float(values.mean()))
    values = values / strongest if strongest > 0 else values
    # cells of the grid cover the image, whatever its shape; cubic interpolation may overshoot
    wide = Image.fromarray(values.astype(np.float32)).resize(small.size, Image.Resampling.BICUBIC)
    heat = np.asarray(wide).clip(0, 1)
    stops = np.linspace(0, 1, len(_HEAT))
    red, green, blue, opacity = (np.interp(heat, stops, channel) for channel in zip(*_HEAT, strict=True))
    gray = np.asarray(small.convert("L"), dtype=np.float64)[..., None] * 0.7 + 25
    glow = np.stack([red, green, blue], axis=-1)
    mixed: Picture = np.rint(gray + (glow - gray) * opacity[..., None]).astype(np.uint8)
    return mixed


def text_lines(label: str, text: str, width: int, lines: int) -> Picture:
    """A text, in a column of its own beside its label if there is one, at most so many lines."""
    left = _LABEL if label else 0
    wrapped = _wrap(_clean(text), max(1, width - left - _MARGIN), lines)
    writing = [(0, _LINE / 2, label, _FADED)]
    writing += [(left, (row + 0.5) * _LINE, line, INK) for row, line in enumerate(wrapped)]
    if not wrapped:
        writing.append((left, _LINE / 2, "(no words)", _FADED))
    return _written(paper(_LINE * max(1, len(wrapped)), width), writing)


def _wrap(text: str, width: int, lines: int) -> list[str]:
    """Break a text between words, a word wider than a line inside it; an ellipsis ends what was cut off."""
    wrapped: list[str] = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if _length(longer) <= width:
            line = longer
            continue
        if line:
            wrapped.append(line)
        while _length(word) > width and len(wrapped) <= lines:
            fits = _fitting(word, width)
            wrapped.append(word[:fits])
            word = word[fits:]
        line = word
        if len(wrapped) > lines:
            break
    if line:
        wrapped.append(line)
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], _shorten(wrapped[lines - 1] + " " + _ELLIPSIS, width)]
    return wrapped


def _shorten(text: str, width: int) -> str:
    """The text if it fits, else its beginning and an ellipsis."""
    if _length(text) <= width:
        return text
    room = max(0.0, width - _length(_ELLIPSIS))
    body = text.removesuffix(_ELLIPSIS).rstrip()
    fits = _fitting(body, room) if _length(body) > room else len(body)
    return body[:fits].rstrip() + _ELLIPSIS


def _fitting(text: str, width: float) -> int:
    """Number of letters that fit into `width`, at least one, so that breaking a word ends."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _length(text[:middle]) <= width else (low, middle - 1)
    return low


def _length(text: str) -> float:
    return letters(_TEXT_SIZE).getlength(text)


def _clean(text: str) -> str:
    """Reduce text to one line with one blank between words: what is not printable cannot be drawn or measured."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _written(sheet: Picture, texts: Sequence[tuple[float, float, str, Colour]]) -> Picture:
    """Write each (left, middle, text, colour) onto a sheet."""
    canvas = Image.fromarray(sheet)
    draw = ImageDraw.Draw(canvas)
    for left, middle, text, colour in texts:
        draw.text((left, middle), text, fill=colour, font=letters(_TEXT_SIZE), anchor="lm")
    return np.asarray(canvas)


def _on_paper(base: Image.Image, width: int) -> Picture:
    """The image in a sheet of the panel's width."""
    sheet = paper(base.height, width)
    sheet[:, : base.width] = np.asarray(base)
    return sheet


def _stack(parts: Sequence[Picture]) -> Picture:
    """Parts of a panel below each other."""
    width = max(part.shape[1] for part in parts)
    sheet = paper(sum(part.shape[0] + _SPACE for part in parts), width)
    top = 0
    for part in parts:
        sheet[top : top + part.shape[0], : part.shape[1]] = part
        top += part.shape[0] + _SPACE
    return sheet
