"""The keys of a run's configuration: the "visft" block, optimizer, scheduler, and DeepSpeed's as far as we
decide.

Values every recipe shares are defaults here, as in the code published with the paper (arXiv 2401.10222,
https://github.com/TencentARC/ViSFT); those of a recipe or a model are set in ds_configs/. DeepSpeed itself
checks the rest of `zero_optimization` at start.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints
from pydantic.fields import FieldInfo

from visft_ds.pretrained import TIMM
from visft_ds.redaction import refuse_secrets
from visft_ds.settings.bands import Bands, NewBands
from visft_ds.settings.fields import (
    Above,
    Count,
    Depth,
    Positive,
    Precision,
    Probability,
    Problems,
    Rate,
    StrictModel,
    Text,
    Texts,
    nearest,
)
from visft_ds.settings.task_schema import SHARED, SharedConfig, Stream, TasksConfig
from visft_ds.tasks import config_class, entries

#: Towers of our own; TIMM + NAME is a model of timm.
PRESETS = ("eva_e", "eva_g", "debug")
Preset = Annotated[str, StringConstraints(pattern=f"^({'|'.join(PRESETS)}|{TIMM}.+)$")]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Root = Annotated[Text, AfterValidator(refuse_secrets)]  #: folder or URL of shards


def _learnable(rate: float) -> float:
    """A learning rate with which something can be learnt: weights are hardly ever above 1."""
    if rate > 1:
        raise ValueError("must be at most 1: AdamW moves every weight by about this in each step")
    return rate


Learnable = AfterValidator(_learnable)


class OptimizerParams(StrictModel):
    """Settings of AdamW; a parameter group may set its own lr and weight_decay."""

    lr: Annotated[Above, Learnable]  #: highest learning rate, after the warm-up
    weight_decay: Rate  #: decoupled weight decay: a step removes lr times this share of a weight
    betas: tuple[Probability, Probability] = (0.9, 0.999)  #: decay rates of Adam's two moments
    eps: Above = 1e-8  #: term added to the denominator of an update, in units of the gradient


class OptimizerConfig(StrictModel):
    """`optimizer`, in DeepSpeed's form; torch builds it, so that nothing is compiled at start."""

    type: Literal["AdamW"]  #: name of the optimiser
    params: OptimizerParams


class SchedulerParams(StrictModel):
    """Lengths of the schedule, in optimiser steps."""

    warmup_num_steps: Count  #: steps in which the learning rate rises linearly; 0: none
    total_num_steps: Positive | None = None  #: length of the run in steps; null: from the tasks' `steps`


class SchedulerConfig(StrictModel):
    """`scheduler`, with DeepSpeed's names; here the first step does not have learning rate 0."""

    #: learning rate after the warm-up; WarmupCosineLR: cosine to 0, WarmupDecayLR: linear to 0, WarmupLR:
    #: constant
    type: Literal["WarmupCosineLR", "WarmupDecayLR", "WarmupLR"]
    params: SchedulerParams


class BackboneOverrides(StrictModel):
    """Fields of the backbone preset that this model replaces."""

    width: Positive | None = None  #: channels of a token; null: the preset's
    depth: Depth | None = None  #: transformer blocks; null: the preset's
    num_heads: Positive | None = None  #: attention heads of a block; null: the preset's
    mlp_ratio: Above | None = None  #: channels inside an MLP, divided by `width`; null: the preset's
    patch_size: Positive | None = None  #: side of a patch in pixels; null: the preset's
    #: side of the image in pixels, which sets the grid of position embeddings; the only override for models
    #: of timm; null: the preset's
    image_size: Positive | None = None
    post_norm: bool | None = None  #: post-norm, norms after attention and MLP; null: the preset's


