"""DeepSpeed's own configuration keys, as data: DeepSpeed silently ignores a misspelt key at top level.

Collected from DeepSpeed 0.19.8 (deepspeed/runtime/config.py, runtime/constants.py, runtime/zero/config.py and
runtime/zero/offload_config.py); a test compares this file with the installed release.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from visft_ds.config.fields import Count, Fraction, Positive, StrictModel

DEEPSPEED_VERSION = "0.19.8"

_PRECISION = (
    "state visft.model.precision (auto, fp32, bf16 or fp16): frozen weights are held in 16 bit, what trains stays in "
    "fp32 and torch_autocast is derived from it; DeepSpeed's own blocks would also cast heads and adapters"
)
_BATCH = "state visft.tasks.<task>.batch_size; derived values are printed at start"
_CHECKPOINT = "checkpoints are written by visft_ds, independent of world size and ZeRO stage; see visft.run.save_every"
_PARALLEL = "processes are divided over data (ZeRO) and layers (--engine pipeline) only; remove it"
_DATA = "order, mixture and augmentation of the data are functions of visft.seed and the step; see visft.data"
_REMOVED = f"removed from DeepSpeed {DEEPSPEED_VERSION} (https://github.com/deepspeedai/DeepSpeed/issues/8489)"

#: Keys DeepSpeed knows and a configuration may not set -> what to do instead.
REFUSED: dict[str, str] = {
    "train_batch_size": _BATCH,
    "train_micro_batch_size_per_gpu": "state visft.tasks.<task>.micro_batch, an upper bound; " + _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "managed_gradient_accumulation": _BATCH,
    "gradient_allreduce_op": "losses are normalised for the mean over processes; remove it",
    "steps_per_print": "state visft.run.log_every",
    "bf16": _PRECISION,
    "bfloat16": _PRECISION,
    "fp16": _PRECISION,
    "torch_autocast": _PRECISION,
    "data_types": _PRECISION,
    "amp": f"{_REMOVED}; {_PRECISION}",
    "activation_checkpointing": "state visft.model.recompute: what is computed again of each block",
    "checkpoint": _CHECKPOINT,
    "datastates_ckpt": _CHECKPOINT,
    "nebula": f"{_REMOVED}; {_CHECKPOINT}",
    "dataloader_drop_last": _DATA,
    "data_efficiency": _DATA,
    "curriculum_learning": f"{_REMOVED}; {_DATA}",
    "tensor_parallel": _PARALLEL,
    "expert_parallel": _PARALLEL,
    "sequence_parallel_size": _PARALLEL,
    "seq_parallel_communication_data_type": _PARALLEL,
    "use_data_before_expert_parallelism": _PARALLEL,
    "hybrid_engine": "it serves text generation; remove it",
    "weight_quantization": "it serves inference; remove it",
    "vocabulary_size": "it serves language models; remove it",
    "compile": "the engine does not compile the model; remove it",
    "autotuning": "visft profile measures a configuration; remove it",
    "elasticity": f"{_REMOVED}; resuming on another number of processes needs no key",
    "compression_training": _REMOVED,
    "quantize_training": _REMOVED,
    "sparse_gradients": _REMOVED,
    "eigenvalue": _REMOVED,
    "sparse_attention": _REMOVED,
    "graph_harvesting": _REMOVED,
    "progressive_layer_drop": _REMOVED,
}

#: Keys of zero_optimization that DeepSpeed knows and a configuration may not set -> what to do instead.
REFUSED_ZERO: dict[str, str] = {
    "cpu_offload": 'state "offload_optimizer": {"device": "cpu"}',
    "cpu_offload_param": 'state "offload_param": {"device": "cpu"}',
    "cpu_offload_use_pin_memory": "state pin_memory in offload_param or offload_optimizer",
    "stage3_gather_fp16_weights_on_model_save": _CHECKPOINT,
    "stage3_gather_16bit_weights_on_model_save": _CHECKPOINT,
    "elastic_checkpoint": _CHECKPOINT,
    "load_from_fp32_weights": _CHECKPOINT,
    "pipeline_loading_checkpoint": _CHECKPOINT,
    "legacy_stage1": "the engine is tested with DeepSpeed's current ZeRO-1; remove it",
    "compute_grad_norm": "the log shows the gradient norm of every step; remove it",
    "zenflow": "it updates parameters late; results would no longer equal those of one process; remove it",
    "save_muon_momentum_buffer_in_memory": "the optimizer is AdamW; remove it",
    "mics_shard_size": _REMOVED,
    "mics_hierarchical_params_gather": _REMOVED,
    "zeropp_loco_param": _REMOVED,
}

Device = Literal["none", "cpu", "nvme"]


class OffloadParam(StrictModel):
    """`zero_optimization.offload_param`, ZeRO-3 only."""

    device: Device = "none"
    nvme_path: str | None = None
    buffer_count: Count | None = None
    buffer_size: Count | None = None
    max_in_cpu: Count | None = None
    pin_memory: bool | None = None


class OffloadOptimizer(StrictModel):
    """`zero_optimization.offload_optimizer`."""

    device: Device = "none"
    nvme_path: str | None = None
    buffer_count: Count | None = None
    pin_memory: bool | None = None
    pipeline_read: bool | None = None
    pipeline_write: bool | None = None
    fast_init: bool | None = None
    ratio: Fraction | None = None
    super_offload: bool | None = None
    cpuadam_cores_perc: Fraction | None = None


class ZeroOptimization(StrictModel):
    """`zero_optimization`: types and names only; absent keys keep DeepSpeed's defaults."""

    stage: Literal[0, 1, 2, 3]
    contiguous_gradients: bool | None = None
    reduce_scatter: bool | None = None
    #: Required: DeepSpeed's default 5e8 allocates gigabytes for a few million trainable numbers.
    reduce_bucket_size: Positive
    use_multi_rank_bucket_allreduce: bool | None = None
    allgather_partitions: bool | None = None
    allgather_bucket_size: Count | None = None
    overlap_comm: bool | None = None
    offload_param: OffloadParam | None = None
    offload_optimizer: OffloadOptimizer | None = None
    sub_group_size: Count | None = None
    stage3_prefetch_bucket_size: Count | None = None
    stage3_param_persistence_threshold: Count | None = None
    stage3_model_persistence_threshold: Count | None = None
    stage3_max_live_parameters: Count | None = None
    stage3_max_reuse_distance: Count | None = None
    stage3_module_granularity_threshold: Count | None = None
    stage3_use_all_reduce_for_fetch_params: bool | None = None
    stage3_allgather_sequential: bool | None = None
    ignore_unused_parameters: bool | None = None
    round_robin_gradients: bool | None = None
    parameter_alignment: bool | None = None
    zero_hpz_partition_size: Count | None = None
    zero_quantized_weights: bool | None = None
    zero_quantized_nontrainable_weights: bool | None = None
    zero_quantized_gradients: bool | None = None
    memory_efficient_linear: bool | None = None
    override_module_apply: bool | None = None
    log_trace_cache_warnings: bool | None = None
    enable_sanity_checks: bool | None = None
    leaf_module: dict[str, Any] | None = None


