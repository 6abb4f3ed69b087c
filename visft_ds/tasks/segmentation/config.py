"""`visft.tasks.segmentation`: images, head and loss of segmentation. Defaults are those of the published
code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from visft_ds.settings.fields import Depth, Positive, Probability, Problems, StrictModel
from visft_ds.settings.task_schema import WITHOUT_MASK, Findings
from visft_ds.tasks.masks.config import ClassIds, JitterImage, MaskLoss, MaskTaskConfig, PlainHeadConfig


class SegmentationHeadConfig(StrictModel):
    """Options of the segmentation head that was published (single-scale Mask2Former)."""

    #: kind of head; mask2former: the published one, plain: queries and cells in transformer blocks (PMT)
    type: Literal["mask2former"] = "mask2former"
    #: classes; default for ids that are not COCO's: the number of categories
    num_classes: Positive = 80
    #: most masks of an image, which AP and AR count as well (COCO: 100); default where an image of the data
    #: has more objects: half as many again
    max_detections: Positive = 100
    #: object queries, masks that are predicted for an image (Mask2Former: 100)
    num_queries: Positive = 100
    #: channels of the head, a multiple of num_heads and of 32 (Mask2Former: 256)
    hidden_dim: Positive = 256
    #: transformer layers of the pixel decoder (Mask2Former: 6)
    encoder_layers: Depth = 6
    #: transformer layers of the decoder (Mask2Former: 9)
    decoder_layers: Depth = 9
    #: attention heads (Mask2Former: 8)
    num_heads: Positive = 8
    #: sampling points of a head in deformable attention (MSDeformAttn: 4)
    n_points: Positive = 4
    #: channels inside the MLPs of the pixel decoder (ViSFT: 512)
    encoder_ffn_dim: Positive = 512
    #: channels inside the MLPs of the decoder (ViSFT: 1024)
    decoder_ffn_dim: Positive = 1024
    #: probability of dropout (Mask2Former: 0)
    dropout: Probability = 0.0
    #: numbers of the classes; contiguous: from 0, published: from 1, as the published heads were trained
    class_ids: ClassIds = "contiguous"

    @property
    def most_objects(self) -> int:
        """Most objects that it finds in an image, one for each query at most."""
        return min(self.num_queries, self.max_detections)

    def contradictions(self) -> Problems:
        """A width that attention heads or norm groups do not divide, and fewer classes than COCO has."""
        if self.class_ids == "published" and self.num_classes < 80:
            yield "num_classes", "must be at least 80: published labels are COCO's 80"
        if self.hidden_dim % self.num_heads or self.hidden_dim % 32:
            yield (
                "hidden_dim",
                f"{self.hidden_dim} is not a multiple of num_heads = {self.num_heads} and of 32 (groups)",
            )


class SegmentationTask(MaskTaskConfig):
    """`visft.tasks.segmentation`."""

    #: besides AR, whose name has the number of detections
    metrics = tuple(f"mask/{name}" for name in ("AP", "AP50", "AP75", "APs", "APm", "APl"))
    shown = ("mask/AP", "mask/AP50")
    main = "mask/AP50"
    of_best_step = "mask/AP"
    hub_task = "image-segmentation"
    published = "segment"
    heads: ClassVar = {"mask2former": SegmentationHeadConfig, "plain": PlainHeadConfig}

    image: JitterImage = JitterImage()
    head: SegmentationHeadConfig | PlainHeadConfig = SegmentationHeadConfig()
    loss: MaskLoss = MaskLoss()

    @classmethod
    def misleads(cls, counts: Mapping[str, int], findings: Findings) -> str | None:
        """Objects without masks are background here: a set of boxes alone would teach that nothing is
        there.
        """
        without_mask = findings.get(WITHOUT_MASK, (0,))[0]
        objects = counts.get("annotations", 0)
        if 2 * without_mask <= objects:
            return None
        return f"mask for {without_mask} of its {objects} objects"


CONFIG = SegmentationTask
