"""Linear classifiers of images, as facebookresearch/dinov2 trains them: dinov2/eval/{linear,utils}.py,
dinov2/data/transforms.py.

Classifiers of the class token, and of it beside the mean patch, learn for 12,500 steps of 1,024 random crops
by SGD at 13 learning rates.

Differs from the source in: the tokens are those of one block (there also of the last four together), and a
fiftieth of the training images chooses the classifier and teaches none (there the test images choose).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2 as transforms

from visft_ds.evals.judge.benchmark import FloatArray, Score, resamples, units
from visft_ds.evals.judge.classes import ClassSet
from visft_ds.evals.judge.crops import random_crops, rounds
from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.encoding import Settings, encode_images, forward
from visft_ds.evals.judge.knn import QUERIES
from visft_ds.evals.judge.logistic import RESAMPLES
from visft_ds.evals.judge.rows import Rows, accuracy, held_out
from visft_ds.monitor.console import gauge

KINDS = ("pooled", "mean")  #: features of an image: its class token, its mean patch
_NTH = 50  # training image of a class chooses the classifier
_AREA = (0.08, 1.0)  # of a crop, share of the image
_RATIO = (3 / 4, 4 / 3)

STEPS = 12_500
BATCH = 1024
#: Of learning, each for a classifier of its own, times BATCH / 256.
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
MOMENTUM = 0.9


def image_rows(features: Mapping[str, Tensor], data: ClassSet) -> Rows:
    """Images as rows: their class tokens with, if given, their mean patches beside them."""
    inputs = _inputs(features)
    labels = torch.from_numpy(data.labels).to(inputs.device)
    return Rows(inputs, labels, torch.arange(len(labels), device=inputs.device))


def _inputs(features: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([features[kind] for kind in KINDS if kind in features], dim=1)


def linear_accuracy(name: str, encoder: Encoder, train: ClassSet, test: Rows, settings: Settings) -> Score:
    """Share of rows whose class the classifier predicts that is best on held-out training images.

    Args:
        test: class tokens, with mean patches beside them.
    """
    choosing, taught = _held_out(train)
    features = encode_images(encoder, choosing.images, KINDS, settings, "held-out images")
    chooses = image_rows(features, choosing)
    copies_of_images = resamples(len(taught.labels), RESAMPLES, taught.images.groups)
    copies = torch.from_numpy(copies_of_images).float()
    learning_rates = torch.tensor(RATES, device=settings.device) * BATCH / 256
    classifiers = [
        Classifiers(learning_rates.repeat(len(copies)), width, len(train.classes))
        for width in (features["pooled"].shape[1], chooses.features.shape[1])
    ]
    for drawn, inputs, labels in _crops(encoder, taught, settings):
        counts = copies[:, drawn].repeat_interleave(len(learning_rates), dim=0).to(settings.device)
        for several in classifiers:
            several.learn(inputs, labels, counts)
    levels = [several.correct(chooses)[: len(learning_rates)].mean(axis=1) for several in classifiers]
    best_inputs, best_rate = np.unravel_index(np.argmax(levels), (len(levels), len(learning_rates)))
    correct = classifiers[best_inputs].correct(test)[best_rate :: len(learning_rates)]
    return accuracy(name, correct, test)


def _held_out(train: ClassSet) -> tuple[ClassSet, ClassSet]:
    """(training images that choose a classifier, those that teach)."""
    labels = torch.from_numpy(train.labels)
    owners = torch.from_numpy(units(len(labels), train.images.groups))
    chooses = held_out(labels, owners, _NTH).numpy()
    if not chooses.any():
        first = train.images.names[0]
        raise ValueError(
            f"each class has fewer than five training images ({first}, ...), and a fifth of them chooses the "
            "learning rate: give more images, or --quick"
        )
    return train.subset(chooses), train.subset(~chooses)


class Classifiers(nn.Module):
    """Linear classifiers, one for each learning rate (classifiers,), trained by SGD with a cosine schedule.

    All read the first `width` channels of the same inputs: (n, D) -> (classifiers, n, classes).
    """

    def __init__(self, learning_rates: Tensor, width: int, classes: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(classes, width + 1, generator=generator) * 0.01
        weight = start[:, :-1].to(learning_rates.device)
        self.weight = nn.Parameter(weight.repeat(len(learning_rates), 1, 1))
        self.bias = nn.Parameter(weight.new_zeros(len(learning_rates), 1, classes))
        self.learning_rates = learning_rates
        self.optimizer = torch.optim.SGD(self.parameters(), lr=1.0, momentum=MOMENTUM)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)

    def forward(self, inputs: Tensor) -> Tensor:
        width = self.weight.shape[2]
        return inputs[:, :width] @ self.weight.mT + self.bias

    def learn(self, inputs: Tensor, labels: Tensor, counts: Tensor) -> None:
        """Make a step.

        Args:
            counts: (classifiers, n), how often each input counts.
        """
        logits = self(inputs)
        truth = labels.expand(len(logits), -1)
        losses = F.cross_entropy(logits.mT, truth, reduction="none")
        # SGD without decay is linear in the gradient: a loss times a rate is a step at this rate.
        loss = self.learning_rates @ (losses * counts).mean(dim=1)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()

    @torch.no_grad()
    def correct(self, rows: Rows) -> FloatArray:
        """(classifiers, n), 1.0 where the class of a row is predicted."""
        device = self.weight.device
        correct = []
        for batch in rows.batches(QUERIES):
            predicted = self(batch.features.to(device)).argmax(dim=2)
            is_correct = predicted == batch.labels.to(device)
            correct.append(is_correct.double().cpu().numpy())
        return np.concatenate(correct, axis=1)


def crop(image: Image.Image, encoder: Encoder) -> Tensor:
    """A random part of an image, stretched to a square, in half of the cases mirrored."""
    bicubic = transforms.InterpolationMode.BICUBIC
    resized = transforms.RandomResizedCrop(encoder.side, scale=_AREA, ratio=_RATIO, interpolation=bicubic)
    return encoder.normalised(transforms.RandomHorizontalFlip(0.5)(resized(image)))


def _crops(encoder: Encoder, train: ClassSet, settings: Settings) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of numbers, features and labels of random crops; the n-th crop is the same for every model."""

    def example(number: int) -> tuple[Tensor, int]:
        return crop(train.images.read(number), encoder), int(train.labels[number])

    order = rounds(len(train.labels), STEPS * BATCH)
    batches = random_crops(order, BATCH, example, settings)
    encoder.module.to(settings.device)
    for drawn, pixels, labels in gauge("linear classifier", STEPS, "steps", batches):
        features = forward(encoder, pixels, KINDS, settings)
        yield drawn, _inputs(features), labels.to(settings.device)