class ModelConfig(StrictModel):
    """`visft.model`: backbone, weights, precision, and memory and kernel options."""

    name: Name  #: name of the model, part of the names of run folders
    preset: Preset  #: name of the architecture: eva_e, eva_g, debug or timm:NAME
    overrides: BackboneOverrides = BackboneOverrides()
    #: indices of the blocks whose features are read, such as [5] or [2, 5, 8, 11]; []: the last one
    #: (docs/backbones.md)
    out_indices: tuple[Count, ...] = ()
    #: bands of the pictures, decided by the shards; null: three colours of 8 bits (docs/bands.md)
    bands: Bands | None = None
    #: initial weights of the patch embedding (or first convolution) for N bands; mean: those of red, green
    #: and blue, repeated in turn, times 3/N; zero: those for the first three bands, and 0 for the others
    new_bands: NewBands = "mean"
    #: file of base weights, or hf-hub:ORG/NAME[/FILE]; null: random weights, drawn by weights_seed
    weights: Text | None
    weights_seed: Count = 0  #: seed of random weights
    #: number format of activations and frozen matrices, fp32, bf16 or fp16; auto: fp32 on CPUs, bf16 on GPUs
    #: that have it, else fp16
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    #: activations that the backward pass recomputes: none, those of each mlp, or of each block; auto: the
    #: fastest choice that fits
    activation_checkpointing: Literal["auto", "none", "mlp", "block"] = "auto"
    #: implementation of LoRA; library: PyTorch's, triton: a fused kernel (docs/memory-and-speed.md)
    kernels: Literal["library", "triton"] = "library"
    #: TF32 for float32 matrix products and convolutions on GPUs, true or false; auto: in bf16 and fp16 runs
    tf32: Literal["auto", True, False] = "auto"

    def contradictions(self) -> Problems:
        """Options of another kind of backbone, and two ways of bands."""
        if self.bands is not None and self.bands.new != self.new_bands:
            yield "new_bands", f"{self.new_bands} is not that of bands, {self.bands.new}"
        if not self.preset.startswith(TIMM):
            return
        keys = [
            f"overrides.{name}"
            for name in self.overrides.model_dump(exclude_none=True, exclude={"image_size"})
        ]
        if self.activation_checkpointing == "mlp":
            keys.append("activation_checkpointing")
        for key in keys:
            yield key, f"is for EVA backbones; {self.preset} does not take it"

    def computes_in_tf32(self, precision: Precision) -> bool:
        """Return True if float32 products are computed in TF32 in a run of this precision."""
        return precision != "fp32" if self.tf32 == "auto" else self.tf32

    def backbone_options(self) -> dict[str, Any]:
        """Options of `build_empty` that differ from the preset."""
        options = self.overrides.model_dump(exclude_none=True)
        if self.out_indices:
            options["layers"] = self.out_indices
        if self.bands is not None:
            options["bands"] = self.bands.model_dump(mode="json")
        return options


class LoraConfig(StrictModel):
    """`visft.lora`: low-rank adapters (LoRA) in every block; the update is scaled by alpha / rank."""

    rank: Positive  #: rank of the update, channels between A and B
    alpha: Above  #: scale of the update, which is alpha / rank times B A
    #: layers with an adapter: q, k, v, proj, fc1, fc2; in models of timm also globs over their names
    targets: Texts


class HeadsConfig(StrictModel):
    """`visft.heads`: the heads of stage 2, and the precision of heads."""

    #: initial weights of the heads in stage 2; trained: those of `path`, random: new ones, which train
    #: together with the backbone
    start: Literal["trained", "random"] = "trained"
    #: folder of trained heads; null: none in stage 1, in stage 2 runs/stage1-<visft.model.name>/export
    path: Text | None = None
    #: number format of the heads' activations, fp32; auto: bf16 in bf16 runs, else fp32
    precision: Literal["auto", "fp32"] = "auto"
    #: training mode of the frozen heads, with dropout, as in the published code
    train_mode: bool = False


class InitConfig(StrictModel):
    """`visft.init_from`: source of a run's initial weights; optimiser and schedule start anew."""

    path: Text  #: path of a run, one of its checkpoints, an adapter folder, or the published LoRA file
    #: heads of that run; keep: use them, reset: initialise them anew
    heads: Literal["keep", "reset"] = "keep"


