"""Placements of a model's values for each engine (`visft_ds.prepare.materialize.Placement`).

Every process reads the weight file itself, mapped into memory: the processes of a host share its pages, which
the system may drop at any time; and each finds a damaged value at the same tensor as all others.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
from torch import nn

from visft_ds import distributed
from visft_ds.distributed import PipelinePosition
from visft_ds.model import MultiTaskModel
from visft_ds.prepare.materialize import Placement


def placement_for(config: dict[str, Any], bounds: Sequence[int] | None) -> Placement:
    """The placement of the engine that `build_engine` makes of the same arguments."""
    if bounds is not None:
        return OwnLayers(bounds)
    return Shards(config) if config["zero_optimization"]["stage"] == 3 else OnDevice()


class OnDevice(Placement):
    """Placement of the whole model on this process's device (ZeRO 0-2); the host holds one tensor of it at a
    time.
    """

    def place(self, parameter: nn.Parameter) -> None:
        """Move it."""
        parameter.data = parameter.data.to(distributed.local_device())


@dataclass
class OwnLayers(OnDevice):
    """Placement of the layers of this process's pipeline stage, on its device."""

    bounds: Sequence[int]  #: first layer of each stage, and the number of layers

    def held(self, module: MultiTaskModel) -> Container[str]:
        """Names in the layers of the stage."""
        from visft_ds.parallel.pipeline_layers import owners

        stage = PipelinePosition.here(len(self.bounds) - 1).stage
        return {name for name, owner in owners(module, self.bounds).items() if owner == stage}


class Shards(Placement):
    """Placement of a share of every tensor in each process (ZeRO-3), on its device, or on the host when
    offloading.

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
        else:
            # As DeepSpeed itself adds parameters to a divided model; `Init` would read the config again.
            self._first.convert_to_zero_parameters(param_list=[parameter])
