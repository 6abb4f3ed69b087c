"""Questions answered by a vision-language model that reads a tower that is judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from visft_ds.evals.judge.benchmark import Benchmark, Number, Score
from visft_ds.evals.judge.questions import QuestionSet
from visft_ds.evals.judge.vlm_text import Request, by_vlm
from visft_ds.evals.judge.vqa_accuracy import accuracy

PROMPT = "Question: {} Short answer:"  # of BLIP-2's paper, https://arxiv.org/abs/2301.12597
CHAT = "{} Answer the question using a single word or phrase."  # of LLaVA's, https://arxiv.org/abs/2310.03744
LONGEST = 10  #: tokens of an answer

NUMBER = Number(
    "VLM answers",
    how="Answers of a vision-language model with the tower in it, the likeliest words, at most "
    f"{LONGEST} tokens, to '{PROMPT}', or to '{CHAT}' in the form of its chats; VQA accuracy.",
    side=224,
)


def vlm_answers(label: str, train: QuestionSet, test: QuestionSet, folder: Path) -> Benchmark:
    """Accuracy of the answers of the model in a folder to the questions that are judged."""
    requests = []
    for question, owner in zip(test.questions, test.owners.tolist(), strict=True):
        requests.append(Request(owner, PROMPT.format(question.text), CHAT.format(question.text)))

    def scores(texts: Sequence[str]) -> Iterator[Score]:
        right = []
        for text, question in zip(texts, test.questions, strict=True):
            right.append(accuracy(text, question.answers))
        yield Score(NUMBER.name, np.array(right), test.owners)

    return by_vlm(
        label,
        folder,
        {"train": train.images, "test": test.images},
        requests,
        LONGEST,
        (NUMBER,),
        {
            "benchmark": "VLM answers 1",
            "protocol": [PROMPT, CHAT, LONGEST],
            "questions": test.fingerprint,
        },
        scores,
    )
