"""DeepSpeed's own keys, as far as we decide them; its schema checks the rest of `zero_optimization` at start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from visft_ds.config.fields import STRICT, Above, Positive, Section, StrictModel

_BATCH, _PRECISION = "visft.tasks.<task>.batch_size and .micro_batch", "visft.model.precision"
#: Keys of DeepSpeed that follow from `visft` -> what to state instead.
INSTEAD = {
    "train_batch_size": _BATCH,
    "train_micro_batch_size_per_gpu": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "torch_autocast": _PRECISION,
    "activation_checkpointing": "visft.model.recompute",
    "checkpoint": "visft.run.save_every",
    "steps_per_print": "visft.run.log_every",
}


class Offload(StrictModel):
    """`zero_optimization.offload_param` and `offload_optimizer`."""

    model_config = ConfigDict(**{**STRICT, "extra": "allow"})

    device: Literal["none", "cpu", "nvme"] = "none"


class ZeroOptimization(Section):
    """`zero_optimization`: keys that are not listed are DeepSpeed's, which checks them."""

    model_config = ConfigDict(**{**STRICT, "extra": "allow"})

    stage: Literal[0, 1, 2, 3]
    reduce_bucket_size: Positive  #: required: DeepSpeed's 5e8 allocates gigabytes for a few million trained numbers
    overlap_comm: bool | None = None
    offload_param: Offload = Offload()  #: of stage 3
    offload_optimizer: Offload = Offload()  #: of stages 1 to 3

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Offloading needs something that is divided."""
        if self.offload_param.device != "none" and self.stage != 3:
            yield "offload_param", f"needs zero_optimization.stage = 3; the stage is {self.stage}"
        if self.offload_optimizer.device != "none" and self.stage == 0:
            yield "offload_optimizer", "needs zero_optimization.stage = 1, 2 or 3; the stage is 0"


class PipelineKeys(StrictModel):
    """`pipeline`: the layers are divided over stages; DeepSpeed's other keys of it are decided by the engine."""

    stages: Annotated[int, Field(ge=2)]  #: processes that hold one model together; all processes are a multiple of it


class DeepSpeedKeys(Section):
    """Keys at the top level that DeepSpeed gets as they stand.

    Batch sizes, precision, optimizer, scheduler and checkpoints are not among them: they follow from `visft`.
    """

    zero_optimization: ZeroOptimization
    pipeline: PipelineKeys | None = None  #: absent: every process has all layers
    zero_allow_untested_optimizer: bool | None = None
    zero_force_ds_cpu_optimizer: bool | None = None
    communication_data_type: Literal["fp32", "fp16", "bf16"] | None = None
    prescale_gradients: bool | None = None
    gradient_predivide_factor: Above | None = None
    disable_allgather: bool | None = None
    wall_clock_breakdown: bool | None = None
    memory_breakdown: bool | None = None
    log_level: str | None = None
    comms_logger: dict[str, Any] | None = None
    aio: dict[str, Any] | None = None

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """An optimizer that DeepSpeed would compile, and what a pipeline cannot do."""
        zero = self.zero_optimization
        if zero.offload_optimizer.device != "none" and self.zero_force_ds_cpu_optimizer is not False:
            yield (
                "zero_force_ds_cpu_optimizer",
                "must be false with offload_optimizer: DeepSpeed would compile a CPU optimizer of its own",
            )
        if self.pipeline is not None and zero.stage != 1:
            yield (
                "zero_optimization.stage",
                "must be 1 with a pipeline: DeepSpeed refuses 2 and 3, and clips by one stage's gradient with 0",
            )
        if self.pipeline is not None and zero.overlap_comm:
            yield (
                "zero_optimization.overlap_comm",
                "must be false with a pipeline",
            )
