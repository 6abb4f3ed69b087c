"""Words of a vision-language model about images, with the tower of each judged model in it in turn.

The model is BLIP-2 or one in LLaVA's style (`interop.vlm`), in which nothing but the tower changes; its own
tower has to be BASE. It says the most likely words, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from visft_ds.evals.judge.benchmark import Benchmark, Features, ImageSet, Names, Number, Scores
from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.encoding import Settings
from visft_ds.evals.judge.images import digest, stamp
from visft_ds.evals.judge.kinds import Request
from visft_ds.evals.judge.models import weights_of
from visft_ds.files import reading
from visft_ds.interop.layouts import built, model_of
from visft_ds.interop.vlm import Vlm, open_vlm
from visft_ds.interop.weights import Lazy, Weights
from visft_ds.models import Backbone
from visft_ds.monitor.console import gauge


class Prompt(NamedTuple):
    """The question to the model about an image."""

    image: int  #: its number
    text: str
    chat: str  #: in place of the text where the model has a form of chats


def by_vlm(
    request: Request,
    sets: Mapping[str, ImageSet],
    prompts: Sequence[Prompt],
    longest: int,
    numbers: Sequence[Number],
    settings: Mapping[str, Any],
    scores: Callable[[Sequence[str]], Scores],
) -> Benchmark:
    """Benchmark of what the vision-language model of a request says of the images of the set `test`.

    Args:
        longest: tokens of what it says, at most.
        settings: all else that scores depend on.
        scores: of the texts, one of each prompt.
    """
    folder = Path(str(request.vlm))

    @cache
    def opened() -> Vlm:
        return open_vlm(folder)

    def check(base: Encoder) -> None:
        opened().check_base(_tower(base, opened()))

    def said(encoder: Encoder, settings: Settings, names: Names) -> Scores:
        from transformers import AutoProcessor

        vlm = opened()
        vlm.put(_tower(encoder, vlm))
        with reading(folder, "a folder of transformers with tokenizer and image processor"):
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        vlm.model.to(settings.device)
        texts = []
        for prompt in gauge(request.label, len(prompts), "texts", prompts):
            texts.append(_say(vlm.model, processor, sets["test"].read(prompt.image), prompt, longest))
        yield from scores(texts)

    return Benchmark(
        request.label,
        sets,
        kinds=("pooled",),
        numbers=numbers,
        settings={**settings, "vlm": files_in(folder)},
        scores=by_features,
        check_base=check,
        published=said,
    )


def by_features(features: Features, names: Names) -> Scores:
    """Stand where scores are of texts that the encoder itself leads to, in Benchmark.published."""
    raise AssertionError(names)


def files_in(folder: Path) -> str:
    """Hash of the names, sizes and times of the files in a folder."""
    return digest(f"{path.name} {stamp(path)}" for path in sorted(folder.glob("*")) if path.is_file())


def backbone_and_weights(encoder: Encoder, what: str) -> tuple[Backbone, dict[str, Tensor]]:
    """(the backbone of an encoder, its weights on the CPU, an adapter merged).

    Args:
        what: needs a backbone of ours, for the error.

    Raises:
        ValueError: a model of open_clip.
    """
    module: Any = encoder.module
    module = getattr(module, "module", module)  # where it is read after a block
    backbone = getattr(module, "backbone", None)
    if backbone is None:
        raise ValueError(f"{what} takes towers of visft_ds and timm, not models of open_clip")
    weights = weights_of(replace(encoder, module=module, text=None))
    return backbone, {name: tensor.cpu() for name, tensor in weights.items()}


def _tower(encoder: Encoder, vlm: Vlm) -> dict[str, Lazy]:
    """The weights of an encoder's tower by the names of the model to have them."""
    backbone, weights = backbone_and_weights(encoder, "vlm=")
    tensors = {name: Lazy.of(tensor) for name, tensor in weights.items()}
    return vlm.names(Weights(tensors, Path(backbone.describe())), built(model_of(backbone), "meta"))


@torch.no_grad()
def _say(model: Any, processor: Any, image: Image.Image, prompt: Prompt, longest: int) -> str:
    """The first line that a model says of an image."""
    text = prompt.text
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt.chat}]
        chat = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt").to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=longest)[0]
    asked = inputs["input_ids"][0]
    if torch.equal(tokens[: len(asked)], asked):  # some models repeat it
        tokens = tokens[len(asked) :]
    answer = processor.decode(tokens, skip_special_tokens=True).strip()
    return str(answer.split("\n")[0])
