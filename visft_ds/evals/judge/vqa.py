"""Questions about images, answered from frozen features without a language model.

A probe learns from nothing but the questions: their words look at the cells of the feature map in two layers
of cross-attention and choose one of the frequent answers of training. The protocol is ours: it says what of
an answer is in the features, not what a model that can talk would say. Accuracy is VQA's (`vqa_accuracy`).
What words alone say stands beside the numbers, since they answer many questions.

Or they are answered by a vision-language model that reads the tower.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from visft_ds.evals.judge.benchmark import (
    Benchmark,
    Features,
    FloatArray,
    Names,
    Number,
    Score,
    Scores,
    resamples,
)
from visft_ds.evals.judge.kinds import Request
from visft_ds.evals.judge.questions import MOST, QuestionSet, read_questions, words_alone
from visft_ds.evals.judge.vlm_text import Prompt, by_vlm
from visft_ds.evals.judge.vqa_accuracy import accuracy
from visft_ds.monitor.console import gauge

WIDTH = 64  #: of the probe
HEADS = 4
LAYERS = 2
DROPOUT = 0.1
CHANNELS = 128  #: principal components of the cells
LENGTH = 20  #: words of a question that are read
ANSWERS = 1000  #: at most
STEPS = 400
BATCH = 64  #: questions
RATE = 1.5e-3
DECAY = 0.05
RESAMPLES = 5  #: of the training images
_KINDS = 6  # kinds of questions with a number of their own, the most frequent ones
_PADDING, _START, _UNKNOWN = range(3)  # numbers of what stands beside words
_ROWS = 20_000  # cells whose principal components are taken
_TOGETHER = 256  # questions that are answered at once

PROMPT = "Question: {} Short answer:"  # of BLIP-2's paper, https://arxiv.org/abs/2301.12597
CHAT = "{} Answer the question using a single word or phrase."  # of LLaVA's, https://arxiv.org/abs/2310.03744
LONGEST = 10  #: tokens of an answer of a vision-language model

ALL = Number(
    "answers",
    how=f"A probe of {LAYERS} layers, in which the words of a question look at the feature map, answers by "
    f"one of the {ANSWERS:,} most frequent answers; VQA accuracy. At most {MOST['train']:,} images teach and "
    f"{MOST['test']:,} judge.",
)
OF_VLM = Number(
    "VLM answers",
    how="Answers of a vision-language model with the tower in it, the likeliest words, at most "
    f"{LONGEST} tokens, to '{PROMPT}', or to '{CHAT}' in the form of its chats; VQA accuracy.",
    side=224,
)


def of_kind(kind: str) -> Number:
    """The number of one kind of questions."""
    return Number(f"answers ({kind})", how=f"The same over the questions of the kind {kind}.")


NUMBERS = (ALL, of_kind("KIND"), OF_VLM)


def benchmark(request: Request) -> Benchmark:
    """Accuracy of answers by a probe, or by a vision-language model."""
    parts = read_questions(request.source, request.train, request.split)
    train, test = request.with_groups(*parts)
    if request.vlm is None:
        return vqa(request.label, train, test)
    return _of_vlm(request, train, test)


def _of_vlm(request: Request, train: QuestionSet, test: QuestionSet) -> Benchmark:
    """Accuracy of the answers of a vision-language model to the questions that are judged."""
    prompts = []
    for question, owner in zip(test.questions, test.owners.tolist(), strict=True):
        prompts.append(Prompt(owner, PROMPT.format(question.text), CHAT.format(question.text)))

    def scores(texts: Sequence[str]) -> Scores:
        yield Score(OF_VLM.name, _right(texts, test), test.owners)

    settings = {
        "benchmark": "VLM answers 1",
        "questions": test.fingerprint,
    }
    sets = {"train": train.images, "test": test.images}
    return by_vlm(request, sets, prompts, LONGEST, (OF_VLM,), settings, scores)


def _right(answers: Sequence[str], test: QuestionSet) -> FloatArray:
    """(questions,), accuracy of an answer to each question."""
    pairs = zip(answers, test.questions, strict=True)
    return np.array([accuracy(answer, question.answers) for answer, question in pairs])


def vqa(label: str, train: QuestionSet, test: QuestionSet) -> Benchmark:
    """Accuracy of answers, of all questions and of each frequent kind."""
    counts = Counter(question.kind for question in test.questions)
    kinds = [kind for kind, _ in counts.most_common(_KINDS)] if len(counts) > 1 else []
    kind_of_question = np.array([question.kind for question in test.questions])

    def scores(features: Features, names: Names) -> Scores:
        cells = _components(features["train"]["cells"], features["test"]["cells"])
        right = _answered(cells, train, test)
        parts = {ALL.name: np.ones(len(test.questions), dtype=bool)}
        parts |= {of_kind(kind).name: kind_of_question == kind for kind in kinds}
        for name, chosen in parts.items():
            of_probes = right[:, chosen]
            retrained = of_probes[1:].mean(axis=1)
            yield Score(name, of_probes[0], test.owners[chosen], retrained=retrained)

    words = f"{label}: the most frequent answer of training to the same words is right in "
    return Benchmark(
        label,
        sets={"train": train.images, "test": test.images},
        kinds=("cells",),
        numbers=[ALL, *map(of_kind, kinds)],
        settings={
            "benchmark": "vqa 1",
            "questions": [train.fingerprint, test.fingerprint],
        },
        scores=scores,
        notes=[f"{words}{words_alone(train, test):.1%} of {len(test.questions):,} questions."],
    )


def _components(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """(n, cells, channels) of maps (n, D, h, w): principal components of the training images' cells."""
    flat = [maps.flatten(2).transpose(1, 2) for maps in (train, test)]
    rows = flat[0].flatten(0, 1)
    rows = rows[:: max(1, len(rows) // _ROWS)]
    mean = rows.mean(dim=0)
    _, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean))
    directions = vectors[:, -CHANNELS:]
    # One number for all channels: some hardly vary, and would be blown up to noise.
    scale = ((rows - mean) @ directions).square().mean().sqrt().clamp_min(1e-6)
    learnt, judged = [(cells - mean) @ directions / scale for cells in flat]
    return learnt, judged


