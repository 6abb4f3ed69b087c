"""Stages: what is adapted and what trains. `prepare_model` is the one ordered list of steps that makes a
model.

Stage 1: the heads train on a frozen backbone. Stage 2: the backbone trains, through adapters (arXiv
2401.10222, section
3) or itself; the heads are frozen. Parameter groups decide what trains, a stage what must be among it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import nn

from visft_ds.config import Batches, ResolvedConfig
from visft_ds.config.schema import OptimizerParams, ParamGroup, VisftConfig
from visft_ds.data.fetch import sha256_of
from visft_ds.data.shards import Category
from visft_ds.interop.heads import HeadFile, HeadInfo, check_heads, open_head, read_elsewhere
from visft_ds.interop.layouts import is_small, other_base
from visft_ds.model import PADDING, MultiTaskModel, TaskModule
from visft_ds.models import build_empty
from visft_ds.models.eva_vit import EvaViT
from visft_ds.models.lora import inject_lora, lora_layers
from visft_ds.ops import DTYPES, shapes_alone
from visft_ds.prepare.datasets import classes_of_run
from visft_ds.prepare.materialize import HOST, BaseWeights, Placement, Start, fill_model, open_base
from visft_ds.settings.bands import Bands
from visft_ds.settings.fields import Precision
from visft_ds.settings.task_schema import WordsConfig
from visft_ds.tasks import TASKS
from visft_ds.tasks.vocabulary import Vocabulary

#: Ids of the published captioning heads (https://huggingface.co/TencentARC/ViSFT).
PUBLISHED_VOCABULARY = 9490
#: Options of a head that do not decide what its weights mean.
_NOT_OF_WEIGHTS = {"dropout", "max_detections"}


@dataclass(frozen=True)
class TrainedGroup:
    """Parameter group after matching."""

    name: str
    lr: float
    weight_decay: float
    names: tuple[str, ...]  #: qualified parameter names
    parameters: tuple[nn.Parameter, ...]
    count: int  #: of trained values; ZeRO-3 empties the parameters


@dataclass(frozen=True)
class PreparedModel:
    """A model ready for any engine."""

    module: MultiTaskModel
    groups: tuple[TrainedGroup, ...]
    base: BaseWeights
    heads: Mapping[str, HeadFile]  #: that the run was given, by task
    notes: tuple[str, ...] = ()  #: checks passed, one line each

    def identity(self) -> dict[str, str]:
        """Weights that it begins with, and what it makes of an image's borders, for its checkpoints."""
        heads = " ".join(sha256_of(head.tensors.path) for head in self.heads.values())
        return {"base weights": self.base.identity, "heads": heads or "trained here", "padding": PADDING}


def prepare_model(
    config: ResolvedConfig,
    *,
    precision: Precision = "fp32",
    heads_from: Path | None = None,
    categories: Sequence[Category] = (),
    vocabulary: Vocabulary | None = None,
    placement: Placement = HOST,
    start: Start | None = None,
) -> PreparedModel:
    """The model of a stage; nothing is allocated before all that follows from shapes and descriptions is
    checked.

    Args:
        precision: storage of the frozen matrices. What trains is fp32 in any case.
        heads_from: folder of stage-1 heads; None starts them at random.
        categories, vocabulary: of the training data; heads that know other ones are refused.
        placement: what this process holds, and where.
        start: values instead of drawn ones.

    Raises:
        ValueError: weights of another model, a group that matches nothing, a parameter in two groups,
            something that must train but does not, adapters without effect.
    """
    visft = config.visft
    storage = DTYPES[precision]
    words = None if vocabulary is None else vocabulary.size
    module, planned_groups = plan_model(config, words, storage)
    if visft.lora is not None:
        side = min(module.backbone.image_size, 4 * module.backbone.patch_size)
        check_reached(
            module.backbone, torch.empty(1, len(module.backbone.pixel_mean), side, side, device="meta")
        )
    base = open_base(visft.model, module.backbone, storage)
    notes = [base.note]
    heads: dict[str, HeadFile] = {}
    if heads_from is not None:
        heads = {task: open_head(heads_from, task) for task in module.heads}
        infos = {task: head.info for task, head in heads.items()}
        check_heads(infos, classes_of_run(visft, categories), categories, vocabulary)
        notes += _check_heads(infos, visft, base)
        heads = {task: head.check(module.heads[task]) for task, head in heads.items()}
        notes.append(f"heads loaded strictly from {heads_from}: {', '.join(module.heads)}")
    if start is not None:
        start.check(module, [name for group in planned_groups for name in group.names], base.identity)
        notes.append(start.note)
    fill_model(module, visft, base, heads, words, placement, start)
    parameters = dict(module.named_parameters())
    groups = tuple(
        replace(group, parameters=tuple(parameters[name] for name in group.names)) for group in planned_groups
    )
    return PreparedModel(module, groups, base, heads, tuple(notes))


