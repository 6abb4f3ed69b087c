"""`visft.tasks.detection`: images, head and loss of detection. Defaults are those of the published code."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from visft_ds.settings.fields import (
    Above,
    Ascending,
    Count,
    Depth,
    Positive,
    Probability,
    Problems,
    Rate,
    Sides,
    StrictModel,
)
from visft_ds.settings.task_schema import ImageSizes, TaskConfig


class DetectionImage(ImageSizes):
    """Geometry of detection."""

    #: short sides before a random crop, in pixels; one is drawn (DETR: 400, 500, 600)
    crop_min_size: Sides = (400, 500, 600)
    #: smallest and largest side of the crop that half of the images get, in pixels (DETR's RandomSizeCrop)
    crop_size: Annotated[tuple[Positive, Positive], Ascending] = (384, 600)


class DetectionHeadConfig(StrictModel):
    """Options of the detection head."""

    #: kind of head; detr: the published asymmetric DETR, dense: a box from every cell of the finest map that
    #: is read, for few images
    type: Literal["detr", "dense"] = "detr"
    #: classes (COCO's raw ids are below 91); default for ids that are not COCO's: the number of categories
    num_classes: Positive = 91
    #: most boxes of an image, which AP and AR count as well (COCO: 100); default where an image of the data
    #: has more objects: half as many again
    max_detections: Positive = 100
    #: mask head, a mask for each box of the dense head; objects without a mask train boxes alone
    masks: bool = False
    #: map that the dense head's boxes are read from, besides coarser ones; masks are read from all: 0 is the
    #: first of model.out_indices
    box_map: Count = 0
    #: channels of the dense head, a multiple of 32; the keys below are the DETR's (values: ViSFT's)
    width: Positive = 64
    num_queries: Positive = 100  #: object queries, boxes that are predicted for an image (DETR: 100)
    encoder_dim: Positive = 128  #: channels of the encoder, a multiple of num_heads and of 4
    decoder_dim: Positive = 256  #: channels of the decoder, a multiple of num_heads
    encoder_layers: Depth = 6  #: transformer layers of the encoder
    decoder_layers: Depth = 6  #: transformer layers of the decoder, each with losses of its own
    num_heads: Positive = 8  #: attention heads of encoder and decoder
    ffn_dim: Positive = 1024  #: channels inside the MLPs of encoder and decoder
    dropout: Probability = 0.1  #: probability of dropout (DETR: 0.1)

    @property
    def most_objects(self) -> int:
        """Most objects that it finds in an image: a DETR has no more than its queries."""
        if self.type == "detr":
            return min(self.num_queries, self.max_detections)
        return self.max_detections

    def contradictions(self) -> Problems:
        if self.type != "dense" and self.masks:
            yield "masks", "is for the dense head: set type to dense, or train the task segmentation"
        if self.width % 32:
            yield "width", f"{self.width} is not a multiple of 32 (norm groups)"
        for name in ("encoder_dim", "decoder_dim"):
            if getattr(self, name) % self.num_heads:
                yield name, f"{getattr(self, name)} is not a multiple of num_heads = {self.num_heads}"
        if self.encoder_dim % 4:
            yield (
                "encoder_dim",
                f"{self.encoder_dim} is not a multiple of 4 (sine and cosine of two coordinates)",
            )


class DetectionLoss(StrictModel):
    """Weights of the detection losses, and in the DETR's matching; the dense head has ce (focal), giou and
    mask alone.
    """

    ce: Rate = 1.0  #: weight of the class loss (DETR: 1)
    l1: Rate = 5.0  #: weight of the L1 distance of boxes relative to the image (DETR: 5)
    giou: Rate = 2.0  #: weight of 1 - generalized IoU (DETR: 2)
    mask: Rate = 1.0  #: weight of the cross-entropy of masks (dense head)
    eos_coef: Above = 0.1  #: class weight of "no object" in the cross-entropy (DETR: 0.1)


class DetectionTask(TaskConfig):
    """`visft.tasks.detection`."""

    #: besides AR, whose name has the number of detections
    metrics = tuple(f"box/{name}" for name in ("AP", "AP50", "AP75", "APs", "APm", "APl"))
    shown = ("box/AP", "box/AP50", "mask/AP", "mask/AP50")
    main = "box/AP50"
    of_best_step = (
        "box/AP"  # AP50 comes near to 1 long before boxes fit: chance would choose among such steps
    )
    hub_task = "object-detection"
    published = "detection"

    image: DetectionImage = DetectionImage()
    head: DetectionHeadConfig = DetectionHeadConfig()
    loss: DetectionLoss = DetectionLoss()

    def measured(self) -> tuple[str, ...]:
        if not self.head.masks:
            return self.metrics
        of_masks = [name.replace("box/", "mask/") for name in self.metrics]
        return (*self.metrics, *of_masks)

    def target_options(self) -> dict[str, Any]:
        return {"masks": True} if self.head.masks else {}


CONFIG = DetectionTask
