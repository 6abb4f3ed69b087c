"""Dense detection: every cell of the feature map tells classes and a box around itself (after FCOS, arXiv
1904.01355).

Boxes relative to cells are learnt from few photographs, where the queries of a DETR learn places by heart.

Letters: B images, h w grid, S = h * w cells, D backbone width, C classes, N objects of all images
concatenated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, sigmoid_focal_loss

from visft_ds.data.samples import Batch, Map
from visft_ds.ops import at_least_float32, to_device
from visft_ds.tasks import Results
from visft_ds.tasks.detection.config import DetectionHeadConfig, DetectionLoss
from visft_ds.tasks.detection.data import DetectionTargets, box_results
from visft_ds.tasks.masks.norm import GROUPS, MaskedGroupNorm
from visft_ds.tasks.matching import centers_to_corners, generalized_box_iou

#: Cells whose centre is less than this many cells from that of an object, and inside its box, answer for it.
RADIUS = 1.5
#: Cells that answer for a large object; sums over all cells are divided by as many for each object.
CELLS = round((2 * RADIUS) ** 2)
#: Overlap above which the weaker of two boxes of a class is dropped, and the most boxes that are considered
#: and kept.
OVERLAP, CANDIDATES, KEPT = 0.5, 400, 100


@dataclass(frozen=True)
class DenseOutput:
    """Predictions of all cells."""

    logits: Tensor  #: (B, S, C)
    boxes: Tensor  #: (B, S, 4) corners, relative to the valid (unpadded) image
    centres: Tensor  #: (B, S, 2) x and y of the cells, in the same unit
    pitch: Tensor  #: (B, 2) width and height of a cell, in the same unit
    valid: Tensor  #: (B, S) bool: the cell shows image


class DenseHead(nn.Module):
    """Feature map -> scores of the classes and a box, from every cell.

    A 1x1 convolution to `width`, two 3x3 convolutions, group norms, and a 3x3 convolution each for classes
    and for the logarithms of the four distances to the sides. What valid cells predict does not depend on how
    far their batch is padded.
    """

    def __init__(self, in_channels: int, options: DetectionHeadConfig) -> None:
        super().__init__()
        width = options.width
        self.input_proj = nn.Conv2d(in_channels, width, kernel_size=1)
        self.input_norm = MaskedGroupNorm(GROUPS, width)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(MaskedGroupNorm(GROUPS, width) for _ in range(2))
        self.class_embed = nn.Conv2d(width, options.num_classes, 3, padding=1)
        self.box_embed = nn.Conv2d(width, 4, 3, padding=1)
        # At first nearly no cell sees an object, and boxes have a side of a quarter of the image.
        for embed, bias in ((self.class_embed, -4.0), (self.box_embed, -2.0)):
            nn.init.normal_(embed.weight, std=0.01)
            nn.init.constant_(embed.bias, bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Map]) -> DenseOutput:
        """Scores and boxes from the last map."""
        features, valid = maps[-1].features, maps[-1].valid
        inside = valid[:, None].to(features.dtype)
        x = self.input_norm(self.input_proj(features), valid)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x * inside), valid))
        x = x * inside
        logits, distances = (
            at_least_float32(embed(x)).flatten(2).transpose(1, 2)
            for embed in (self.class_embed, self.box_embed)
        )
        cells = maps[-1].cells  # the last ones of an image may show less of it than the others
        if cells is None:
            cells = torch.stack((valid.any(2).sum(1), valid.any(1).sum(1)), dim=1)
        pitch = to_device(1 / cells.flip(1).to(logits.dtype), valid.device)  # (B, 2)
        y, x_ = (
            torch.arange(side, device=valid.device, dtype=logits.dtype) + 0.5 for side in valid.shape[1:]
        )
        grid = torch.stack((x_.repeat(len(y)), y.repeat_interleave(len(x_))), dim=1)  # (S, 2)
        centres = grid * pitch[:, None]
        low, high = distances.exp().chunk(2, dim=-1)
        boxes = torch.cat((centres - low, centres + high), dim=-1)
        return DenseOutput(logits, boxes, centres, pitch, valid.flatten(1))


class DenseCriterion:
    """Focal loss of the classes of all cells, and generalized IoU of the boxes of the cells that answer for
    an object.

    `ce` and `giou` weigh the two. A cell answers for an object if its centre lies inside the box and less
    than RADIUS cells from the box's, or is the nearest to that; of several objects the smallest counts. The
    overlap is a mean over the cells of an object; the focal loss is divided by CELLS as well.
    """

    def __init__(self, head: DetectionHeadConfig, loss: DetectionLoss) -> None:
        self.weights: dict[str, float] = {"ce": loss.ce, "giou": loss.giou}

    def count(self, batch: Batch) -> dict[str, float]:
        return {"boxes": float(batch.targets["detection"].counts.sum())}

    def __call__(
        self,
        output: DenseOutput,
        targets: DetectionTargets,
        loss_denominators: Mapping[str, Tensor],
        image_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        objects = assign(output, targets)
        answers = (objects < len(targets.boxes)).to(output.logits.dtype)  # (B, S)
        # One row more, for cells without an object: its label is none of the classes.
        labels = F.pad(targets.labels, (0, 1), value=-1)[objects]
        boxes = F.pad(centers_to_corners(targets.boxes.to(output.boxes.dtype)), (0, 0, 0, 1), value=0.5)[
            objects
        ]
        wanted = (labels[..., None] == torch.arange(output.logits.shape[-1], device=labels.device)).to(
            answers.dtype
        )
        focal = sigmoid_focal_loss(output.logits, wanted).sum(dim=-1) * output.valid
        cells = torch.zeros(len(targets.boxes) + 1, dtype=answers.dtype, device=answers.device)
        cells = cells.index_add(0, objects.flatten(), torch.ones_like(answers).flatten())  # of each object
        missed = (1 - generalized_box_iou(output.boxes, boxes)) * answers / cells[objects]
        number = loss_denominators["boxes"]
        return {"ce": focal.sum() / (CELLS * number), "giou": missed.sum() / number}


@torch.no_grad()
def assign(output: DenseOutput, targets: DetectionTargets) -> Tensor:
    """(B, S) int64: the object (row of the packed targets) that each cell answers for; N where there is none.

    All shapes follow from those of the inputs: the host does not wait for the device.
    """
    number, (images, cells) = len(targets.boxes), output.valid.shape
    numbers = torch.arange(images, device=output.valid.device)
    image_of = torch.repeat_interleave(numbers, targets.counts, output_size=number)
    centres, sides = targets.boxes[:, None, :2], targets.boxes[:, None, 2:]
    away = (output.centres[image_of] - centres).abs()  # (N, S, 2)
    in_cells = away / output.pitch[image_of][:, None]
    near = (in_cells < RADIUS).all(dim=-1) & (away <= sides / 2).all(dim=-1)
    distance = in_cells.square().sum(dim=-1).masked_fill(~output.valid[image_of], torch.inf)
    near = near & output.valid[image_of]
    near = near | (torch.arange(cells, device=near.device) == distance.argmin(dim=1, keepdim=True))
    # Objects by area, the smallest first: the least place wins a cell.
    order = sides.prod(dim=-1).flatten().argsort(stable=True)
    place = torch.empty_like(order).scatter(0, order, torch.arange(number, device=order.device))
    found, rows = (
        torch.full((images, cells), number, device=order.device),
        image_of[:, None].expand(-1, cells),
    )
    found = found.scatter_reduce(0, rows, torch.where(near, place[:, None], number), "amin")
    return F.pad(order, (0, 1), value=number)[found]


@torch.no_grad()
def dense_results(
    output: DenseOutput, batch: Batch, classes: Sequence[int] | None = None, threshold: float = 0.0
) -> Results:
    """Predictions in COCO's results format, see `box_results`; boxes are cut off at the borders of the image.

    The best CANDIDATES pairs of cell and class go through non-maximum suppression within their class; at most
    KEPT of an image stay. Images without `batch.real` are left out.
    """
    scores = output.logits.sigmoid().masked_fill(~output.valid[..., None], -1.0).cpu()
    boxes, results = output.boxes.clamp(0, 1).cpu(), Results()
    for image in batch.real.nonzero().flatten().tolist():
        best, places = scores[image].flatten().topk(min(CANDIDATES, scores[image].numel()))
        places = places[best >= max(threshold, 0.0)]
        best = best[: len(places)]
        cells, labels = places // scores.shape[-1], places % scores.shape[-1]
        kept = batched_nms(boxes[image, cells], best, labels, OVERLAP)[:KEPT]
        results += box_results(batch, image, boxes[image, cells[kept]], best[kept], labels[kept], classes)
    return results
