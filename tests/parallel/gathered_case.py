"""How many values of frozen blocks are whole at once under ZeRO-3, with the limits of its engine file and without.

One rank (see `test_gathered.py`):
    RANK=0 WORLD_SIZE=2 ... python -m tests.parallel.gathered_case OUT.json STAGE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from tests.parallel.start_case import configured, engine_of, prepare
from visft_ds.config import ResolvedConfig, deepspeed_dict
from visft_ds.model import counts_of, loss_denominators_of
from visft_ds.models.eva_vit import PRESETS
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import start_process_group
from visft_ds.parallel.placement import placement_for
from visft_ds.planner.zero import Zero
from visft_ds.profiling.plan_validation import made_up_batch

LIMITS = ("stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance")
#: DeepSpeed's own.
DEFAULTS = dict(zip(LIMITS, (int(5e7), int(1e9), int(1e9)), strict=True))
OVERRIDES = {"width": 64, "depth": 24, "num_heads": 2, "image_size": 56}
STEPS = 3  #: one to learn the order, two that know it
BLOCK = 12 * OVERRIDES["width"] ** 2  #: values of a block's matrices
_EVA_E = PRESETS["eva_e"]
#: A block of EVA-ViT-E has so many times as many.
SCALE = (4 + 2 * _EVA_E.mlp_ratio) * _EVA_E.width**2 / BLOCK


def scaled(config: ResolvedConfig, defaults: bool) -> ResolvedConfig:
    """With the limits of the engine file (or DeepSpeed's), as many blocks of this model as they are of EVA-ViT-E."""
    own = config.deepspeed["zero_optimization"]
    limits = DEFAULTS if defaults else {name: own[name] for name in LIMITS}
    settings = {f"zero_optimization.{name}": int(value / SCALE) for name, value in limits.items()}
    return configured("zero3", {**_settings(), **settings}, config.visft.stage)


def _settings() -> dict[str, Any]:
    # Vectors stay whole, as EVA-ViT-E's do: they are no part of what is gathered.
    small = {"zero_optimization.stage3_param_persistence_threshold": 300}
    model = {"visft.model.overrides": OVERRIDES, "visft.model.precision": "fp32", "visft.model.recompute": "block"}
    return {**small, **model, "visft.tasks": "detection", "visft.mode": "sampled"}


def measured(config: ResolvedConfig) -> dict[str, Any]:
    """Most values of the backbone that were whole at a time, of those that are not always, in each step."""
    world = distributed.world_size()
    for_deepspeed = deepspeed_dict(config, world, "fp32")
    engine = engine_of(config, prepare(config, placement_for(for_deepspeed, None)), for_deepspeed)
    batch = made_up_batch(config.visft.streams()["detection"], 1)
    counts = distributed.agree_on_step("step", counts_of(engine.module, [batch]), False, engine.device).counts
    most = [0] * STEPS

    def note(*_: Any) -> None:
        whole = sum(p.ds_numel for p in blocks if p.ds_status != ZeroParamStatus.NOT_AVAILABLE)
        most[step] = max(most[step], whole)

    blocks: list[Any] = [p for p in engine.module.backbone.parameters() if not p.ds_persist]  # type: ignore[attr-defined]
    for module in engine.module.backbone.modules():
        module.register_forward_pre_hook(note)
    for step in range(STEPS):
        engine.train_step(step, [batch] * engine.accumulation, loss_denominators_of(counts, world, engine.device))
    shapes = [torch.nn.Parameter(torch.empty(p.ds_shape, device="meta")) for p in blocks]
    zero = Zero.of(for_deepspeed, world, engine.accumulation, engine.device)
    return {"most": most, "predicted": zero.ahead(shapes) // 4, "all": sum(p.ds_numel for p in blocks)}


def main(out: str, stage: str) -> None:
    """Measure both."""
    start_process_group()
    config = configured("zero3", _settings(), int(stage))
    found = {name: measured(scaled(config, defaults)) for name, defaults in (("ours", False), ("defaults", True))}
    if distributed.is_main():
        Path(out).write_text(json.dumps(found))
    distributed.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
