"""The values of a model that was built from shapes alone: each tensor is read or drawn, handed over, and
forgotten.

Which processes need which values, and what becomes of them (all kept, a share kept, moved to a GPU), is a
`Placement`; those of the engines are in `parallel.placement`. A value is the same whatever the placement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visft_ds.config.schema import ModelConfig, VisftConfig
from visft_ds.errors import RankError
from visft_ds.interop.heads import HeadFile
from visft_ds.interop.layouts import (
    MODEL,
    base_parameters,
    buffers_in,
    fingerprint,
    fitted,
    is_lora,
    is_small,
    open_backbone,
    set_tensor,
)
from visft_ds.interop.weights import Lazy, Weights
from visft_ds.model import MultiTaskModel
from visft_ds.models import Backbone
from visft_ds.models.lora import first_value
from visft_ds.models.timm_backbone import TimmBackbone, build_timm
from visft_ds.pretrained import local
from visft_ds.randomness import generator_for
from visft_ds.tasks import TASKS


class Placement:
    """Holds the whole model in this process, on the host; engines place values in their ways, one tensor at a
    time.

    Every process asks in the same order.
    """

    def held(self, module: MultiTaskModel) -> Container[str]:
        """Names of the parameters whose values this process needs; the others stay on the meta device."""
        return {name for name, _ in module.named_parameters()}

    def place(self, parameter: nn.Parameter) -> None:
        """Take over a parameter, in place, that has its whole value in host memory. May be collective."""


#: The placement of tools and tests that need no engine.
HOST = Placement()


@dataclass(frozen=True)
class BaseWeights:
    """The frozen backbone under adapters and heads."""

    identity: str  #: fingerprint of the values
    note: str
    drawn: bool  #: and in no file
    weights: Weights  #: as a file has them, or as they are drawn
    parameters: Mapping[str, Tensor]  #: name -> its shape and its dtype in the run
    storage: torch.dtype  #: of matrices
    buffers: Mapping[str, Tensor]  #: values of the backbone's buffers

    def read(self, name: str) -> Tensor:
        """A tensor's first value on the host. Raises ValueError for values that are not finite.

        Matrices that train pass through the dtype of storage, too: both stages start from the same values.
        """
        like = self.parameters[name]
        stored = torch.float32 if is_small(name, tuple(like.shape)) else self.storage
        return self.weights.tensor(name, stored).to(like.dtype)


def open_base(model: ModelConfig, backbone: Backbone, storage: torch.dtype) -> BaseWeights:
    """The base weights of a configuration; of a file names and shapes are checked, and a sample of its values
    is read.

    `backbone` is on any device and has every dtype as it will be. Raises ValueError as `open_backbone`.
    """
    parameters = {name: parameter.detach() for name, parameter in base_parameters(backbone).items()}
    values = dict[str, Lazy]()
    buffers = dict[str, Tensor]()
    seed = model.weights_seed
    has_buffers = any(True for _ in backbone.buffers())
    if model.weights is None and model.new_bands == "zero":
        raise ValueError("visft.model.new_bands=zero is for weights of three colours, and these are random")
    if isinstance(backbone, TimmBackbone) and (model.weights is None or has_buffers):
        # timm draws a model as a whole, and computes buffers that are in no file.
        drawn = build_timm(
            backbone.name,
            image_size=model.overrides.image_size,
            layers=model.out_indices,
            seed=seed,
            bands=model.bands,
        )
        buffers = dict(drawn.named_buffers())
        for name, parameter in drawn.named_parameters():
            read = partial(parameter.detach().to, storage)
            values[name] = Lazy(tuple(parameter.shape), storage, read)
    elif model.weights is None:
        for name, tensor in parameters.items():
            shape = tuple(tensor.shape)
            values[name] = Lazy(shape, storage, partial(random_weight, name, shape, seed, storage))
    if model.weights is None:
        weights = Weights(values, Path("random weights"))
        note = f"base weights: random, a function of visft.model.weights_seed={seed}"
    else:
        weights = open_backbone(backbone, local(model.weights))
        buffers |= buffers_in(weights, parameters)
        count = sum(value.numel() for value in parameters.values())
        note = f"base weights: {weights.path.name}, {len(weights)} tensors, {count:,} parameters"
        if model.bands is not None and '"bands"' not in weights.metadata.get(MODEL, ""):
            note += f"; {_first_weights(backbone)}"
    identity = fingerprint({name: weights[name] for name in parameters})
    return BaseWeights(identity, note, model.weights is None, weights, parameters, storage, buffers)


def _first_weights(backbone: Backbone) -> str:
    """Tell what became of the weights that saw three colours, see `layouts.widened`."""
    channels = len(backbone.pixel_mean)
    name = backbone.first_weight
    if channels == 1:
        return f"{name}: those of three colours are summed for one band"
    if channels == 3:
        return f"{name}: the bands take the places of red, green and blue"
    if backbone.bands is not None and backbone.bands.new == "zero":
        return (
            f"{name}: the first three bands take the places of red, green and blue, those of the other "
            f"{channels - 3} begin at 0, and stay there unless {name} trains"
        )
    return f"{name}: those of three colours are repeated in turn for {channels} bands, times 3/{channels}"


def random_weight(name: str, shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """EVA's initial weights: normal(0, .02), branch outputs divided by sqrt(2 * (block + 1)), biases 0, norms
    1.

    Positions are fixed sines instead: random ones of this size drown in a frozen random tower, and heads
    learn boxes half as well. EVA's truncation lies 100 standard deviations out and costs twenty times the
    drawing: it is left out. The values are on the CPU, rounded from fp32: a function of the seed, the
    parameter's name and its shape alone.
    """
    if name.endswith("bias"):
        return torch.zeros(tuple(shape), dtype=dtype)
    if "norm" in name:
        return torch.ones(tuple(shape), dtype=dtype)
    if name == "pos_embed":
        return _sine_positions(shape).to(dtype)
    std = 0.02
    if name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
        std /= (2.0 * (int(name.split(".")[1]) + 1)) ** 0.5
    return torch.empty(tuple(shape)).normal_(0.0, std, generator=generator_for(seed, name)).to(dtype)


def _sine_positions(shape: Sequence[int]) -> Tensor:
    """Sines and cosines of a square grid (MAE, arXiv 2111.06377, A.1), (1, 1 + side * side, width): the class
    token and odd channels at the end are 0.
    """
    side = math.isqrt(shape[1] - 1)
    width = shape[2]
    count = width // 4
    frequencies = 10_000.0 ** -(torch.arange(count, dtype=torch.float32) / max(1, count))
    angles = torch.arange(side, dtype=torch.float32)[:, None] * frequencies  # (side, width / 4)
    axis = torch.cat((angles.sin(), angles.cos()), dim=1)
    grid = torch.cat((axis.repeat(side, 1), axis.repeat_interleave(side, 0)), dim=1)
    return F.pad(grid, (0, width - 4 * count, 1, 0))[None]


@dataclass(frozen=True)
class Start:
    """Values that a run begins with in place of drawn ones: those of another run, or of an adapter."""

    path: Path
    sha256: str  #: of what is read
    tensors: Weights  #: by qualified name of a parameter
    base: str | None  #: fingerprint of the base weights that they were trained on; None: nobody recorded it
    note: str
    step: int | None = None  #: of a run

    def check(self, module: nn.Module, trained: Iterable[str], base: str) -> None:
        """Raise ValueError if these are not the values of what a run trains (names), or are of another
        base.
        """
        if self.base not in (None, base):
            raise ValueError(f"{self.path} was trained on other base weights ({self.base}); these are {base}")
        buffers = dict(module.named_buffers())
        measured = {name: value for name, value in buffers.items() if name.startswith("heads.")}
        values = {name: module.get_parameter(name) for name in trained} | measured
        begun = {_part(name) for name in self.tensors}
        shapes = {name: value for name, value in values.items() if _part(name) in begun}
        what = "what this run trains (--reset-heads draws the heads anew)"
        fitted(self.tensors, shapes, behind=(), what=what)


def _part(name: str) -> str:
    """The head, or the backbone, that a parameter is part of."""
    first, second, *_ = name.split(".")
    return f"{first}.{second}" if first == "heads" else first


def fill_model(
    module: MultiTaskModel,
    config: VisftConfig,
    base: BaseWeights,
    heads: Mapping[str, HeadFile],
    vocabulary_size: int | None,
    placement: Placement,
    start: Start | None = None,
) -> None:
    """Give every parameter that this process holds its value, in the module's order: one tensor exists at a
    time.

    Heads without a file draw from one generator, one head after the other, so of these one head exists at a
    time.

    Args:
        module: on the meta device, each parameter of the dtype it is to have.
        heads: files of all tasks, or none: then they start at random from `config.seed`, as in every process.
        start: values instead of drawn ones.

    Raises:
        ValueError: values that are not finite; a `RankError` from a process that does not hold all of them.
    """
    backbone = module.backbone
    held = placement.held(module)
    begun = Weights({}, Path()) if start is None else start.tensors

    def fill(part: nn.Module, prefix: str, read: Callable[[str], Tensor]) -> None:
        tensors: list[tuple[str, Tensor]] = [*part.named_parameters()]
        if part is not backbone:  # whose buffers are in no file
            tensors += part.named_buffers()
        for name, like in tensors:
            qualified = prefix + name
            is_parameter = isinstance(like, nn.Parameter)
            if is_parameter and qualified not in held:
                continue
            value = begun.tensor(qualified, torch.float32) if qualified in begun else read(name)
            value = value.detach().to(like.dtype)
            if is_parameter:
                value = nn.Parameter(value, like.requires_grad)
                placement.place(value)
            set_tensor(part, name, value)

    def read_backbone(name: str) -> Tensor:
        return first_value(backbone, name, config.seed) if is_lora(name) else base.read(name)

    try:
        fill(backbone, "backbone.", read_backbone)
        for name, value in base.buffers.items():
            set_tensor(backbone, name, value)
    except ValueError as error:
        if all(name in held for name, _ in module.named_parameters()):
            raise
        raise RankError(str(error)) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        for task, head in module.heads.items():
            if task in heads:
                fill(head, f"heads.{task}.", partial(heads[task].tensors.tensor, dtype=torch.float32))
                continue
            settings = config.tasks.enabled()[task].head
            drawn = TASKS[task].build_head(backbone.shapes, settings, vocabulary_size).state_dict()
            fill(head, f"heads.{task}.", drawn.pop)
