"""Operations of a step by closed formulas, and the share of a GPU's peak that they use (MFU)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from visft_ds.config import ResolvedConfig
from visft_ds.config.schema import Precision
from visft_ds.costs.flops import Flops, packed_flops, tower_flops, tower_from
from visft_ds.costs.hardware import DTYPES, find_peak, reference_rate
from visft_ds.data.samples import Batch
from visft_ds.models.eva_vit import EvaViT
from visft_ds.ops.attention import plain_below
from visft_ds.parallel.engine import Engine

#: Micro-batches of a rank's step -> seconds they would take at the peak rate, nothing computed twice; None: no formula.
SecondsAtPeak = Callable[[Sequence[Batch]], float | None]


@dataclass(frozen=True)
class StepFormula:
    """Operations of this rank's part of a step."""

    backbone: Flops | None  #: None: there is no formula, as for models of timm
    head: Flops | None  #: None: heads have no formula

    @property
    def total(self) -> Flops | None:
        """Both together, where both are known."""
        return None if self.head is None or self.backbone is None else self.backbone + self.head


def formula_of(engine: Engine, resolved: ResolvedConfig, precision: Precision, batches: Sequence[Batch]) -> StepFormula:
    """Operations of the micro-batches by formula, from the shapes of their images."""
    module, config = engine.module, resolved.visft
    if not isinstance(module.backbone, EvaViT):
        return StepFormula(None, None)
    trained = (name for name, parameter in module.backbone.named_parameters() if parameter.requires_grad)
    keeps_late = resolved.deepspeed["zero_optimization"].get("memory_efficient_linear", True)
    tower = tower_from(
        module.backbone,
        config.lora if config.stage == 2 else None,
        trained if module.train_backbone else (),
        plain_attention_below=plain_below(engine.device, DTYPES[precision]),
        linear_keeps_late=engine.stage == 3 and bool(keeps_late),
    )
    first = module.backbone.cls_token is not None
    in_backbone = Flops()
    for batch in batches:
        images, (height, width) = len(batch.images), module.backbone.grid(batch.images)
        patches, frames = height * width, module.frames(batch)
        if frames is None:
            in_backbone += tower_flops(tower, images, patches + first, patches)
        else:
            in_backbone += packed_flops(tower, [first + h * w for h, w in frames.grids], images * patches)
    return StepFormula(in_backbone, None if any(batch.tasks for batch in batches) else Flops())


def seconds_at_peak(engine: Engine, config: ResolvedConfig, precision: Precision) -> SecondsAtPeak | None:
    """Function for the MFU of this rank's steps; None on a GPU of unknown peak, on a CPU and in a pipeline."""
    device = engine.device
    if device.type != "cuda" or config.pipeline_stages > 1 or find_peak(torch.cuda.get_device_name(device)) is None:
        return None
    peak = reference_rate(device, precision).flops_per_second

    def seconds(batches: Sequence[Batch]) -> float | None:
        total = formula_of(engine, config, precision, batches).total
        return None if total is None else (total.forward + total.backward) / peak

    return seconds
