"""Word recognition: how much of a printed word a small reader finds in the frozen feature map.

The map is pooled to two rows and read as a sequence of columns; a linear layer, one bidirectional LSTM and CTC
(https://doi.org/10.1145/1143844.1143891) learn the characters, two steps for each column. The protocol is ours.

Data: a folder with `train/` and `test/`, each with word pictures and ICDAR's `gt.txt` (`word_1.png, "Tiredness"`) or
`labels.txt` (`NAME<TAB>TEXT`). Letters and digits count, in lower case, as most papers compare.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
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


#: Word pictures, seen as squares whatever their shape, and what they say.
WordSet = tuple[ImageSet, tuple[str, ...]]


def ocr(label: str, train: WordSet, test: WordSet) -> Benchmark:
    """Share of words read without mistake."""
    (taught, words), (shown, right) = train, test

    def scores(features: Features, wanted: Collection[str]) -> Iterator[Score]:
        found = read(features["train"]["columns"], words, features["test"]["columns"], UPDATES)
        yield Score("words", np.array([float(one == other) for one, other in zip(found, right, strict=True)]))

    protocol = [WIDTH, STEPS_PER_COLUMN, UPDATES, BATCH, RATE]
    return Benchmark(
        label,
        {"train": taught, "test": shown},
        ("columns",),
        ("words",),
        {"benchmark": "ocr 3", "protocol": protocol, "words": [words, right]},
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


def read(known: Tensor, words: Sequence[str], asked: Tensor, updates: int) -> list[str]:
    """What columns (n, C, w) say, by a reader that learns from those of known words. A word that has more characters
    than steps teaches nothing; equal neighbours need a blank between them.
    """
    alphabet = sorted({character for word in words for character in word})
    with torch.random.fork_rng(devices=[]):  # the same for the same input, whatever the global generator's state
        torch.manual_seed(0)
        # One number for all channels: some hardly vary, and would be blown up to noise.
        reader = Reader(known.mean(dim=(0, 2)), known.std().clamp_min(1e-6), len(alphabet))
        optimizer = torch.optim.AdamW(reader.parameters(), lr=RATE, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, RATE, updates, pct_start=50 / updates, cycle_momentum=False
        )
        loss_of = nn.CTCLoss(blank=len(alphabet), zero_infinity=True)
        for _ in range(updates):
            batch = torch.randint(len(words), (BATCH,))
            drawn = [words[place] for place in batch.tolist()]
            targets = torch.tensor([alphabet.index(character) for word in drawn for character in word])
            logs = reader(known[batch])
            loss = loss_of(logs, targets, torch.full((BATCH,), len(logs)), torch.tensor(list(map(len, drawn))))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        paths = [path for part in asked.split(256) for path in reader(part).argmax(dim=2).T.tolist()]
    # Of the most likely path repeats are one character, blanks none.
    return ["".join(alphabet[step] for step, _ in groupby(path) if step < len(alphabet)) for path in paths]


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
    return replace(from_files(files, folder), stretched=True), tuple(words)
