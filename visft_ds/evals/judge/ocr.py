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
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from visft_ds.evals.judge.benchmark import Benchmark, Features, ImageSet, Names, Number, Score, Scores
from visft_ds.evals.judge.images import from_files, read_lines
from visft_ds.evals.judge.kinds import Request
from visft_ds.files import checked_name, reading

WIDTH = 128  #: of the reader
STEPS_PER_COLUMN = 2  #: characters are often narrower than a patch
UPDATES = 1500
BATCH = 64
RATE = 2e-3

WORDS = Number(
    "words", how="A linear layer and an LSTM learn to read words by CTC; the share without mistake."
)
NUMBERS = (WORDS,)


def benchmark(request: Request) -> Benchmark:
    """Share of words read without mistake."""
    train_images, train_words = read_words(Path(request.source, "train"))
    test_images, test_words = read_words(Path(request.source, "test"))

    def scores(features: Features, names: Names) -> Scores:
        words = read(features["train"]["columns"], train_words, features["test"]["columns"], UPDATES)
        correct = [float(word == right) for word, right in zip(words, test_words, strict=True)]
        yield Score(WORDS.name, np.array(correct))

    return Benchmark(
        request.label,
        sets={"train": train_images, "test": test_images},
        kinds=("columns",),
        numbers=NUMBERS,
        settings={
            "benchmark": "ocr 3",
            "words": [train_words, test_words],
        },
        scores=scores,
    )


def read(train: Tensor, words: Sequence[str], test: Tensor, updates: int) -> list[str]:
    """Words that columns (n, C, w) show, by a reader that learns those of training images.

    A word that has more characters than steps teaches nothing; equal neighbours need a blank between them.
    """
    alphabet = sorted(set("".join(words)))  # a blank comes after it
    # One number for all channels: some hardly vary, and would be blown up to noise.
    mean = train.mean(dim=(0, 2))
    scale = train.std().clamp_min(1e-6)
    with torch.random.fork_rng(devices=[]):  # the same for the same input, whatever was drawn before
        torch.manual_seed(0)
        narrow = nn.Linear(train.shape[1], WIDTH)
        lstm = nn.LSTM(WIDTH, WIDTH // 2, bidirectional=True, batch_first=True)
        classify = nn.Linear(WIDTH, STEPS_PER_COLUMN * (len(alphabet) + 1))
        reader = nn.ModuleList([narrow, lstm, classify])

        def log_probabilities(columns: Tensor) -> Tensor:
            """(w * STEPS_PER_COLUMN, n, characters)"""
            x = torch.relu(narrow((columns.transpose(1, 2) - mean) / scale))
            x = x + lstm(x)[0]
            steps = classify(x).unflatten(2, (STEPS_PER_COLUMN, -1)).flatten(1, 2)
            return steps.log_softmax(dim=2).transpose(0, 1)

        optimizer = torch.optim.AdamW(reader.parameters(), lr=RATE, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, RATE, updates, pct_start=50 / updates, cycle_momentum=False
        )
        criterion = nn.CTCLoss(blank=len(alphabet), zero_infinity=True)
        for _ in range(updates):
            batch = torch.randint(len(words), (BATCH,))
            drawn = [words[index] for index in batch.tolist()]
            targets = torch.tensor([alphabet.index(character) for character in "".join(drawn)])
            steps = log_probabilities(train[batch])
            lengths = torch.tensor([len(word) for word in drawn])
            loss = criterion(steps, targets, torch.full((BATCH,), len(steps)), lengths)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        paths = torch.cat([log_probabilities(columns).argmax(dim=2).T for columns in test.split(256)])
    # Of the most likely path repeats are one character, blanks none.
    return [
        "".join(alphabet[step] for step, _ in groupby(path) if step < len(alphabet))
        for path in paths.tolist()
    ]


def read_words(folder: Path) -> tuple[ImageSet, tuple[str, ...]]:
    """(word pictures of a folder, seen as squares whatever their shape, what they say). Raises ValueError for
    a label file without words, or with a line of another form.
    """
    path = folder / "gt.txt"
    if not path.is_file():
        path = folder / "labels.txt"
    files = []
    words = []
    with reading(path, 'lines of NAME, "TEXT" or NAME<TAB>TEXT'):
        for line in read_lines(path):
            name, text = re.split("[,\t]", line, maxsplit=1)
            word = re.sub("[^0-9a-z]", "", text.lower())
            if word:
                files.append(folder / checked_name(name, path))
                words.append(word)
        if not words:
            raise ValueError("it has no word with letters or digits")
    return replace(from_files(files, folder), stretched=True), tuple(words)
