"""The recipe for photographs of one's own, `visft train --data FOLDER`.

`ds_configs/models/own.json`, and by number and labels of the photographs the length of the run, zooms, kept
features, and the evaluations in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visft_ds.config.preflight import training_sets
from visft_ds.config.resolve import CONFIG_ROOT, Flags, ResolvedConfig
from visft_ds.data.shards import manifest_path
from visft_ds.pretrained import TIMM, lite0_of_pip
from visft_ds.tasks import config_class

MODEL, DEMO = "own", "lite0"  #: files in ds_configs/models; the second is the demo's
#: Steps that 20 to 200 photographs need alike; more photographs are passed through so often instead.
STEPS, PASSES = 550, 30
VIEWS, EVALUATIONS = 12, 3
#: Photographs whose features are kept: those of all views are 1 MB each.
MOST_KEPT = 2000
#: Sides of a zoom's window: a caption may name what a small one cuts off.
ZOOM_WITH_CAPTIONS = (0.8, 1.2)
#: Begins the source of every value that the photographs decided.
BY_RECIPE = "the recipe for"


def chosen(config: ResolvedConfig) -> Flags:
    """Settings that the photographs decide, for a recipe with the tasks that they have labels for."""
    visft, root, values = config.visft, Path(config.visft.data.root), dict[str, Any]()
    tasks, steps = visft.tasks.enabled(), config.total_steps
    images = sum(map(len, training_sets(config)))
    if not images:
        return {}
    if visft.stage == 1:
        if config.sources["scheduler.params.total_num_steps"].startswith(CONFIG_ROOT.name):
            steps = max(STEPS, math.ceil(PASSES * images / next(iter(visft.streams().values())).batch_size))
            values["scheduler.params.total_num_steps"] = steps
        cache = f"{visft.run.out}/features" if images <= MOST_KEPT else None
        values["visft.features"] = {"views": VIEWS, "cache": cache}
        if "captioning" in tasks:
            values["visft.shared.image.zoom"] = ZOOM_WITH_CAPTIONS
    judged, every = manifest_path(root, visft.data.val).is_file(), math.ceil(steps / EVALUATIONS)
    values |= {"visft.run.eval_every": every if judged else 0, "visft.run.save_every": every}
    if judged:
        values["visft.run.keep_best"] = config_class(next(iter(tasks))).main
    return {key: (value, f"{BY_RECIPE} {images} photographs") for key, value in values.items()}


def of_backbone(model: str, backbone: Flags, settings: Sequence[str]) -> Flags:
    """Weights that pip brought, where none were named or are here, and the map that is read of another
    backbone.
    """
    if not backbone:
        here = model == DEMO and Path("weights/efficientnet_lite0.safetensors").exists()
        stated = any(text.startswith("visft.model.weights=") for text in settings)
        weights = None if here or stated else lite0_of_pip()
        return {} if weights is None else {"visft.model.weights": (str(weights), "pip's efficientnet_lite0")}
    preset, _ = backbone.get("visft.model.preset", ("", ""))
    if model != MODEL or not preset.startswith(TIMM):
        return {}
    from visft_ds.models.timm_backbone import fine_map

    block, side = fine_map(preset.removeprefix(TIMM))
    sizes = (
        "shared.image.fixed_size",
        "tasks.detection.image.fixed_size",
        "tasks.segmentation.image.fixed_size",
    )
    where = {
        f"visft.{key}": (side, f"the map of {preset}") for key in (*sizes, "tasks.captioning.image.size")
    }
    return {**where, "visft.model.layers": ([] if block is None else [block], f"the map of {preset}")}
