"""A micro-batch of random pixels and labels of the largest size of a stream, and what a real step of it keeps
alive.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from visft_ds.config import ResolvedConfig
from visft_ds.data.samples import Batch
from visft_ds.prepare.model import prepare_model
from visft_ds.settings.task_schema import Stream
from visft_ds.tasks.captioning.data import CaptionTargets
from visft_ds.tasks.classes import COCO_CATEGORY_IDS
from visft_ds.tasks.criterion import counts_of, loss_denominators_of
from visft_ds.tasks.detection.data import DetectionTargets
from visft_ds.tasks.masks.data import MaskTargets
from visft_ds.tasks.masks.rasters import STRIDE, grid_size
from visft_ds.tasks.vocabulary import Vocabulary

#: Objects to an image; ids of the first caption (8 words, <start>, <end>; each further one has one more);
#: words.
OBJECTS, FIRST_IDS, VOCABULARY = 5, 10, 300
_LENGTHS = 11  #: of captions; from there on the first ones again
_PATCH = 14  # pixels


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages outside of files that operators make inside and that live: now, and most of
    them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                storage = leaf.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if size and storage.filename is None and key not in self._live and key not in before:
                    self._live.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, partial(self._gone, key, size))
        return result

    def _gone(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size


def real_peak(config: ResolvedConfig, task: str) -> int:
    """Bytes beside weights and optimizer at the fullest moment of a real forward and backward pass on the
    CPU.
    """
    words = Vocabulary(tuple(f"w{number}" for number in range(VOCABULARY - 4)))
    module = prepare_model(config, vocabulary=words).module
    module.train()
    batch = made_up_batch(config.visft.streams()[task], 2)
    denominators = loss_denominators_of(counts_of(module.criteria, [batch]), 1, batch.images.device)
    with LiveBytes() as live:
        module(batch, denominators)["loss"].backward()
    return live.peak


def made_up_batch(stream: Stream, images: int) -> Batch:
    """Random pixels and labels of the largest size of a stream."""
    side = stream.largest_side()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8, generator=generator)
    targets: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for task in stream.tasks:
            if task == "detection":
                targets[task] = _detection_targets(images)
            elif task == "segmentation":
                targets[task] = _segmentation_targets(images, side // _PATCH)
            else:
                targets[task] = _caption_targets(images)
    sizes, ids = torch.tensor([[side, side]] * images), torch.arange(images)
    return Batch(pixels, sizes, sizes, ids, ids, ids, torch.ones(images, dtype=torch.bool), targets)


def _detection_targets(images: int) -> DetectionTargets:
    """Boxes of 5 to 50 % of each side, anywhere inside."""
    sides = 0.05 + 0.45 * torch.rand(images * OBJECTS, 2)
    centres = sides / 2 + (1 - sides) * torch.rand(images * OBJECTS, 2)
    labels = torch.tensor(COCO_CATEGORY_IDS)[torch.randint(len(COCO_CATEGORY_IDS), (images * OBJECTS,))]
    return DetectionTargets(torch.cat((centres, sides), dim=1), labels, torch.full((images,), OBJECTS))


def _segmentation_targets(images: int, grid: int) -> MaskTargets:
    """Ellipses of 5 to 50 % of each side, anywhere, on the grid that the transforms make for such an
    image.
    """
    boxes = _detection_targets(images).boxes  # (N, 4) cxcywh
    rows, columns = grid_size((grid * _PATCH, grid * _PATCH), STRIDE)
    y, x = (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns
    x_part = ((x - boxes[:, :1]) / boxes[:, 2:3]).square()  # (N, wm)
    y_part = ((y - boxes[:, 1:2]) / boxes[:, 3:]).square()  # (N, hm)
    masks = (x_part[:, None] + y_part[..., None] < 0.25).to(torch.uint8) * 255
    return MaskTargets(
        masks=masks,
        labels=torch.randint(len(COCO_CATEGORY_IDS), (images * OBJECTS,)),
        grids=torch.tensor([(rows, columns)] * images),
        counts=torch.full((images,), OBJECTS),
        keys=torch.arange(images) + 1,
    )


def _caption_targets(images: int) -> CaptionTargets:
    """Captions of random words, one image after the other, each one a word longer."""
    lengths = FIRST_IDS + torch.arange(images) % _LENGTHS
    tokens = torch.randint(1, VOCABULARY - 3, (images, int(lengths.max())))
    tokens[:, 0] = VOCABULARY - 2
    places = torch.arange(tokens.shape[1])
    tokens[places == lengths[:, None] - 1] = VOCABULARY - 1
    return CaptionTargets(tokens.masked_fill(places >= lengths[:, None], 0), lengths, ((),) * images)
