"""Word recognition: how much of a printed word a small reader finds in the frozen feature map.

The map is pooled to two rows and read as a sequence of columns; a linear layer, one bidirectional LSTM and CTC
(https://doi.org/10.1145/1143844.1143891) learn the characters, two steps for each column. The protocol is ours.

Data: a folder with `train/` and `test/`, each with word pictures and ICDAR's `gt.txt` (`word_1.png, "Tiredness"`) or
`labels.txt` (`NAME<TAB>TEXT`). Letters and digits count, in lower case, as most papers compare.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from visft_ds.evals.judge.images import from_files, read_lines
from visft_ds.evals.judge.protocol import Benchmark, Features, ImageSet, Score
from visft_ds.files import checked_name

WIDTH, STEPS_PER_COLUMN = 128, 2  #: of the reader; characters are often narrower than a patch
UPDATES, BATCH, RATE = 1500, 64, 2e-3
_LINE = re.compile(r'(?P<name>[^,\t]+?)(?:,\s*"(?P<quoted>.*)"|\t(?P<text>.*))')


@dataclass(frozen=True)
class WordSet:
    """Word pictures, seen as squares whatever their shape, and what they say."""

    images: ImageSet
    words: tuple[str, ...]


def ocr(label: str, train: WordSet, test: WordSet) -> Benchmark:
    """Share of words read without mistake."""

    def scores(features: Features, wanted: Collection[str]) -> Iterator[Score]:
        alphabet = sorted({character for word in train.words for character in word})
        reader = fit(features["train"]["columns"], train.words, alphabet, UPDATES)
        found = read(reader, features["test"]["columns"], alphabet)
        yield Score("words", np.array([float(one == other) for one, other in zip(found, test.words, strict=True)]))

    protocol = [WIDTH, STEPS_PER_COLUMN, UPDATES, BATCH, RATE]
    return Benchmark(
        label,
        {"train": train.images, "test": test.images},
        ("columns",),
        ("words",),
        {"benchmark": "ocr 2", "protocol": protocol, "words": [train.words, test.words]},
        scores,
    )


class Reader(nn.Module):
    """Columns (B, C, w) -> log-probabilities (w * STEPS_PER_COLUMN, B, characters + 1); the last is the blank."""

    def __init__(self, mean: Tensor, scale: Tensor, characters: int) -> None:
        super().__init__()
        self.mean, self.scale = nn.Buffer(mean), nn.Buffer(scale)
        self.narrow = nn.Linear(len(mean), WIDTH)
        self.sequence = nn.LSTM(WIDTH, WIDTH // 2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(WIDTH, STEPS_PER_COLUMN * (characters + 1))

    def forward(self, columns: Tensor) -> Tensor:
        x = torch.relu(self.narrow((columns.transpose(1, 2) - self.mean) / self.scale))
        x = x + self.sequence(x)[0]
        steps: Tensor = self.out(x).unflatten(2, (STEPS_PER_COLUMN, -1)).flatten(1, 2)
        return steps.log_softmax(dim=2).transpose(0, 1)


def fit(columns: Tensor, words: Sequence[str], alphabet: Sequence[str], updates: int) -> Reader:
    """Train a reader on columns (words, C, w); the same for the same input, whatever the global generators' state."""
    fitting = [n for n, word in enumerate(words) if _steps(word) <= columns.shape[2] * STEPS_PER_COLUMN]
    if not fitting:
        raise ValueError(f"features of {columns.shape[2]} columns are too few for any word")
    numbers = {character: number for number, character in enumerate(alphabet)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # One number for all channels: some hardly vary, and would be blown up to noise.
        reader = Reader(columns.mean(dim=(0, 2)), columns.std().clamp_min(1e-6), len(alphabet))
        optimizer = torch.optim.AdamW(reader.parameters(), lr=RATE, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / updates))
        )
        loss_of = nn.CTCLoss(blank=len(alphabet))
        for _ in range(updates):
            batch = [fitting[place] for place in torch.randint(len(fitting), (BATCH,)).tolist()]
            targets = torch.tensor([numbers[character] for place in batch for character in words[place]])
            logs = reader(columns[batch])
            lengths = torch.tensor([len(words[place]) for place in batch])
            loss = loss_of(logs, targets, torch.full((len(batch),), len(logs)), lengths)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return reader.eval()


@torch.no_grad()
def read(reader: Reader, columns: Tensor, alphabet: Sequence[str]) -> list[str]:
    """The most likely path of each word: repeats are one character, blanks none."""
    paths = [path for part in columns.split(256) for path in reader(part).argmax(dim=2).T.tolist()]
    return ["".join(alphabet[step] for step, _ in groupby(path) if step < len(alphabet)) for path in paths]


def _steps(word: str) -> int:
    """CTC's least number of steps: one for each character, and a blank between equal neighbours."""
    return len(word) + sum(one == other for one, other in pairwise(word))


def read_words(folder: Path) -> WordSet:
    """Word pictures of a folder. Raises ValueError without a label file or words, or for a line of another form."""
    path = next((folder / name for name in ("gt.txt", "labels.txt") if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder} has no words: needed is gt.txt or labels.txt beside the images")
    files, words = [], []
    for line in read_lines(path):
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f'{path}: a line must be NAME, "TEXT" or NAME<TAB>TEXT; got {line!r}')
        if word := re.sub(r"[^0-9a-z]", "", (match["quoted"] or match["text"] or "").lower()):
            files.append(folder / checked_name(match["name"], path))
            words.append(word)
    if not words:
        raise ValueError(f"{path} has no word with letters or digits")
    return WordSet(replace(from_files(files, folder), stretched=True), tuple(words))
