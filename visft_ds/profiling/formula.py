"""The closed formulas of `flops`, applied to a prepared model and the batches of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from visft_ds.costs.flops import Flops, packed_flops, tower_flops, tower_from
from visft_ds.costs.hardware import DTYPES
from visft_ds.data.samples import Batch
from visft_ds.models.backbone import require_eva_vit
from visft_ds.models.eva_vit import EvaViT
from visft_ds.ops.attention import plain_below
from visft_ds.profiling.session import Session
from visft_ds.profiling.timing import BACKBONE, BACKWARD, HEAD
from visft_ds.tasks import TASKS


@dataclass(frozen=True)
class StepFormula:
    """Operations of this rank's part of a step."""

    backbone: Flops | None  #: None: there is no formula, as for models of timm
    head: Flops | None  #: None: a head of the step has no formula

    @property
    def total(self) -> Flops | None:
        """Both together, where both are known."""
        return None if self.head is None or self.backbone is None else self.backbone + self.head

    def by_part(self) -> dict[str, int | None]:
        """Under the names of the parts of a step; "recomputed" is a part of the backward pass."""
        total = self.total
        return {
            BACKBONE: self.backbone.forward if self.backbone else None,
            HEAD: self.head.forward if self.head else None,
            BACKWARD: total.backward + total.recompute if total else None,
            "recomputed": self.backbone.recompute if self.backbone else None,
            "total": total.all if total else None,
        }


def formula_of(session: Session, batches: Sequence[Batch]) -> StepFormula:
    """Operations of the micro-batches by formula, from the shapes of their images."""
    if not isinstance(session.engine.module.backbone, EvaViT):
        return StepFormula(None, None)
    backbone, head = Flops(), Flops()
    known = True
    for batch in batches:
        backbone += _backbone(session, batch)
        for task in batch.tasks:
            of_head = _head(session, task, batch)
            known, head = known and of_head is not None, head + (of_head or Flops())
    return StepFormula(backbone, head if known else None)


def _backbone(session: Session, batch: Batch) -> Flops:
    module, config = session.engine.module, session.config.visft
    backbone = require_eva_vit(module.backbone)
    lora = config.lora if config.stage == 2 else None
    trained = (name for name, parameter in backbone.named_parameters() if parameter.requires_grad)
    tower = tower_from(
        backbone,
        lora,
        trained if module.train_backbone else (),
        plain_attention_below=plain_below(session.engine.device, DTYPES[session.precision]),
        linear_keeps_late=session.engine.stage == 3
        and bool(session.config.deepspeed["zero_optimization"].get("memory_efficient_linear", True)),
    )
    images, patches, first = len(batch.images), _patches(session, batch), backbone.cls_token is not None
    frames = module.frames(batch)
    if frames is None:
        return tower_flops(tower, images, patches + first, patches)
    return packed_flops(tower, [first + height * width for height, width in frames.grids], images * patches)


def _head(session: Session, task: str, batch: Batch) -> Flops | None:
    module = session.engine.module
    head = module.heads[task]
    trains = {parameter.requires_grad for parameter in head.parameters()}
    formula = TASKS[task].flops
    if formula is None or len(trains) > 1:  # of a head that trains in part only the counter knows
        return None
    options = session.config.visft.tasks.enabled()[task].head.model_dump()
    return formula(
        options if head.training else {**options, "dropout": 0.0},
        module.backbone.width,
        len(batch.images),
        _patches(session, batch),
        trains=trains == {True},
        flows=module.train_backbone,
    )


def _patches(session: Session, batch: Batch) -> int:
    height, width = require_eva_vit(session.engine.module.backbone).grid(batch.images)
    return height * width