class DataSetConfig(StrictModel):
    """Entry of `visft.data.sets`: a further data set to train on."""

    name: Name  #: name of the set, in logs and messages
    root: Root  #: folder or URL of its shards
    split: Text = "train"  #: name of the split to train on
    weight: Above = 1.0  #: share of a task's steps, relative to visft.data.weight
    #: tasks that it trains; null: all that it has labels for
    tasks: Texts | None = None


class DataConfig(StrictModel):
    """`visft.data`: shards made by visft shards, ROOT/NAME.manifest.json; ROOT may be a URL."""

    root: Root = "data/coco"  #: folder or URL of the shards
    train: Text = "train"  #: name of the training split
    val: Text = "val"  #: name of the validation split
    weight: Above = 1.0  #: share of a task's steps from this split, relative to `sets`
    sets: tuple[DataSetConfig, ...] = ()  #: further training sets
    #: order of the samples; full: a global shuffle, windowed: within four shards at a time; null: windowed
    #: for a URL, else full
    shuffle: Literal["full", "windowed"] | None = None
    #: loader processes per rank; 0: load in the training process; null: up to 8 with a GPU, 0 on a CPU
    num_workers: Annotated[Count, Field(le=256)] | None = None
    prefetch_steps: Count = 2  #: steps that are loaded ahead
    cache: Text | None = None  #: folder for copies of remote shards; null: ~/.cache/visft/shards
    #: largest size of that folder in bytes; the least recently read shards are deleted first
    cache_bytes: Positive = 200_000_000_000

    def contradictions(self) -> Problems:
        """Two sets of one name."""
        names = [data_set.name for data_set in self.training_sets()]
        for number, name in enumerate(names[1:]):
            if name in names[: number + 1]:
                yield f"sets.{number}.name", f"another training set is called {name}; give each its own name"

    def training_sets(self) -> tuple[DataSetConfig, ...]:
        """All training sets; the first is ROOT/TRAIN, called by its split."""
        first = DataSetConfig.model_construct(
            name=self.train, root=self.root, split=self.train, weight=self.weight
        )
        return (first, *self.sets)


class FeaturesConfig(StrictModel):
    """`visft.features`: flips, crops and sizes repeat after some epochs, so that features can be cached."""

    views: Positive = 1  #: views (flip, crop and size) of an image, used in turn, one per epoch
    cache: Text | None = None  #: folder for features; null: compute them in every epoch


class ParamGroup(StrictModel):
    """Entry of `visft.param_groups`; null takes the optimizer's value."""

    name: Text  #: name of the group, in logs (`lr/NAME`)
    params: Text  #: globs over qualified parameter names, separated by commas
    #: highest learning rate, after the warm-up; null: the optimizer's
    lr: Annotated[Rate, Learnable] | None = None
    #: decoupled weight decay: a step removes lr times this share of a weight; null: the optimizer's
    weight_decay: Rate | None = None

    def globs(self) -> tuple[str, ...]:
        """The globs, one by one."""
        return tuple(glob.strip() for glob in self.params.split(","))


