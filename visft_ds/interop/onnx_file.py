"""A backbone as a graph of ONNX: normalised images (B, 3, H, W) of one size -> feature map (B, D, h, w), any B.

torch's own exporter writes it (torch.export, `dynamo=True`; the older one, by TorchScript, is deprecated). It needs
onnx and onnxscript, and onnxruntime checks the result: the extra `onnx`.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch

from visft_ds.models import Backbone

FILE = "model.onnx"
#: Packages of the extra `onnx`, as they are imported.
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
IMAGES, FEATURES = "images", "features"
#: protobuf holds 2 GiB at most; above this the weights lie beside the graph, in FILE.data.
_LARGEST = 1_900_000_000


def write_onnx(backbone: Backbone, path: Path) -> None:
    """Write a backbone (fp32, on the CPU) for images of its `image_size`. Raises ValueError where torch cannot."""
    side, size = backbone.image_size, sum(value.nbytes for value in backbone.parameters())
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # a line for each constant that it does not fold
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch about its own parts
            program = torch.onnx.export(
                backbone.eval(),
                (torch.zeros(2, 3, side, side),),
                dynamo=True,
                input_names=[IMAGES],
                output_names=[FEATURES],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        first = str(error.__cause__ or error).split("\n")[0]
        raise ValueError(f"torch {torch.__version__} cannot write {backbone.describe()} as ONNX: {first}") from error
    assert program is not None
    program.save(path, external_data=size > _LARGEST)