def plan_model(
    config: ResolvedConfig,
    vocabulary_size: int | None = PUBLISHED_VOCABULARY,
    storage: torch.dtype = torch.float32,
) -> tuple[MultiTaskModel, tuple[TrainedGroup, ...]]:
    """The model on the meta device and what would train, from shapes alone: no file is read.

    Args:
        vocabulary_size: that of the published captioning heads unless the data's own is known.
        storage: of the frozen matrices; the few small tensors (norms and position embeddings) and what trains
            are fp32, but for vectors that our blocks use in it.

    Raises:
        ValueError: as `prepare_model`, as far as shapes show.
    """
    visft = config.visft
    model = visft.model
    backbone = build_empty(model.preset, storage, model.backbone_options())
    for name, parameter in backbone.named_parameters():
        # Our blocks use their vectors in 16 bit, but for norms of the residual stream; stored so, they are
        # not cast.
        used_in_16_bit = False
        if isinstance(backbone, EvaViT) and name.startswith("blocks."):
            used_in_16_bit = backbone.post_norm or ".norm" not in name
        if is_small(name, parameter.shape) and not used_in_16_bit:
            parameter.data = parameter.data.float()
    tasks = {}
    for name, task in visft.tasks.enabled().items():
        with shapes_alone():
            head = TASKS[name].build_head(backbone.shapes, task.head, vocabulary_size)
        criterion = TASKS[name].losses(task.head, task.loss)
        decoding = task.decoding.model_dump() if isinstance(task, WordsConfig) else {}
        tasks[name] = TaskModule(head, criterion, decoding)
    module = MultiTaskModel(backbone, tasks, train_backbone=False, heads_active=False)
    if visft.lora is not None:
        inject_lora(backbone, **visft.lora.model_dump())
    groups = apply_groups(module, visft.param_groups, config.optimizer.params)
    for group in groups:
        for parameter in group.parameters:
            parameter.data = parameter.data.float()
    names = [name for group in groups for name in group.names if name.startswith("backbone.")]
    module.train_backbone = bool(names)
    heads_train = any(parameter.requires_grad for parameter in module.heads.parameters())
    module.heads_active = visft.heads.train_mode or heads_train
    # A training has settled "auto" before (run.machine); elsewhere there is no backward pass.
    policy = model.activation_checkpointing
    module.backbone.recompute = "none" if policy == "auto" else policy
    module.heads_in_fp32 = visft.heads.precision == "fp32"

    _check_what_trains(module, visft)
    return module, groups


def _check_what_trains(module: MultiTaskModel, config: VisftConfig) -> None:
    """Raise ValueError where something that a stage must train is in no parameter group."""
    must = []
    if config.stage == 1 or config.heads.start == "random":
        must.append("heads.*")
    if config.lora is not None:
        must.append("backbone.*.lora_*")
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    idle = [name for name in frozen if any(fnmatchcase(name, glob) for glob in must)]
    if idle:
        raise ValueError(
            f"stage {stage_name(config)!r} must train {', '.join(must)}, but {len(idle)} parameters match no "
            f"glob of visft.param_groups (e.g. {idle[0]}) and would stay frozen; widen a glob, or set "
            "visft.lora=null for no adapters"
        )
    if config.stage == 2 and not module.train_backbone:
        raise ValueError(
            f"stage {stage_name(config)!r} must train some of backbone.*, but no group of visft.param_groups "
            "holds any of it; give adapters (visft.lora) or a glob such as backbone.*bias (docs/training.md)"
        )


def apply_groups(
    module: nn.Module, groups: Iterable[ParamGroup], defaults: OptimizerParams
) -> tuple[TrainedGroup, ...]:
    """Match groups to parameters by glob and make exactly the matched ones trainable.

    Raises ValueError for all problems at once: groups that match nothing, parameters in more than one group.
    """
    parameters = dict(module.named_parameters())
    owner = dict[str, str]()
    problems = []
    trained = []
    for group in groups:
        for glob in group.globs():
            if not any(fnmatchcase(name, glob) for name in parameters):
                beginnings = sorted({".".join(name.split(".")[:2]) for name in parameters})
                known = ", ".join(beginnings[:6])
                problems.append(
                    f"group {group.name!r}: {glob!r} matches no parameter (names begin with {known}; "
                    "all heads are heads.*)"
                )
        names = [name for name in parameters if any(fnmatchcase(name, glob) for glob in group.globs())]
        doubled = [name for name in names if name in owner]
        problems += [f"{name} is in groups {owner[name]!r} and {group.name!r}" for name in doubled[:3]]
        owner.update(dict.fromkeys(names, group.name))
        of_group = tuple(parameters[name] for name in names)
        trained.append(
            TrainedGroup(
                name=group.name,
                lr=defaults.lr if group.lr is None else group.lr,
                weight_decay=defaults.weight_decay if group.weight_decay is None else group.weight_decay,
                names=tuple(names),
                parameters=of_group,
                count=sum(parameter.numel() for parameter in of_group),
            )
        )
    if problems:
        raise ValueError("visft.param_groups:\n" + "\n".join(f"  {problem}" for problem in problems))
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in owner)
    return tuple(trained)


