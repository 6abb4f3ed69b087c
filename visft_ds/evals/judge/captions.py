"""Captions of images by a vision-language model, or by the captioning head of a run, that reads a tower that
is judged.

| layout | files |
|---|---|
| NoCaps | `nocaps_val_4500_captions.json`, its images anywhere below the folder by their names |
| COCO, Karpathy's splits | as for retrieval |

CIDEr-D by the words of coco-caption's tokenizer; in how many images an n-gram is there is counted over the
references of the images that a number is about, as if each of NoCaps' domains were a data set of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from visft_ds.evals.judge.benchmark import Benchmark, ImageSet, IntArray, Names, Number, Score, Scores
from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.encoding import Settings
from visft_ds.evals.judge.images import digest, from_files, read_json
from visft_ds.evals.judge.kinds import Request
from visft_ds.evals.judge.models import alike
from visft_ds.evals.judge.retrieval import (
    Pairs,
    captioned_images,
    captions_by_image,
    check_captions,
    files_by_name,
)
from visft_ds.evals.judge.vlm_text import Prompt, backbone_and_weights, by_features, by_vlm, files_in
from visft_ds.files import checked_name, reading
from visft_ds.monitor.console import gauge
from visft_ds.tasks.captioning.metrics import cider_of_images
from visft_ds.tasks.captioning.tokenizer import ptb_words

if TYPE_CHECKING:
    from visft_ds.predict.model import Model

PROMPT = "a photo of"  # of BLIP-2's paper, https://arxiv.org/abs/2301.12597
CHAT = "Provide a one-sentence caption for the provided image."  # usual for models in LLaVA's style
LONGEST = 30  #: tokens of a caption

ALL = Number(
    "CIDEr-D",
    how="Captions of a vision-language model with the tower in it, the likeliest words, at most "
    f"{LONGEST} tokens, after '{PROMPT}', or to '{CHAT}' in the form of its chats; or of the captioning head "
    "of a run that reads the tower. CIDEr-D times 100, as papers print it.",
    side=224,
)


def of_domain(domain: str) -> Number:
    """The number of one domain of NoCaps."""
    how = f"The same of the images of the domain {domain}, over whose captions n-grams are counted."
    return Number(f"CIDEr-D ({domain})", how=how, side=224)


NUMBERS = (ALL, of_domain("DOMAIN"))


@dataclass(frozen=True)
class CaptionedSet:
    """Images with captions that people wrote."""

    images: ImageSet
    references: tuple[tuple[str, ...], ...]  #: of each image
    domains: tuple[str, ...]  #: of each image, as NoCaps has them; "" for other data

    @property
    def parts(self) -> dict[Number, IntArray]:
        """Number -> the images that it is about: of all of them, and of each domain."""
        domains = np.array(self.domains)
        parts = {ALL: np.arange(len(domains))}
        for domain in sorted(set(self.domains) - {""}):
            parts[of_domain(domain)] = np.flatnonzero(domains == domain)
        return parts

    def scores(self, captions: Sequence[str]) -> Scores:
        """CIDEr-D of a caption of each image."""
        generated = [ptb_words(caption) for caption in captions]
        true = [[ptb_words(text) for text in texts] for texts in self.references]
        for number, images in self.parts.items():
            values = cider_of_images([true[n] for n in images], [generated[n] for n in images])
            yield Score(number.name, np.array(values), images)


def benchmark(request: Request) -> Benchmark:
    """CIDEr-D of captions by a vision-language model, or by the head of a run."""
    if (request.vlm is None) == (request.head is None):
        raise ValueError(
            f"--on caption={request.source}: give vlm=FOLDER of a vision-language model, or head=RUN whose "
            "captioning head reads each tower"
        )
    (data,) = request.with_groups(read_captioned(request.source, request.split))
    if request.head is not None:
        return _of_head(request, data, Path(request.head))
    prompts = [Prompt(number, PROMPT, CHAT) for number in range(len(data.images))]
    return by_vlm(
        request, {"test": data.images}, prompts, LONGEST, list(data.parts), _settings(data), data.scores
    )


def _of_head(request: Request, data: CaptionedSet, run: Path) -> Benchmark:
    """Captions of the captioning head of a run."""

    @cache
    def opened() -> Model:
        from visft_ds.predict.model import load

        return load(run, tasks="captioning", adapter="none", device="cpu", precision="fp32")

    def check(base: Encoder) -> None:
        _put(base, opened(), run)

    def scores(encoder: Encoder, settings: Settings, names: Names) -> Scores:
        model = opened()
        _put(encoder, model, run)
        captions = []
        numbers = range(len(data.images))
        for number in gauge(request.label, len(numbers), "captions", numbers):
            captions.append(model.predict(data.images.read(number)).caption or "")
        yield from data.scores(captions)

    return Benchmark(
        request.label,
        sets={"test": data.images},
        kinds=("pooled",),
        numbers=list(data.parts),
        settings={**_settings(data), "head": files_in(run / "export")},
        scores=by_features,
        check_base=check,
        published=scores,
    )


def _settings(data: CaptionedSet) -> dict[str, object]:
    captions = digest([repr(data.references), repr(data.domains)])
    return {"benchmark": "captions 1", "captions": captions}


@torch.no_grad()
def _put(encoder: Encoder, model: Model, run: Path) -> None:
    """Copy the weights of an encoder into the backbone of a model."""
    _, weights = backbone_and_weights(encoder, "head=")
    own = model.backbone.backbone.state_dict()
    if not alike(own, weights):
        raise ValueError(f"head={run}: its captioning head reads another architecture than BASE's")
    for name, tensor in own.items():
        tensor.copy_(weights[name])


def read_captioned(source: str, split: str | None) -> CaptionedSet:
    """Images and captions of a data set in a layout of the table above.

    Raises:
        ValueError: no such layout or part, an image without file or without a caption.
    """
    root = Path(source)
    files = sorted(root.glob(f"nocaps_{split or 'val'}*captions.json"))
    if files:
        pairs, domains = _nocaps(files[0], root)
    else:
        pairs = captioned_images(root, split)
        domains = [""] * len(pairs)
    check_captions(source, pairs)
    references = tuple(tuple(captions) for _, captions in pairs)
    return CaptionedSet(from_files([path for path, _ in pairs], root), references, tuple(domains))


def _nocaps(path: Path, root: Path) -> tuple[Pairs, list[str]]:
    file_of_name = files_by_name(root)
    pairs = []
    domains = []
    with reading(path, "captions of NoCaps"):
        content = read_json(path)
        texts = captions_by_image(content)
        for image in content["images"]:
            name = image["file_name"]
            pairs.append((file_of_name.get(name) or root / checked_name(name, path), texts[image["id"]]))
            domains.append(str(image["domain"]))
    return pairs, domains