class PipelineKeys(StrictModel):
    """`pipeline`: the layers are divided over stages; DeepSpeed's other keys of it are decided by the engine."""

    stages: Annotated[int, Field(ge=2)]  #: processes that hold one model together; all processes are a multiple of it


class DeepSpeedKeys(StrictModel):
    """Top-level keys that are handed to DeepSpeed as they stand."""

    zero_optimization: ZeroOptimization
    pipeline: PipelineKeys | None = None  #: absent: every process has all layers
    zero_allow_untested_optimizer: bool | None = None
    zero_force_ds_cpu_optimizer: bool | None = None
    communication_data_type: Literal["fp32", "fp16", "bf16"] | None = None
    prescale_gradients: bool | None = None
    gradient_predivide_factor: Annotated[float, Field(gt=0)] | None = None
    disable_allgather: bool | None = None
    disable_python_gc: bool | None = None
    dump_state: bool | None = None
    wall_clock_breakdown: bool | None = None
    memory_breakdown: bool | None = None
    log_level: str | None = None
    aio: dict[str, Any] | None = None
    comms_logger: dict[str, Any] | None = None
    flops_profiler: dict[str, Any] | None = None
    timers: dict[str, Any] | None = None
    tensorboard: dict[str, Any] | None = None
    wandb: dict[str, Any] | None = None
    csv_monitor: dict[str, Any] | None = None
    comet: dict[str, Any] | None = None