def choose_precision(requested: str, device: torch.device) -> tuple[Precision, str]:
    """The precision of a run and why. Raises ValueError for an unknown one, or one that the hardware
    lacks.
    """
    allowed = ("auto", *get_args(Precision))
    if requested not in allowed:
        raise ValueError(f"precision {requested!r} is not allowed: give {', '.join(allowed)}")
    if device.type == "cpu":
        if requested == "auto":
            return "fp32", "auto: a CPU"
        return cast(Precision, requested), "as configured"
    name = torch.cuda.get_device_name(device)
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if requested == "auto":
        return ("bf16", f"auto: {name} has bf16") if has_bf16 else ("fp16", f"auto: {name} has no bf16")
    if requested == "bf16" and not has_bf16:
        raise ValueError(f"visft.model.precision = bf16: {name} does not support it; use fp16 or auto")
    return cast(Precision, requested), "as configured"


def deepspeed_dict(config: ResolvedConfig, batches: Batches, precision: Precision) -> dict[str, Any]:
    """The plain dict for `deepspeed.initialize`: engine keys plus everything that is derived.

    `precision` is what visft.model.precision means on this hardware.
    """
    assert config.visft.model.precision in ("auto", precision), (config.visft.model.precision, precision)
    # DeepSpeed knows one batch; where tasks differ it gets the largest. It only checks and reports with it.
    micro = max(batches.micro.values())
    result = {
        **copy.deepcopy(dict(config.deepspeed)),
        "gradient_clipping": config.gradient_clipping,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": batches.accumulation,
        "train_batch_size": micro * batches.accumulation * batches.dp,
        "steps_per_print": 10**9,
    }
    if precision != "fp32":
        # No module is listed, so that DeepSpeed reduces gradients in the dtype of their parameter, which is
        # fp32.
        dtype = "bfloat16" if precision == "bf16" else "float16"
        result["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
    return result


def _check_heads(infos: Mapping[str, HeadInfo], config: VisftConfig, base: BaseWeights) -> list[str]:
    """Check what shapes do not show: options of a head and the block that it reads, refused; base and mode,
    noted.
    """
    notes = []
    for task, info in infos.items():
        here = config.tasks.enabled()[task].head.model_dump(mode="json")
        compared = here.keys() & info.options.keys() - _NOT_OF_WEIGHTS
        other = [
            f"{name} {info.options[name]} (here {here[name]})"
            for name in sorted(compared)
            if info.options[name] != here[name]
        ]
        if other:
            raise ValueError(
                f"the {task} head was trained with {', '.join(other)}: give visft.tasks.{task}.head the same "
                "values"
            )
        problem = read_elsewhere(info, config.model.out_indices, config.model.bands)
        if problem and Bands.of(info.extra.get("bands")) != config.model.bands:
            raise ValueError(f"{problem}: give heads of the same pictures")
        if problem:
            blocks = ",".join(map(str, info.extra.get("layers", [])))
            raise ValueError(f"{problem}: give --set 'visft.model.out_indices=[{blocks}]'")
        problem = other_base(f"the {task} head", info.extra.get("base_weights"), {base.identity})
        if problem:
            notes.append(f"warning: {problem}")
        mode = info.extra.get("mode", config.mode)
        if mode != config.mode:
            notes.append(
                f"the {task} head was trained in mode {mode}, this run is in mode {config.mode} (visft.mode)"
            )
    return notes


def stage_name(config: VisftConfig) -> str:
    """Name of a stage by what it trains, as it is printed."""
    if config.stage == 1:
        return "heads"
    adapted = "lora" if config.lora else "backbone"
    return f"{adapted} and heads" if config.heads.start == "random" else adapted


@torch.no_grad()
def check_reached(module: nn.Module, inputs: torch.Tensor) -> None:
    """Raise ValueError if the forward bypasses an adapted layer, which would then train nothing, silently."""
    layers = lora_layers(module)
    reached = set[nn.Module]()
    hooks = [layer.register_forward_hook(lambda layer, *_: reached.add(layer)) for layer in layers.values()]
    module(inputs)
    for hook in hooks:
        hook.remove()
    bypassed = [name for name, layer in layers.items() if layer not in reached]
    if bypassed:
        raise ValueError(
            f"visft.lora.targets: the forward pass bypasses {bypassed[0]} ({len(bypassed)} such)"
        )
