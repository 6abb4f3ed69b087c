"""Settings of the debug model that train all three tasks in a second or two."""

from __future__ import annotations

from typing import Any

#: Key of a configuration -> value. Dropout is on: random numbers must survive a resume too.
TINY: dict[str, Any] = {
    "visft.model.overrides": {"width": 32, "depth": 2, "num_heads": 2, "image_size": 56},
    "visft.run.rehearsal": False,  # takes a second or two; tests of it turn it on
    "visft.shared.image.fixed_size": 56,
    "visft.shared.batch_size": 4,
    "visft.shared.micro_batch": 1,
    **{f"visft.tasks.{task}.image.fixed_size": 56 for task in ("detection", "segmentation")},
    "visft.tasks.captioning.image.size": 56,
    **{f"visft.tasks.{task}.batch_size": 4 for task in ("detection", "segmentation", "captioning")},
    **{f"visft.tasks.{task}.micro_batch": 1 for task in ("detection", "segmentation", "captioning")},
    "visft.tasks.detection.head.encoder_layers": 1,
    "visft.tasks.detection.head.decoder_layers": 1,
    "visft.tasks.detection.head.dropout": 0.1,
    "visft.tasks.segmentation.head.encoder_layers": 1,
    "visft.tasks.segmentation.head.decoder_layers": 1,
    "visft.tasks.segmentation.head.hidden_dim": 32,
    "visft.tasks.segmentation.head.num_points": 4,
    "visft.tasks.segmentation.loss.num_points": 32,
    "visft.tasks.captioning.head": {"attention_dim": 16, "embed_dim": 16, "decoder_dim": 16, "grid": 4, "dropout": 0.1},
}
