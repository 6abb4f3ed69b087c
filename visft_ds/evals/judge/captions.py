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

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from visft_ds.evals.judge.benchmark import Benchmark, ImageSet, Number, Score
from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.encoding import Settings
from visft_ds.evals.judge.images import digest, from_files, read_json, stamp
from visft_ds.evals.judge.retrieval import Pairs, captioned_images, captions_by_image, files_by_name
from visft_ds.evals.judge.vlm_text import Request, backbone_and_weights, by_text, by_vlm
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
    def numbers(self) -> list[Number]:
        """The number of all images, and that of each domain."""
        domains = sorted(set(self.domains) - {""})
        return [ALL, *map(of_domain, domains)]

    def scores(self, captions: Sequence[str]) -> Iterator[Score]:
        """CIDEr-D of a caption of each image."""
        generated = [ptb_words(caption) for caption in captions]
        true = [[ptb_words(text) for text in texts] for texts in self.references]
        domains = np.array(self.domains)
        parts = {ALL.name: np.arange(len(domains))}
        for domain in sorted(set(self.domains) - {""}):
            parts[of_domain(domain).name] = np.flatnonzero(domains == domain)
        for name, numbers in parts.items():
            chosen = numbers.tolist()
            values = cider_of_images([true[n] for n in chosen], [generated[n] for n in chosen])
            yield Score(name, np.array(values), numbers)


def captions_of_vlm(label: str, data: CaptionedSet, folder: Path) -> Benchmark:
    """Captions of the model in a folder."""
    requests = [Request(number, PROMPT, CHAT) for number in range(len(data.images))]
    settings = {**_settings(data), "protocol": [PROMPT, CHAT, LONGEST]}
    return by_vlm(
        label, folder, {"test": data.images}, requests, LONGEST, data.numbers, settings, data.scores
    )


def captions_of_head(label: str, data: CaptionedSet, run: Path) -> Benchmark:
    """Captions of the captioning head of a run."""

    @cache
    def opened() -> Model:
        from visft_ds.predict.model import load

        return load(run, tasks="captioning", adapter="none", device="cpu", precision="fp32")

    def check(base: Encoder) -> None:
        _put(base, opened(), run)

    def scores(encoder: Encoder, settings: Settings, names: Collection[str]) -> Iterator[Score]:
        model = opened()
        _put(encoder, model, run)
        captions = []
        numbers = range(len(data.images))
        for number in gauge(label, len(numbers), "captions", numbers):
            captions.append(model.predict(data.images.read(number)).caption or "")
        yield from data.scores(captions)

    export = sorted(path for path in (run / "export").glob("*") if path.is_file())
    settings: dict[str, object] = {
        **_settings(data),
        "head": digest(f"{path.name} {stamp(path)}" for path in export),
    }
    benchmark = by_text(label, {"test": data.images}, data.numbers, settings, scores)
    return replace(benchmark, check_base=check)


def _settings(data: CaptionedSet) -> dict[str, object]:
    texts = [text for texts in data.references for text in texts]
    return {"benchmark": "captions 1", "captions": digest([*texts, *data.domains])}


@torch.no_grad()
def _put(encoder: Encoder, model: Model, run: Path) -> None:
    """Copy the weights of an encoder into the backbone of a model."""
    _, weights = backbone_and_weights(encoder, "head=")
    for name, tensor in model.backbone.backbone.state_dict().items():
        if name not in weights or weights[name].shape != tensor.shape:
            raise ValueError(f"head={run}: its captioning head reads another architecture than BASE's")
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
    mute = [path for path, captions in pairs if not any(map(str.strip, captions))]
    if mute:
        raise ValueError(f"{source}: {len(mute)} images have no caption, first {mute[0]}")
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
