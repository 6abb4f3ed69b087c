"""A backbone whose own parameters trained, all or some of them, as a change of its base weights.

Its values are known, and not a difference: what is written is what was trained, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from visft_ds.interop.adapter import Adapter, fingerprint_of
from visft_ds.interop.backbones import timm_settings
from visft_ds.interop.files import TRAINED, TRAINED_ON, TensorInfo, WeightFile, examples, open_weights
from visft_ds.interop.layouts import Tower, base_parameters, layers_in, tower_names
from visft_ds.models import Backbone


@dataclass(frozen=True)
class TunedWeights:
    """Values of a tower's parameters after training, by our names; what did not train, or is absent, is as in the base.

    `scale` is a factor on the change. `base_sha256` is None where nobody recorded the base.
    """

    file: WeightFile
    base_sha256: str | None
    scale: float = 1.0

    @property
    def timm(self) -> tuple[str, int | None] | None:
        """(name, image size) of the model of timm that it is one of, or None."""
        return timm_settings(self.file)

    @property
    def layers_read(self) -> tuple[int, ...]:
        """Block that the tower ended after when it was trained; None: it was whole."""
        return layers_in(self.file)

    def weights(self) -> tuple[str, ...]:
        """Names of all base weights that trained: those that the header tells, or all of a checkpoint's."""
        if TRAINED not in self.file.metadata:
            return tuple(self.file)
        told = set(self.file.told(TRAINED, list[str]))
        return tuple(name for name in self.file if name in told)

    def apply(self, weight: str, base: Tensor) -> tuple[Tensor, Tensor]:
        """(result, change) of one base weight, fp32 all."""
        value = self.file.get(weight).float()
        change = value - base
        if self.scale == 1:
            return value, change
        change *= self.scale
        return base + change, change

    @cached_property
    def _sha256(self) -> str:
        return fingerprint_of(("tuned", self.scale), ((name, self.file.get(name)) for name in sorted(self.file)))

    def fingerprint(self) -> str:
        """SHA-256 of values and scale, independent of the file they came from."""
        return self._sha256

    def scaled(self, scale: float) -> TunedWeights:
        """With `scale` times its effect, any number, also 0 and below."""
        return replace(self, scale=self.scale * scale)

    def record(self) -> dict[str, object]:
        """Entry in the metadata of merged weights."""
        return {"tensors": len(self.weights()), "scale": self.scale}

    def describe(self) -> str:
        """A few words for the console and the card."""
        count = sum(self.file.infos[name].numel for name in self.weights())
        return f"{len(self.weights())} tensors of a backbone that trained itself, {count:,} values"

    def fit(self, tower: Tower) -> TunedWeights:
        """Itself. Raises ValueError where it has tensors that the tower has not, or of another shape."""
        names = tower_names(tower)
        wrong = [name for name in self.file if names.get(name) != self.file.shape(name)]
        if wrong:
            raise ValueError(
                f"{self.file.path} trained another tower than this one ({tower.describe()}): {examples(wrong)}"
            )
        return self

    def install(self, backbone: Backbone) -> None:
        """Move a model that has its base weights there."""
        parameters = base_parameters(backbone)
        with torch.no_grad():
            for name in (name for name in self.weights() if name in parameters):
                parameters[name].copy_(self.apply(name, parameters[name].float())[0])


#: What can come on top of base weights.
Change = Adapter | TunedWeights


def read_tuned(path: Path) -> TunedWeights:
    """Read `<run>/export/trained_backbone.safetensors`."""
    file = open_weights(path)
    return TunedWeights(file, file.metadata.get(TRAINED_ON))


def tuned_of(
    tensors: Mapping[str, Tensor], path: Path, base_sha256: str | None, metadata: Mapping[str, str] | None = None
) -> TunedWeights:
    """Tensors at hand, by our names; `path` names them in messages, metadata as that of a file."""
    infos = {name: TensorInfo.of(value) for name, value in tensors.items()}
    return TunedWeights(WeightFile(path, infos, tensors.__getitem__, metadata or {}), base_sha256)
