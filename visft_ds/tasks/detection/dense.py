"""Dense detection: every cell of a grid of features tells classes and a box around itself (after FCOS, arXiv
1904.01355).

Boxes relative to cells are learnt from few photographs, where the queries of a DETR learn places by heart.
With `masks` each box that stays has one (`roi`).

Letters: B images, h w grid, S = h * w cells, D backbone width, C classes, N objects of all images
concatenated, K boxes of an image that may stay, M masks of all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visft_ds.data.samples import Batch, Map
from visft_ds.ops import at_least_float32, to_device
from visft_ds.tasks import Numbers, Results
from visft_ds.tasks.criterion import Denominators, Losses
from visft_ds.tasks.detection.config import DetectionHeadConfig, DetectionLoss
from visft_ds.tasks.detection.data import DetectionTargets, InstanceTargets, box_results, corners_of
from visft_ds.tasks.detection.loss import generalized_box_iou
from visft_ds.tasks.detection.roi import BoxMasks, mask_code
from visft_ds.tasks.masks.norm import GROUPS, MaskedGroupNorm
from visft_ds.tasks.transformer import cell_centres

#: Cells whose centre is less than this many cells from that of an object, and inside its box, answer for it.
RADIUS = 1.5
#: Cells that answer for a large object; sums over all cells are divided by as many for each object.
CELLS = round((2 * RADIUS) ** 2)
OVERLAP = 0.5  #: above it the weaker of two boxes of a class is dropped
CANDIDATES = 4  #: boxes of an image that are considered, for each that may stay
LEAST_SCORE = 0.01  #: of a box that gets a mask: those of all others would take most of the time


@dataclass(frozen=True)
class Detections:
    """Boxes of each image that stay, the best first; of fewer than K, the last have the score -1."""

    scores: Tensor  #: (B, K)
    labels: Tensor  #: (B, K) int64, classes
    boxes: Tensor  #: (B, K, 4) corners relative to the valid image, in [0, 1]


@dataclass(frozen=True)
class DenseOutput:
    """Predictions of all cells."""

    logits: Tensor  #: (B, S, C)
    boxes: Tensor  #: (B, S, 4) corners, relative to the valid (unpadded) image
    centres: Tensor  #: (B, S, 2) x and y of the cells, in the same unit
    pitch: Tensor  #: (B, 2) width and height of a cell, in the same unit
    valid: Tensor  #: (B, S) bool: the cell shows image
    max_detections: int = 100  #: most boxes of an image
    detections: Detections | None = None  #: those that have masks, in prediction
    chosen: Tensor | None = None  #: (M,) int64 among the B * K detections, or regions of the targets
    masks: Tensor | None = None  #: (M, SIDE, SIDE) logits in the boxes or regions that are chosen


class DenseHead(nn.Module):
    """Feature maps -> scores of the classes and a box, from every cell of the map `box_map`, the finest.

    Coarser maps are interpolated to that grid, and all are joined; finer ones are for masks. A 1x1
    convolution to `width`, two 3x3 convolutions, group norms, and a 3x3 convolution each for classes and for
    the logarithms of the four distances to the sides, in cells. What valid cells predict does not depend on
    how far their batch is padded.
    """

    def __init__(self, widths: Sequence[int], options: DetectionHeadConfig) -> None:
        """A head for maps of these widths."""
        super().__init__()
        width = options.width
        self.max_detections = options.max_detections
        if options.box_map >= len(widths):
            raise ValueError(
                f"visft.tasks.detection.head.box_map = {options.box_map}: the backbone is read at "
                f"{len(widths)} maps, which are numbered from 0"
            )
        self.box_map = options.box_map
        self.masks = BoxMasks(widths, width) if options.masks else None
        self.input_proj = nn.Conv2d(sum(widths[self.box_map :]), width, kernel_size=1)
        self.input_norm = MaskedGroupNorm(GROUPS, width)
        convs = [nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2)]
        self.convs = nn.ModuleList(convs)
        self.norms = nn.ModuleList(MaskedGroupNorm(GROUPS, width) for _ in convs)
        self.class_embed = nn.Conv2d(width, options.num_classes, 3, padding=1)
        self.box_embed = nn.Conv2d(width, 4, 3, padding=1)
        # At first nearly no cell sees an object, and boxes have a side of five cells.
        for layer, bias in ((self.class_embed, -4.0), (self.box_embed, 1.0)):
            assert layer.bias is not None
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.constant_(layer.bias, bias)

    def forward(
        self, maps: Sequence[Map], regions: Tensor | None = None, chosen: Tensor | None = None
    ) -> DenseOutput:
        """Scores, boxes and masks from the maps of a backbone, the finest first.

        Args:
            regions, chosen: of `InstanceTargets`, for losses; else there are masks of the detections.
        """
        output = self.boxes(maps)
        if self.masks is None:
            return output
        if regions is None or chosen is None:
            detections = detect(output)
            regions = detections.boxes
            chosen = (detections.scores >= LEAST_SCORE).flatten().nonzero().flatten()
            output = replace(output, detections=detections)
        return replace(output, chosen=chosen, masks=self.masks(maps, regions, chosen))

    def boxes(self, maps: Sequence[Map]) -> DenseOutput:
        """Scores and boxes of all cells, without masks, from the maps of a backbone."""
        finest, *coarser = maps[self.box_map :]
        grid = finest.features.shape[-2:]
        features = torch.cat([finest.features, *(map_.resized(grid) for map_ in coarser)], dim=1)
        valid = finest.valid
        inside = valid[:, None].to(features.dtype)
        x = self.input_norm(self.input_proj(features), valid)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = conv(x * inside)
            x = F.relu(norm(x, valid))
        x = x * inside
        logits = _of_cells(self.class_embed(x))
        columns_and_rows = finest.cells.flip(1).to(logits.dtype)
        pitch = to_device(1 / columns_and_rows, valid.device)  # (B, 2)
        in_cells = _of_cells(self.box_embed(x)).exp()
        distances = in_cells * pitch.repeat(1, 2)[:, None]
        centres = cell_centres(grid, logits) * pitch[:, None]
        boxes = torch.cat((centres - distances[..., :2], centres + distances[..., 2:]), dim=-1)
        return DenseOutput(logits, boxes, centres, pitch, valid.flatten(1), self.max_detections)


def _of_cells(map_: Tensor) -> Tensor:
    """(B, n, h, w) -> (B, S, n)."""
    return at_least_float32(map_).flatten(2).transpose(1, 2)


class DenseCriterion:
    """Focal loss of the classes of all cells, and generalized IoU of the boxes of the cells that answer for
    an object.

    `ce` and `giou` weigh the two, `mask` the binary cross-entropy of masks, a mean over the cells of each. A
    cell answers for an object if its centre lies inside the box and less than RADIUS cells from the box's, or
    is the nearest to that; of several objects the smallest counts. The overlap is a mean over the cells of an
    object; the focal loss is divided by CELLS as well.
    """

    def __init__(self, head: DetectionHeadConfig, loss: DetectionLoss) -> None:
        self.weights = {"ce": loss.ce, "giou": loss.giou}
        if head.masks:
            self.weights["mask"] = loss.mask

    def count(self, batch: Batch) -> Numbers:
        """Objects, by which losses of boxes are divided, and masks."""
        targets = batch.targets["detection"]
        counts = {"boxes": float(targets.counts.sum())}
        if isinstance(targets, InstanceTargets):
            counts["masks"] = float(len(targets.masks))
        return counts

    def __call__(
        self,
        output: DenseOutput,
        targets: DetectionTargets,
        loss_denominators: Denominators,
        image_ids: Tensor | None = None,
    ) -> Losses:
        objects = assign(output, targets)
        number = loss_denominators["boxes"]
        ce = self.loss_labels(output, targets, objects) / (CELLS * number)
        giou = self.loss_boxes(output, targets, objects) / number
        losses = {"ce": ce, "giou": giou}
        if output.masks is not None:
            assert isinstance(targets, InstanceTargets)
            of_masks = self.loss_masks(output.masks, targets.masks)
            losses["mask"] = of_masks / loss_denominators["masks"]
        return losses

    def loss_masks(self, masks: Tensor, true: Tensor) -> Tensor:
        """Binary cross-entropy of logits (M, SIDE, SIDE), a mean over the cells of a mask, summed over masks.

        `true` (M, SIDE, SIDE) uint8 is the covered part of each cell, 0 to 255: at least half is inside.
        """
        inside = (true > 127).to(masks.dtype)
        of_cells = F.binary_cross_entropy_with_logits(masks, inside, reduction="none")
        return of_cells.mean(dim=(1, 2)).sum()

    def loss_labels(self, output: DenseOutput, targets: DetectionTargets, objects: Tensor) -> Tensor:
        """Focal loss of the classes, summed over all cells; `objects` (B, S) of `assign`."""
        from torchvision.ops import sigmoid_focal_loss  # brings torch's compiler: more than a second

        # One label more, for cells without an object, which is none of the classes.
        labels = F.pad(targets.labels, (0, 1), value=-1)[objects]
        logits = output.logits
        classes = torch.arange(logits.shape[-1], device=labels.device)
        is_class = labels[..., None] == classes
        focal = sigmoid_focal_loss(logits, is_class.to(logits.dtype)).sum(dim=-1)
        return (focal * output.valid).sum()

    def loss_boxes(self, output: DenseOutput, targets: DetectionTargets, objects: Tensor) -> Tensor:
        """1 - generalized IoU of the boxes of cells, a mean over those of an object, summed over objects."""
        number = len(targets.boxes)
        corners = corners_of(targets.boxes.to(output.boxes.dtype))
        # One box more, for cells without an object.
        true = F.pad(corners, (0, 0, 0, 1), value=0.5)[objects]
        answers = (objects < number).to(output.logits.dtype)  # (B, S)
        ones = torch.ones_like(answers).flatten()
        cells_of = answers.new_zeros(number + 1)  # of each object
        cells_of.index_add_(0, objects.flatten(), ones)
        missed = (1 - generalized_box_iou(output.boxes, true)) * answers
        return (missed / cells_of[objects]).sum()


@torch.no_grad()
def assign(output: DenseOutput, targets: DetectionTargets) -> Tensor:
    """(B, S) int64: the object (row of the packed targets) that each cell answers for; N where there is none.

    All shapes follow from those of the inputs: the host does not wait for the device.
    """
    number = len(targets.boxes)
    images, cells = output.valid.shape
    device = output.valid.device
    image_of = targets.image_of()
    valid = output.valid[image_of]  # (N, S)
    centres = targets.boxes[:, None, :2]
    sides = targets.boxes[:, None, 2:]
    away = (output.centres[image_of] - centres).abs()  # (N, S, 2)
    pitch = output.pitch[image_of][:, None]
    away_in_cells = away / pitch
    near = (away_in_cells < RADIUS).all(dim=-1)
    inside = (away <= sides / 2).all(dim=-1)
    distance = away_in_cells.square().sum(dim=-1)
    distance = distance.masked_fill(~valid, torch.inf)
    nearest = distance.argmin(dim=1, keepdim=True)
    is_nearest = torch.arange(cells, device=device) == nearest
    answers = (near & inside & valid) | is_nearest
    # Objects by area, the smallest first: the least rank wins a cell.
    areas = sides.prod(dim=-1).flatten()
    by_area = areas.argsort(stable=True)
    rank = torch.empty_like(by_area)
    rank.scatter_(0, by_area, torch.arange(number, device=device))
    ranks = torch.where(answers, rank[:, None], number)  # (N, S)
    rows_of_objects = image_of[:, None].expand(-1, cells)
    winner = torch.full((images, cells), number, device=device)
    winner.scatter_reduce_(0, rows_of_objects, ranks, "amin")
    return F.pad(by_area, (0, 1), value=number)[winner]


@torch.no_grad()
def detect(output: DenseOutput) -> Detections:
    """The boxes that stay: cut off at the borders of the image, and without doubles.

    The best pairs of cell and class, CANDIDATES x `output.max_detections` of an image, go through non-maximum
    suppression within their class. All shapes follow from those of the inputs.
    """
    from torchvision.ops import batched_nms  # brings torch's compiler: more than a second

    scores = output.logits.sigmoid().masked_fill(~output.valid[..., None], -1.0)
    classes = scores.shape[-1]
    of_images = scores.flatten(1)  # (B, S * C)
    number = min(CANDIDATES * output.max_detections, of_images.shape[1])
    best, pairs = of_images.topk(number, dim=1)
    cells = pairs // classes
    labels = pairs % classes
    boxes = output.boxes.clamp(0, 1).gather(1, cells[..., None].expand(-1, -1, 4))
    stays = torch.zeros_like(best, dtype=torch.bool)
    for image_stays, of_image, score, label in zip(stays, boxes, best, labels, strict=True):
        image_stays[batched_nms(of_image.double(), score.double(), label, OVERLAP)] = True
    best = best.masked_fill(~stays, -1.0)
    order = best.argsort(dim=1, descending=True, stable=True)[:, : output.max_detections]
    corners = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    return Detections(best.gather(1, order), labels.gather(1, order), corners)


@torch.no_grad()
def dense_results(
    output: DenseOutput,
    batch: Batch,
    classes: Sequence[int] | None = None,
    threshold: float = 0.0,
) -> Results:
    """Predictions in COCO's results format, see `box_results`; with a segmentation where the head has masks.

    Images without `batch.real` are left out.
    """
    detections = output.detections or detect(output)
    scores = detections.scores.cpu()
    labels = detections.labels.cpu()
    boxes = detections.boxes.cpu()
    least = max(threshold, 0.0)
    masks = {}
    if output.masks is not None and output.chosen is not None:
        least = max(least, LEAST_SCORE)
        logits = output.masks.float().cpu().numpy()
        masks = dict(zip(output.chosen.tolist(), logits, strict=True))
    chosen = (batch.real[:, None] & (scores >= least)).nonzero()
    results = box_results(batch, chosen, boxes, scores, labels, classes)
    if masks:
        for (image, place), result in zip(chosen.tolist(), results, strict=True):
            height, width = batch.original_sizes[image].tolist()
            left, top, across, down = result["bbox"]
            corners = [left, top, left + across, top + down]
            mask = masks[image * scores.shape[1] + place]
            result["segmentation"] = mask_code(mask, corners, (height, width))
    return results
