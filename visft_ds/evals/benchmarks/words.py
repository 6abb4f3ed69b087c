"""Word recognition: how much of a printed word a small reader finds in the frozen feature map.

The map is pooled to two rows and read as a sequence of columns; a linear layer, one bidirectional LSTM and CTC
(https://doi.org/10.1145/1143844.1143891) learn the characters, two steps for each column. The protocol of the ViSFT
paper is not known to us; this one is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from visft_ds.evals.benchmarks.protocol import Features, ImageSet, Score
from visft_ds.evals.benchmarks.word_sets import WordSet

WIDTH = 128  #: of the reader
STEPS_PER_COLUMN = 2  #: characters are often narrower than a patch
UPDATES, BATCH, RATE = 1500, 64, 2e-3
_EVALUATED = 256  # words at once


@dataclass(frozen=True)
class Words:
    """Share of words read without mistake, and one minus the normalised edit distance."""

    label: str
    train: WordSet
    test: WordSet
    updates: int = UPDATES
    needs_text: bool = False
    kinds: Sequence[str] = ("columns",)
    texts: Sequence[str] = ()

    @property
    def sets(self) -> Mapping[str, ImageSet]:
        return {"train": self.train.images, "test": self.test.images}

    @property
    def truths(self) -> Mapping[str, Sequence[str]]:
        return {"test": self.test.words}

    @property
    def settings(self) -> Mapping[str, Any]:
        protocol = [WIDTH, STEPS_PER_COLUMN, self.updates, BATCH, RATE]
        return {"benchmark": "ocr 1", "protocol": protocol, "words": [self.train.words, self.test.words]}

    def scores(self, features: Features) -> Iterator[Score]:
        alphabet = sorted({character for word in self.train.words for character in word})
        train, test = (features.images[name]["columns"] for name in ("train", "test"))
        reader = fit(train, self.train.words, alphabet, self.updates)
        words = read(reader, test, alphabet)
        pairs = list(zip(words, self.test.words, strict=True))
        exact = np.array([float(one == other) for one, other in pairs])
        near = np.array([1 - edit_distance(one, other) / max(len(one), len(other)) for one, other in pairs])
        yield Score("words", exact, said=words, shows="test")
        yield Score("1-NED", near)


class Reader(nn.Module):
    """Columns (B, C, w) -> log-probabilities (w * STEPS_PER_COLUMN, B, characters + 1); the last is the blank."""

    def __init__(self, mean: Tensor, scale: Tensor, characters: int) -> None:
        super().__init__()
        self.mean, self.scale = nn.Buffer(mean), nn.Buffer(scale)
        self.narrow = nn.Linear(len(mean), WIDTH)
        self.sequence = nn.LSTM(WIDTH, WIDTH // 2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(WIDTH, STEPS_PER_COLUMN * (characters + 1))

    def forward(self, columns: Tensor) -> Tensor:
        x = (columns.transpose(1, 2) - self.mean) / self.scale
        x = torch.relu(self.narrow(x))
        x = x + self.sequence(x)[0]
        steps: Tensor = self.out(x).unflatten(2, (STEPS_PER_COLUMN, -1)).flatten(1, 2)
        return steps.log_softmax(dim=2).transpose(0, 1)


def fit(columns: Tensor, words: Sequence[str], alphabet: Sequence[str], updates: int) -> Reader:
    """Train a reader; the same for the same input, whatever the state of the global generators.

    Args:
        columns: (words, C, w) float32.
        alphabet: all characters of the words.

    Raises:
        ValueError: no word fits into the steps that the features have.
    """
    steps = columns.shape[2] * STEPS_PER_COLUMN
    fitting = [place for place, word in enumerate(words) if steps_needed(word) <= steps]
    if not fitting:
        raise ValueError(f"features of {columns.shape[2]} columns are too few for any word: give larger images")
    numbers = {character: number for number, character in enumerate(alphabet)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # One number for all channels: some hardly vary, and would be blown up to noise.
        scale = columns.std().clamp_min(1e-6)
        reader = Reader(columns.mean(dim=(0, 2)), scale, len(alphabet))
        optimizer = torch.optim.AdamW(reader.parameters(), lr=RATE, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / updates))
        )
        loss_of = nn.CTCLoss(blank=len(alphabet))
        for _ in range(updates):
            batch = [fitting[place] for place in torch.randint(len(fitting), (BATCH,)).tolist()]
            targets = [numbers[character] for place in batch for character in words[place]]
            lengths = torch.tensor([len(words[place]) for place in batch])
            logs = reader(columns[batch])
            loss = loss_of(logs, torch.tensor(targets), torch.full((len(batch),), len(logs)), lengths)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return reader.eval()


@torch.no_grad()
def read(reader: Reader, columns: Tensor, alphabet: Sequence[str]) -> list[str]:
    """The most likely path of each word: repeats are one character, blanks none."""
    words = []
    for start in range(0, len(columns), _EVALUATED):
        for path in reader(columns[start : start + _EVALUATED]).argmax(dim=2).T.tolist():
            words.append("".join(alphabet[step] for step, _ in groupby(path) if step < len(alphabet)))
    return words


def steps_needed(word: str) -> int:
    """CTC's least number of steps: one for each character, and a blank between equal neighbours."""
    return len(word) + sum(one == other for one, other in pairwise(word))


def edit_distance(one: str, other: str) -> int:
    """Least number of characters to insert, remove or replace (Levenshtein)."""
    row = list(range(len(other) + 1))
    for place, character in enumerate(one, 1):
        before, row[0] = row[0], place
        for number, target in enumerate(other, 1):
            before, row[number] = row[number], min(row[number] + 1, row[number - 1] + 1, before + (character != target))
    return row[-1]