class Probe(nn.Module):
    """Answers to questions: words (n, length) and cells (n, cells, channels) -> (n, answers)."""

    def __init__(self, words: int, answers: int, cells: Sequence[int]) -> None:
        super().__init__()
        count, channels = cells
        self.word = nn.Embedding(words, WIDTH, padding_idx=_PADDING)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.cell = nn.Linear(channels, WIDTH)
        self.place = nn.Parameter(0.2 * torch.randn(count, WIDTH))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(WIDTH, HEADS, 2 * WIDTH, DROPOUT, batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )
        self.classify = nn.Linear(WIDTH, answers)

    def forward(self, words: Tensor, cells: Tensor) -> Tensor:
        x = self.word(words) + self.position[: words.shape[1]]
        seen = self.cell(cells) + self.place
        for layer in self.layers:
            x = layer(x, seen, tgt_key_padding_mask=words == _PADDING)
        logits: Tensor = self.classify(x[:, 0])
        return logits


def _answered(cells: tuple[Tensor, Tensor], train: QuestionSet, test: QuestionSet) -> FloatArray:
    """(1 + RESAMPLES, questions), accuracy of the answers of probes that learnt from all training images and
    from resamples of them.
    """
    counts = Counter(question.answer for question in train.questions)
    answers = [answer for answer, _ in counts.most_common(ANSWERS)]
    number_of_answer = {answer: number for number, answer in enumerate(answers)}
    targets = torch.tensor([number_of_answer.get(question.answer, -1) for question in train.questions])
    known = sorted({word for question in train.questions for word in question.words})
    number_of_word = {word: number for number, word in enumerate(known, _UNKNOWN + 1)}
    sentences = []  # a start and the words of each
    for question in (*train.questions, *test.questions):
        numbers = [number_of_word.get(word, _UNKNOWN) for word in question.words[: LENGTH - 1]]
        sentences.append(torch.tensor([_START, *numbers]))
    padded = pad_sequence(sentences, batch_first=True, padding_value=_PADDING)
    words, asked = padded.split([len(train.questions), len(test.questions)])
    owners = torch.from_numpy(train.owners)
    test_owners = torch.from_numpy(test.owners)
    right = []
    copies = resamples(len(train.images), RESAMPLES, train.images.groups)
    for seed, copies_of_images in enumerate(gauge("answers", len(copies), "probes", copies)):
        often = torch.from_numpy(copies_of_images)[owners] * (targets >= 0)
        taught = torch.arange(len(targets)).repeat_interleave(often)
        with torch.random.fork_rng(devices=[]):  # the same for the same input, whatever was drawn before
            torch.manual_seed(seed)
            probe = Probe(len(known) + _UNKNOWN + 1, len(answers), cells[0].shape[1:])
            _fit(probe, words, targets, owners, cells[0], taught)
        predicted = _said(probe, asked, test_owners, cells[1])
        right.append(_right([answers[number] for number in predicted.tolist()], test))
    return np.stack(right)


def _fit(probe: Probe, words: Tensor, targets: Tensor, owners: Tensor, cells: Tensor, taught: Tensor) -> None:
    """Teach a probe the questions of some numbers, in rounds over all of them."""
    optimizer = torch.optim.AdamW(probe.parameters(), RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, cycle_momentum=False)
    rounds = -(-STEPS * BATCH // len(taught))
    order = torch.cat([taught[torch.randperm(len(taught))] for _ in range(rounds)])
    for batch in order[: STEPS * BATCH].view(STEPS, BATCH):
        loss = F.cross_entropy(probe(words[batch], cells[owners[batch]]), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _said(probe: Probe, words: Tensor, owners: Tensor, cells: Tensor) -> Tensor:
    """Number of the answer to each question."""
    probe.eval()
    batches = zip(words.split(_TOGETHER), owners.split(_TOGETHER), strict=True)
    return torch.cat([probe(asked, cells[images]).argmax(dim=1) for asked, images in batches])