class RunConfig(StrictModel):
    """`visft.run`: run folder, intervals of checkpoints, evaluations and logs in optimiser steps, failure
    handling.
    """

    out: Text | None = None  #: folder of the run; null: runs/stage<N>-<visft.model.name>
    save_every: Positive = 500  #: steps between checkpoints
    keep_last: Positive = 3  #: number of newest checkpoints that are kept
    #: metric by which the best checkpoint is kept as well and exported, such as box/AP50; null: none
    keep_best: Text | None = None
    #: evaluations in a row without a better keep_best after which the run stops early; 0: off
    patience: Count = 0
    eval_every: Count = 5000  #: steps between evaluations; 0: none during training
    eval_limit: Positive | None = None  #: most validation images that are evaluated; null: all
    #: validation images that TensorBoard shows, at the start and at every evaluation; 0: none
    visualizations: Count = 4
    log_every: Positive = 20  #: steps between console lines
    #: on GPUs, deterministic operators alone: others are refused (docs/memory-and-speed.md)
    deterministic: bool = False
    #: rehearsal of the largest step of each task before training, so that out of memory shows at once
    memory_check: bool = True
    skip_bad_steps: Count = 0  #: most steps in a row with NaN or Inf that are skipped; one more stops the run
    #: seconds without progress after which a rank prints its stacks and ends; 0: never
    step_timeout: Rate = 1800.0
    #: exit status after a stop by SIGUSR1, by which a job is queued again
    requeue_code: Annotated[int, Field(ge=0, lt=126)] = 85

    def contradictions(self) -> Problems:
        """Evaluations and checkpoints that do not go together."""
        if self.keep_best is None:
            if self.patience:
                yield "patience", "needs a metric: set visft.run.keep_best"
        elif not self.eval_every:
            yield "keep_best", "needs an evaluation during training: set visft.run.eval_every, or null"
        elif self.eval_every % self.save_every:
            every = f"eval_every = {self.eval_every} as a multiple of save_every = {self.save_every}"
            yield "keep_best", f"needs {every}"


class VisftConfig(StrictModel):
    """`visft`: every setting that is not DeepSpeed's."""

    stage: Literal[1, 2]  #: what trains; 1: heads, 2: the backbone
    seed: Count = 0  #: seed of new weights, of the order of images, and of augmentation and dropout
    model: ModelConfig
    lora: LoraConfig | None = None  #: null: no adapters
    #: how tasks share the steps; sampled: each step trains one task, shared: all, on the same images
    mode: Literal["sampled", "shared"] = "sampled"
    tasks: TasksConfig
    shared: SharedConfig | None = None  #: needed in mode "shared" only
    heads: HeadsConfig = HeadsConfig()
    init_from: InitConfig | None = None  #: null: new adapters, and new heads or those of visft.heads
    data: DataConfig = DataConfig()
    features: FeaturesConfig | None = None  #: null: a new flip, crop and size in every epoch, and no cache
    param_groups: Annotated[tuple[ParamGroup, ...], Field(min_length=1)]
    run: RunConfig = RunConfig()

    def contradictions(self) -> Problems:
        """Settings of another model, stage or mode or of no task, and names that nothing has or that stand
        twice.
        """
        enabled = self.tasks.enabled()
        if self.stage == 1 and self.lora is not None:
            yield (
                "lora",
                "stage 1 trains heads on the unchanged backbone: must be null; adapters belong to stage 2",
            )
        if self.heads.path is not None and (self.stage == 1 or self.heads.start == "random"):
            yield (
                "heads.path",
                'must be null in stage 1 and with visft.heads.start = "random", which train new heads',
            )
        if not enabled:
            yield "tasks", f"no task is on; state at least one of: {', '.join(type(self.tasks).model_fields)}"
        if self.mode == "shared" and self.shared is None:
            yield (
                "shared",
                'missing: mode "shared" needs visft.shared.batch_size and visft.shared.micro_batch',
            )
        names = ", ".join(name for name, task in enabled.items() if task.labels != "annotations")
        if self.mode == "shared" and self.shared is not None and names:
            if self.shared.image.tile is not None:
                yield (
                    "shared.image.tile",
                    f"cuts images into parts, and {names} needs whole ones: train other tasks (--tasks), or "
                    "set it to null (--tile none)",
                )
            if self.shared.image.paste:
                yield (
                    "shared.image.paste",
                    f"pastes objects that the labels of {names} know nothing of: train other tasks "
                    "(--tasks), or set it to 0",
                )
        for name, task in enabled.items():
            if self.mode == "sampled" and task.steps is None:
                yield f"tasks.{name}.steps", "missing: steps are shared out in proportion to the tasks' steps"
        groups = [group.name for group in self.param_groups]
        for number, name in enumerate(groups):
            if name in groups[:number]:
                yield f"param_groups.{number}.name", f"two groups are called {name}; give each its own name"
        for number, data_set in enumerate(self.data.sets):
            idle = [task for task in data_set.tasks or () if task not in enabled]
            if idle:
                yield f"data.sets.{number}.tasks", f"{', '.join(idle)} does not train in this run"
        best = self.run.keep_best
        measured = [metric for task in enabled.values() for metric in task.measured()]
        if best is not None and best not in measured:
            yield "run.keep_best", f"is not a metric of this run's tasks{nearest(best, measured)}"

    def filled(self) -> VisftConfig:
        """Settings with the run's folder, the heads of stage 2, and parameter groups of enabled tasks
        only.
        """
        out = self.run.out or f"runs/stage{self.stage}-{self.model.name}"
        changes: dict[str, Any] = {"run": self.run.model_copy(update={"out": out})}
        off = tuple(f"heads.{task}." for task in entries() if task not in self.tasks.enabled())
        groups = list[ParamGroup]()
        trained = list[str]()
        for group in self.param_groups:
            globs = [glob for glob in group.globs() if not glob.startswith(off)]
            if globs:
                groups.append(group.model_copy(update={"params": ",".join(globs)}))
                trained += globs
        if self.stage == 2 and self.heads.start == "random":
            if not any(glob.startswith("heads.") for glob in trained):
                groups.append(ParamGroup(name="heads", params="heads.*"))
        elif self.stage == 2:
            path = self.heads.path or f"runs/stage1-{self.model.name}/export"
            changes["heads"] = self.heads.model_copy(update={"path": path})
        changes["param_groups"] = tuple(groups) or self.param_groups
        return self.model_copy(update=changes)

    def streams(self) -> dict[str, Stream]:
        """Streams (kinds of optimiser steps) by name: one for each task, or the one that all share."""
        tasks = self.tasks.enabled()
        if self.mode == "shared":
            assert self.shared is not None  # checked by validation
            return {SHARED: self.shared.stream(SHARED, tasks, 1.0)}
        return {name: task.stream(name, {name: task}, float(task.steps or 0)) for name, task in tasks.items()}

    def steps(self) -> int | None:
        """Optimiser steps that give every task its `steps`; None where a task states none."""
        tasks = self.tasks.enabled().values()
        steps = [task.steps for task in tasks if task.steps is not None]
        whole = max if self.mode == "shared" else sum
        return whole(steps) if len(steps) == len(tasks) else None


