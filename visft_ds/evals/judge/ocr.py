"""Word recognition: how much of a printed word a small reader finds in the frozen feature map.

The map is pooled to two rows and read as a sequence of columns; a linear layer, one bidirectional LSTM and
CTC (https://doi.org/10.1145/1143844.1143891) learn the characters, two steps for each column. The protocol is
ours.

Data: a folder with `train/` and `test/`, each with word pictures and ICDAR's `gt.txt` (`word_1.png,
"Tiredness"`) or `labels.txt` (`NAME<TAB>TEXT`). Letters and digits count, in lower case, as most papers
compare.
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

from visft_ds.evals.judge.benchmark import Benchmark, Features, ImageSet, Number, Score
from visft_ds.evals.judge.images import from_files, read_lines
from visft_ds.files import checked_name, reading

WIDTH, STEPS_PER_COLUMN = 128, 2  #: of the reader; characters are often narrower than a patch
UPDATES, BATCH, RATE = 1500, 64, 2e-3

NUMBERS = (
    Number("words", how="A linear layer and an LSTM learn to read words by CTC; the share without mistake."),
)

#: Word pictures, seen as squares whatever their shape, and what they say.
WordSet = tuple[ImageSet, tuple[str, ...]]


def ocr(label: str, train: WordSet, test: WordSet) -> Benchmark:
    """Share of words read without mistake."""
    (taught, words), (shown, right) = train, test

    def scores(features: Features, wanted: Collection[str]) -> Iterator[Score]:
        found = read(features["train"]["columns"], words, features["test"]["columns"], UPDATES)
        yield Score("words", np.array([float(one == other) for one, other in zip(found, right, strict=True)]))

    return Benchmark(
        label,
        {"train": taught, "test": shown},
        ("columns",),
        NUMBERS,
        {
            "benchmark": "ocr 3",
            "protocol": [WIDTH, STEPS_PER_COLUMN, UPDATES, BATCH, RATE],
            "words": [words, right],
        },
        scores,
    )


def read(known: Tensor, words: Sequence[str], asked: Tensor, updates: int) -> list[str]:
    """Words that columns (n, C, w) say, by a reader that learns from known ones. A word that has more
    characters than steps teaches nothing; equal neighbours need a blank between them.
    """
    if known.shape[2] * STEPS_PER_COLUMN < min(map(len, words)):
        raise ValueError(f"features of {known.shape[2]} columns are too few for any word")
    alphabet = sorted({character for word in words for character in word})  # a blank comes after it
    # One number for all channels: some hardly vary, and would be blown up to noise.
    mean, scale = known.mean(dim=(0, 2)), known.std().clamp_min(1e-6)
    with torch.random.fork_rng(
        devices=[]
    ):  # the same for the same input, whatever the global generator's state
        torch.manual_seed(0)
        narrow = nn.Linear(known.shape[1], WIDTH)
        sequence = nn.LSTM(WIDTH, WIDTH // 2, bidirectional=True, batch_first=True)
        out = nn.Linear(WIDTH, STEPS_PER_COLUMN * (len(alphabet) + 1))
        reader = nn.ModuleList([narrow, sequence, out])

        def steps_of(columns: Tensor) -> Tensor:
            """(w * STEPS_PER_COLUMN, n, characters) log-probabilities."""
            x = torch.relu(narrow((columns.transpose(1, 2) - mean) / scale))
            x = x + sequence(x)[0]
            return (
                out(x).unflatten(2, (STEPS_PER_COLUMN, -1)).flatten(1, 2).log_softmax(dim=2).transpose(0, 1)
            )

        optimizer = torch.optim.AdamW(reader.parameters(), lr=RATE, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, RATE, updates, pct_start=50 / updates, cycle_momentum=False
        )
        loss_of = nn.CTCLoss(blank=len(alphabet), zero_infinity=True)
        for _ in range(updates):
            batch = torch.randint(len(words), (BATCH,))
            drawn = [words[place] for place in batch.tolist()]
            targets = torch.tensor([alphabet.index(character) for word in drawn for character in word])
            logs = steps_of(known[batch])
            loss = loss_of(
                logs, targets, torch.full((BATCH,), len(logs)), torch.tensor(list(map(len, drawn)))
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        paths = [path for part in asked.split(256) for path in steps_of(part).argmax(dim=2).T.tolist()]
    # Of the most likely path repeats are one character, blanks none.
    return ["".join(alphabet[step] for step, _ in groupby(path) if step < len(alphabet)) for path in paths]


def read_words(folder: Path) -> WordSet:
    """Word pictures of a folder. Raises ValueError for a label file without words, or with a line of another
    form.
    """
    path = folder / ("gt.txt" if (folder / "gt.txt").is_file() else "labels.txt")
    files, words = [], []
    with reading(path, 'lines of NAME, "TEXT" or NAME<TAB>TEXT'):
        for line in read_lines(path):
            name, text = re.split("[,\t]", line, maxsplit=1)
            if word := re.sub("[^0-9a-z]", "", text.lower()):
                files.append(folder / checked_name(name, path))
                words.append(word)
        if not words:
            raise ValueError("it has no word with letters or digits")
    return replace(from_files(files, folder), stretched=True), tuple(words)
