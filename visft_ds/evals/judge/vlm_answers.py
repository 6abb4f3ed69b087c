"""Questions answered by a vision-language model that reads a tower that is judged.

The model is BLIP-2 or one in LLaVA's style (`interop.vlm`), in which nothing but the tower changes; its own
tower has to be BASE. It says the most likely words, one after the other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from visft_ds.evals.judge.benchmark import Benchmark, Features, Number, Score
from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.encoding import Settings
from visft_ds.evals.judge.images import digest, stamp
from visft_ds.evals.judge.models import weights_of
from visft_ds.evals.judge.questions import Question, QuestionSet
from visft_ds.evals.judge.vqa_accuracy import accuracy
from visft_ds.files import reading
from visft_ds.interop.layouts import built, model_of
from visft_ds.interop.vlm import Vlm, open_vlm
from visft_ds.interop.weights import Lazy, Weights
from visft_ds.monitor.console import gauge

PROMPT = "Question: {} Short answer:"  # of BLIP-2's paper, https://arxiv.org/abs/2301.12597
ASK = "{} Answer the question using a single word or phrase."  # of LLaVA's, https://arxiv.org/abs/2310.03744
LONGEST = 10  #: tokens of an answer

NUMBER = Number(
    "VLM answers",
    how="Answers of a vision-language model with the tower in it, the likeliest words, at most "
    f"{LONGEST} tokens, to '{PROMPT}', or to '{ASK}' in the form of its chats; VQA accuracy.",
    side=224,
)


def vlm_answers(label: str, train: QuestionSet, test: QuestionSet, folder: Path) -> Benchmark:
    """Accuracy of the answers of the model in a folder to the questions that are judged."""
    files = [f"{path.name} {stamp(path)}" for path in sorted(folder.glob("*")) if path.is_file()]

    @cache
    def opened() -> Vlm:
        return open_vlm(folder)

    def check(base: Encoder) -> None:
        opened().check_base(_tower(base, opened()))

    def nothing(features: Features, names: Collection[str]) -> Iterator[Score]:
        raise AssertionError(label)

    def answered(encoder: Encoder, settings: Settings, names: Collection[str]) -> Iterator[Score]:
        vlm = opened()
        vlm.put(_tower(encoder, vlm))
        processor = _processor(folder)
        vlm.model.to(settings.device)
        right = []
        numbers = range(len(test.questions))
        for number in gauge(f"{label}: answers", len(numbers), "questions", numbers):
            image = test.images.read(int(test.owners[number]))
            question = test.questions[number]
            said = answer(vlm.model, processor, image, question)
            right.append(accuracy(said, question.answers))
        yield Score(NUMBER.name, np.array(right), test.owners)

    return Benchmark(
        label,
        sets={"train": train.images, "test": test.images},
        kinds=("pooled",),
        numbers=(NUMBER,),
        settings={
            "benchmark": "VLM answers 1",
            "protocol": [PROMPT, ASK, LONGEST],
            "questions": test.fingerprint,
            "vlm": digest(files),
        },
        scores=nothing,
        published=answered,
        check_base=check,
    )


def _tower(encoder: Encoder, vlm: Vlm) -> dict[str, Lazy]:
    """The weights of an encoder's tower, an adapter merged, by the names of the model to have them."""
    module: Any = encoder.module
    module = getattr(module, "module", module)  # where it is read after a block
    backbone = getattr(module, "backbone", None)
    if backbone is None:
        raise ValueError("vlm= takes towers of visft_ds and timm, not models of open_clip")
    weights = weights_of(replace(encoder, module=module, text=None))
    tensors = {name: Lazy.of(tensor.cpu()) for name, tensor in weights.items()}
    return vlm.names(Weights(tensors, Path(backbone.describe())), built(model_of(backbone), "meta"))


def _processor(folder: Path) -> Any:
    """Tokenizer and image processor of a model in a folder."""
    from transformers import AutoProcessor

    with reading(folder, "a folder of transformers with tokenizer and image processor"):
        return AutoProcessor.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def answer(model: Any, processor: Any, image: Any, question: Question) -> str:
    """The first line that a model says to a question about an image."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": ASK.format(question.text)}]
        chat = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
    else:
        text = PROMPT.format(question.text)
    inputs = processor(images=image, text=text, return_tensors="pt").to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=LONGEST)[0]
    prompt = inputs["input_ids"][0]
    if tokens[: len(prompt)].tolist() == prompt.tolist():  # some models repeat it
        tokens = tokens[len(prompt) :]
    said = processor.decode(tokens, skip_special_tokens=True).strip()
    return str(said.split("\n")[0])