class Offload(StrictModel):
    """`zero_optimization.offload_param` and `offload_optimizer`."""

    model_config = ConfigDict(extra="allow")

    #: device whose memory holds the parameters, or optimiser states; none: the GPU, cpu: the host
    device: Literal["none", "cpu"] = "none"


class ZeroOptimization(StrictModel):
    """`zero_optimization`: keys that are not listed are DeepSpeed's, which checks them."""

    model_config = ConfigDict(extra="allow")

    #: stage of ZeRO, what is partitioned over the ranks; 0: nothing, 1: optimiser states, 2: gradients as
    #: well, 3: parameters as well
    stage: Literal[0, 1, 2, 3]
    #: number of gradient values in a bucket, which are reduced together; DeepSpeed's 5e8 would allocate
    #: gigabytes for small models
    reduce_bucket_size: Positive
    #: overlap of the reduction of gradients with the backward pass; null: in ZeRO-3 alone
    overlap_comm: bool | None = None
    offload_param: Offload = Offload()  #: for stage 3
    offload_optimizer: Offload = Offload()  #: for stages 1 to 3


class PipelineKeys(StrictModel):
    """`pipeline`: layers are divided over stages; the engine sets DeepSpeed's other keys of it."""

    #: pipeline stages, processes that hold one copy of the model; must divide the number of processes
    stages: Annotated[int, Field(ge=2)]


