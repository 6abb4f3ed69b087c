"""Products in 8 bits, by the quantiser of onnxruntime, with ranges measured on pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt


def quantise(path: Path, pictures: Sequence[npt.NDArray[np.uint8]]) -> None:
    """Replace an ONNX file by one whose convolutions and layers compute in int8.

    Products without stored weights stay as they are: attention, scaling of pictures, decoding.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Pictures(CalibrationDataReader):
        left = iter(pictures)

        def get_next(self) -> dict[str, Any] | None:
            return next(({"images": picture[None]} for picture in self.left), None)

    graph = onnx.load(path)
    facts = {entry.key: entry.value for entry in graph.metadata_props}
    weights = {tensor.name for tensor in graph.graph.initializer}
    kinds = ["Conv", "MatMul", "Gemm"]
    products = [node for node in graph.graph.node if node.op_type in kinds]
    left_out = [node.name for node in products if weights.isdisjoint(node.input)]
    with TemporaryDirectory(dir=path.parent) as folder:
        result = Path(folder) / path.name
        quantize_static(
            path,
            result,
            Pictures(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            # A limit after a convolution decides the range of its output: without it, far wider.
            op_types_to_quantize=[*kinds, "Clip", "Relu"],
            nodes_to_exclude=left_out,
        )
        small = onnx.load(result)
        onnx.helper.set_model_props(small, facts)
        onnx.save(small, path)
