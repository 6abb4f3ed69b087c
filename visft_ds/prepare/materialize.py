"""The values of a model that was built from shapes alone: each tensor is read or drawn, handed over, and forgotten.

Which processes need which values, and what becomes of them (all kept, a share kept, moved to a GPU), is a `Placement`;
those of the engines are in `parallel.placement`. A value is the same whatever the placement.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from typing import Protocol

import torch
from torch import Tensor, nn

from visft_ds.config.schema import ModelConfig, VisftConfig
from visft_ds.interop.backbones import open_backbone
from visft_ds.interop.files import DRAWN_AS, TensorInfo, sha256_file
from visft_ds.interop.head_file import HeadFile
from visft_ds.interop.layouts import base_parameters, is_lora
from visft_ds.model import MultiTaskModel
from visft_ds.models import Backbone
from visft_ds.models.eva_vit import random_weight
from visft_ds.models.lora import first_value
from visft_ds.models.timm_backbone import TimmBackbone, build_timm
from visft_ds.prepare.start import Start
from visft_ds.pretrained import check_digest, local
from visft_ds.resilience.errors import RankError
from visft_ds.tasks import TASKS


class Placement(Protocol):
    """Placement of values as they come in, one tensor at a time. Every process asks in the same order."""

    def held(self, module: MultiTaskModel) -> Container[str]:
        """Names of the parameters whose values this process needs; the others stay on the meta device."""
        ...

    def place(self, parameter: nn.Parameter) -> None:
        """Take over a parameter, in place, that has its whole value in host memory. May be collective."""
        ...

    def whole(self, module: nn.Module) -> AbstractContextManager[None]:
        """In this context each module inside has its own parameters whole while it runs, whoever holds them."""
        ...


class InHostMemory:
    """All of the model in this process, on the host."""

    def held(self, module: MultiTaskModel) -> Container[str]:
        """All names."""
        return {name for name, _ in module.named_parameters()}

    def place(self, parameter: nn.Parameter) -> None:
        """It is where it belongs."""

    def whole(self, module: nn.Module) -> AbstractContextManager[None]:
        """They always are."""
        return nullcontext()


#: The placement of tools and tests that need no engine.
HOST = InHostMemory()


@dataclass(frozen=True)
class BaseWeights:
    """The frozen tower under adapters and heads."""

    identity: str  #: sha256 of the file, or the recipe of the random weights
    note: str
    infos: Mapping[str, TensorInfo]  #: name in the tower -> shape, and dtype
    load: Callable[[str], Tensor]
    buffers: Callable[[], Mapping[str, Tensor]] = dict  #: values of the backbone's buffers
    beside: Callable[[], Mapping[str, Tensor]] = dict  #: what its library's model has beyond the backbone
    drawn_as: str | None = None  #: recipe of random weights, also of those that were written to a file
    exact: Callable[[str], Tensor] | None = None  #: a value as its file has it, not rounded to the run's precision

    @property
    def names(self) -> tuple[str, ...]:
        """By what heads may know these weights: those of a run without a file know the recipe."""
        return tuple(dict.fromkeys(name for name in (self.identity, self.drawn_as) if name is not None))

    def read(self, name: str) -> Tensor:
        """Read a tensor's initial value into memory of its own on the host.

        Raises ValueError for values that are not finite.
        """
        return self.load(name).to(self.infos[name].dtype)

    def whole(self, name: str) -> Tensor:
        """Read a tensor in fp32 as its file has it; of random weights as the run has it, and the file it writes."""
        return (self.exact or self.load)(name).float()


def open_base(model: ModelConfig, backbone: Backbone, storage: torch.dtype) -> BaseWeights:
    """The base weights of a configuration; nothing but names and shapes is read of a file.

    Args:
        backbone: on any device, with every dtype as it will be.
        storage: of matrices. Those that train pass through it as well, so that both stages start from the same values.

    Raises:
        ValueError: a file of another model, see `open_backbone`.
    """
    infos = {name: TensorInfo.of(parameter) for name, parameter in base_parameters(backbone).items()}
    timm = _drawn_by_timm(model, backbone, infos, storage) if isinstance(backbone, TimmBackbone) else None
    if model.weights is not None:
        path = local(model.weights)
        opened, sha256 = open_backbone(backbone, path), sha256_file(path)
        check_digest(path, sha256)
        return BaseWeights(
            sha256,
            f"base weights: {opened.summary}",
            infos,
            lambda name: opened.read(name, torch.float32 if is_small(name, infos[name].shape) else storage),
            lambda: {**(timm.buffers() if timm is not None else {}), **opened.buffers()},
            drawn_as=opened.file.metadata.get(DRAWN_AS),
            exact=lambda name: opened.read(name, torch.float32),
        )
    if timm is not None:
        return timm
    recipe = f"random {model.preset} {model.backbone_options()} seed {model.weights_seed}"
    return BaseWeights(
        recipe,
        f"base weights: random, a function of visft.model.weights_seed={model.weights_seed}",
        infos,
        lambda name: random_weight(name, infos[name].shape, model.weights_seed).to(storage),
        drawn_as=recipe,
    )


def check_base_file(model: ModelConfig, backbone: Backbone) -> None:
    """Raise what `open_base` raises of a file; unlike it, do not read the whole file for its hash."""
    path = None if model.weights is None else local(model.weights)
    if path is not None and path.is_file():
        open_backbone(backbone, path)


def _drawn_by_timm(
    model: ModelConfig, backbone: TimmBackbone, infos: Mapping[str, TensorInfo], storage: torch.dtype
) -> BaseWeights:
    """Random weights of a model of timm; of one that is read from a file only buffers are taken, if it has any."""

    @cache
    def drawn() -> TimmBackbone:
        """timm draws a model as a whole."""
        size = model.overrides.image_size
        return build_timm(backbone.name, image_size=size, layers=model.layers, seed=model.weights_seed)

    recipe = f"random {model.preset} {model.backbone_options()} seed {model.weights_seed}, timm {version('timm')}"
    return BaseWeights(
        recipe,
        f"base weights: random, drawn by timm, a function of visft.model.weights_seed={model.weights_seed}",
        infos,
        lambda name: drawn().get_parameter(name).detach().to(storage, copy=True),
        lambda: dict(drawn().named_buffers()) if any(True for _ in backbone.buffers()) else {},
        lambda: drawn().left_out,
        recipe,
    )


def is_small(name: str, shape: tuple[int, ...]) -> bool:
    """Return True if a tensor of a tower is one of the few small ones that stay in fp32: norms, biases, positions."""
    return len(shape) < 2 or name in ("pos_embed", "cls_token", "reg_token")


def fill_model(
    module: MultiTaskModel,
    config: VisftConfig,
    base: BaseWeights,
    heads: Mapping[str, HeadFile],
    vocabulary_size: int | None,
    placement: Placement,
    start: Start | None = None,
) -> None:
    """Give every parameter that this process holds its value, in the module's order.

    Of the backbone one tensor exists at a time. Heads without a file draw from one generator, one head after the other,
    so of these one head does (at most 14 million values, half of EVA-ViT-E's largest tensor).

    Args:
        module: on the meta device, each parameter of the dtype it is to have.
        heads: files of all tasks, or none: then they start at random from `config.seed`, as in every process.
        start: values instead of drawn ones.

    Raises:
        ValueError: values that are not finite; a `RankError` from a process that does not hold all of them.
    """
    backbone, held = module.backbone, placement.held(module)

    def of_backbone(name: str) -> Tensor:
        def drawn() -> Tensor:
            return first_value(backbone, name, config.seed) if is_lora(name) else base.read(name)

        return drawn() if start is None else start.value(f"backbone.{name}", drawn)

    try:
        _fill(backbone, "backbone.", of_backbone, held, placement)
        if isinstance(backbone, TimmBackbone):
            backbone.set_buffers(base.buffers())
    except ValueError as error:
        if all(name in held for name, _ in module.named_parameters()):
            raise
        raise RankError(str(error)) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        for task, head in module.heads.items():
            if task in heads:
                _fill(head, f"heads.{task}.", partial(heads[task].read, dtype=torch.float32), held, placement)
                continue
            options = config.tasks.enabled()[task].head.model_dump()
            drawn = dict(TASKS[task].build_head(backbone.width, options, vocabulary_size).named_parameters())
            _fill(head, f"heads.{task}.", _begun(f"heads.{task}.", drawn, start), held, placement)


def _begun(prefix: str, drawn: dict[str, nn.Parameter], start: Start | None) -> Callable[[str], Tensor]:
    if start is None:
        return drawn.pop
    return lambda name: start.value(prefix + name, partial(drawn.pop, name))


def _fill(
    module: nn.Module, prefix: str, read: Callable[[str], Tensor], held: Container[str], placement: Placement
) -> None:
    """Replace each parameter `prefix` + name that is held by one with its value."""
    for name, shape in list(module.named_parameters()):
        if prefix + name in held:
            parameter = nn.Parameter(read(name).detach().to(shape.dtype), shape.requires_grad)
            placement.place(parameter)
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner).register_parameter(leaf, parameter)