class Recipe(StrictModel):
    """A whole configuration: the keys that this project reads, and DeepSpeed's, which it gets as they stand.

    Batch sizes, precision and checkpoints are not among them: they follow from `visft`.
    """

    zero_optimization: ZeroOptimization
    pipeline: PipelineKeys | None = None  #: null: every process has all layers
    #: permission for ZeRO to partition an optimiser that DeepSpeed does not list; null: no
    zero_allow_untested_optimizer: bool | None = None
    #: refusal to offload an optimiser other than DeepSpeed's CPU Adam; null: yes
    zero_force_ds_cpu_optimizer: bool | None = None
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    gradient_clipping: Rate  #: largest global L2 norm of the gradients; 0: no clipping
    visft: VisftConfig

    def contradictions(self) -> Problems:
        """Contradictions in the engine, between engine and model, and in the length of the run."""
        visft = self.visft
        zero = self.zero_optimization
        if zero.offload_param.device != "none" and zero.stage != 3:
            yield "zero_optimization.offload_param", "needs zero_optimization.stage = 3"
        if zero.offload_optimizer.device != "none":
            if zero.stage == 0:
                yield "zero_optimization.offload_optimizer", "needs zero_optimization.stage = 1, 2 or 3"
            if self.zero_force_ds_cpu_optimizer is not False:
                yield (
                    "zero_force_ds_cpu_optimizer",
                    "must be false with offload_optimizer: DeepSpeed would compile its own",
                )
        if self.pipeline is not None:
            yield from self._contradictions_of_pipeline()
        trains_backbone = visft.stage == 2
        if visft.features is not None and (trains_backbone or self.pipeline is not None or zero.stage == 3):
            yield "visft.features", "must be null in stage 2, with a pipeline and with ZeRO-3"
        if self.scheduler.params.total_num_steps is None and visft.steps() is None:
            yield (
                "scheduler.params.total_num_steps",
                "missing: state it, or visft.tasks.<task>.steps of every task",
            )

    def _contradictions_of_pipeline(self) -> Problems:
        zero = self.zero_optimization
        model = self.visft.model
        tasks = self.visft.tasks.enabled()
        heads = {name: getattr(task.head, "type", "") for name, task in tasks.items()}
        if zero.stage != 1:
            yield (
                "zero_optimization.stage",
                "must be 1 with a pipeline: 2 and 3 are refused, 0 clips stage by stage",
            )
        if zero.overlap_comm:
            yield "zero_optimization.overlap_comm", "must be false with a pipeline"
        if "plain" in heads.values() or len(model.out_indices) > 1:
            yield (
                "visft.model.out_indices",
                "several blocks, and plain heads, are not for a pipeline: use --engine zero3",
            )
        for name, head_type in heads.items():
            if head_type == "linear":
                yield (
                    f"visft.tasks.{name}",
                    "its linear head, which measures the features before the first step, is not for a "
                    "pipeline: use --engine zero1 or zero3",
                )
        if model.preset.startswith(TIMM):
            yield (
                "visft.model.preset",
                "timm's models have no stages: use --engine zero0, zero1, zero2 or zero3",
            )


_BATCH = "visft.tasks.<task>.batch_size and .micro_batch"
#: Keys of DeepSpeed that follow from `visft` -> what to state instead.
INSTEAD = {
    **dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), _BATCH
    ),
    **dict.fromkeys(("bf16", "fp16", "torch_autocast"), "visft.model.precision"),
    "activation_checkpointing": "visft.model.activation_checkpointing",
    "checkpoint": "visft.run.save_every",
    "steps_per_print": "visft.run.log_every",
}
#: Keys that DeepSpeed does not get as they stand.
OURS = ("optimizer", "scheduler", "gradient_clipping", "visft")


def complete() -> None:
    """Give the schema every task of the table; a task may be registered at any time."""
    absent = [name for name in entries() if name not in TasksConfig.model_fields]
    for name in absent:
        kind = config_class(name)
        TasksConfig.__pydantic_fields__[name] = FieldInfo.from_annotated_attribute(kind | None, None)
    if absent:
        for model in (TasksConfig, VisftConfig, Recipe):  # from the inside out
            model.model_rebuild(force=True)
