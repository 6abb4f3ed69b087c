"""The plain head with what its masks become segments by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from visft_ds.data.samples import Map
from visft_ds.tasks import Shapes
from visft_ds.tasks.masks.output import MaskOutput
from visft_ds.tasks.masks.plain import PlainHead
from visft_ds.tasks.panoptic.config import PanopticHeadConfig


@dataclass(frozen=True)
class PanopticOutput(MaskOutput):
    """Masks, and the options of the head by which they are merged."""

    options: PanopticHeadConfig = field(default_factory=PanopticHeadConfig)


class PanopticHead(PlainHead):
    """Masks with classes, of things and of stuff."""

    def __init__(self, shapes: Shapes, options: PanopticHeadConfig) -> None:
        super().__init__(shapes, options)
        self.options = options

    def forward(
        self, maps: Sequence[Map], random_keys: Tensor | None = None, progress: float = 0.0
    ) -> PanopticOutput:
        masks = super().forward(maps, random_keys, progress)
        return PanopticOutput(**vars(masks), options=self.options)
