"""Placements of a model's values for each engine (`visft_ds.prepare.materialize.Placement`).

Every process reads the weight file itself, mapped into memory: the processes of a host share its pages, which the
system may drop at any time; and each finds a damaged value at the same tensor as all others.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
from torch import nn

from visft_ds.data.loader import Place
from visft_ds.model import MultiTaskModel
from visft_ds.parallel import distributed
from visft_ds.parallel.partition import Partition
from visft_ds.parallel.pipeline_layers import owners
from visft_ds.prepare.materialize import Placement


def placement_for(config: dict[str, Any], partition: Partition | None) -> Placement:
    """The placement of the engine that `build_engine` makes of the same arguments."""
    if partition is not None:
        return OwnLayers(partition.bounds)
    return Shards(config) if config["zero_optimization"]["stage"] == 3 else OnDevice()


class OnDevice(Placement):
    """Placement of the whole model on this process's device (ZeRO 0-2); the host holds one tensor of it at a time."""

    def place(self, parameter: nn.Parameter) -> None:
        """Move it."""
        parameter.data = parameter.data.to(distributed.local_device())


@dataclass
class OwnLayers(OnDevice):
    """Placement of the layers of this process's pipeline stage, on its device."""

    bounds: Sequence[int]  #: first layer of each stage, and the number of layers

    def held(self, module: MultiTaskModel) -> Container[str]:
        """Names in the layers of the stage."""
        stage = Place.of_rank(distributed.rank(), distributed.world_size(), len(self.bounds) - 1).stage
        return {name for name, owner in owners(module, self.bounds).items() if owner == stage}


class Shards(Placement):
    """Placement of a share of every tensor in each process (ZeRO-3), on its device, or on the host when offloading.

    Each process holds the undivided tensor while it is divided; the values are the main process's.

    Args:
        config: the plain DeepSpeed dict, batch keys included.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._first: Any = None

    def place(self, parameter: nn.Parameter) -> None:
        """Divide it. Collective."""
        if self._first is None:
            deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=self._config)
            self._first = parameter
        else:  # as DeepSpeed itself adds parameters to a divided model; another `Init` would read the config again
            self._first.convert_to_zero_parameters(param_list=[parameter])

    @contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        """Gather the parameters that each module inside owns itself before it runs, and drop them after. Collective."""
        gathered: dict[nn.Module, Any] = {}

        def gather(part: nn.Module, _: Any) -> None:
            gathered[part] = deepspeed.zero.GatheredParameters(list(part.parameters(recurse=False)))
            gathered[part].__enter__()

        def drop(part: nn.Module, *_: Any) -> None:
            gathered.pop(part).__exit__(None, None, None)

        with ExitStack() as hooks:
            for part in module.modules():
                if any(True for _ in part.parameters(recurse=False)):
                    hooks.callback(part.register_forward_pre_hook(gather).remove)
                    hooks.callback(part.register_forward_hook(drop, always_call=True).remove)
            yield
