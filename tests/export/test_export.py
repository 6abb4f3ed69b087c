"""Exports of finished runs as a user makes and reads them: every head, each beside our own predictions."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import visft_ds
from tests import finished
from tests.ranks import run_ranks
from tests.tiny import command
from visft_ds.cli import main
from visft_ds.predict.results import Masks

pytestmark = pytest.mark.slow

#: Operators that exports consist of and types of their tensors, as TensorRT 10.15 lists them
#: (docs/operators.md of onnx-tensorrt).
FLOATS = ("FLOAT", "FLOAT16")
NUMBERS = (*FLOATS, "INT32", "INT64")
TENSORRT: dict[tuple[str, ...], tuple[str, ...]] = {
    FLOATS: (
        *("AveragePool", "Ceil", "Clip", "Conv", "ConvTranspose", "Cos", "CumSum", "Einsum", "Erf", "Exp"),
        *("Floor", "Gemm", "GlobalAveragePool", "InstanceNormalization", "LayerNormalization", "Log", "MatMul"),
        *("NonZero", "Reciprocal", "Round", "Sigmoid", "Sin", "Softmax", "Sqrt", "Tanh"),
    ),
    NUMBERS: (
        *("Abs", "Add", "ArgMax", "Div", "Equal", "Gelu", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
        *("Max", "Min", "Mod", "Mul", "Neg", "Pad", "Pow", "Range", "ReduceMax", "ReduceMean", "ReduceMin"),
        *("ReduceProd", "ReduceSum", "Relu", "ScatterElements", "ScatterND", "Sign", "Sub", "Sum", "TopK"),
    ),
    (*NUMBERS, "BOOL"): (
        *("Concat", "Constant", "ConstantOfShape", "Expand", "Gather", "GatherElements", "GatherND", "Identity"),
        *("Loop", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"),
    ),
    (*NUMBERS, "BOOL", "UINT8"): ("Cast",),
    ("BOOL",): ("And", "Not", "Or", "Xor"),
}  # fmt: skip


def unlisted(path: Path) -> set[tuple[str, str]]:
    """(operator, type of its first tensor) in an ONNX file that TensorRT does not list."""
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    names = {number: name for name, number in onnx.TensorProto.DataType.items()}
    allowed = {operator: types for types, operators in TENSORRT.items() for operator in operators}
    beyond = set()

    def walk(graph: Any, outer: dict[str, str]) -> None:
        types = dict(outer)
        for value in (*graph.input, *graph.output, *graph.value_info):
            types[value.name] = names[value.type.tensor_type.elem_type]
        for tensor in graph.initializer:
            types[tensor.name] = names[tensor.data_type]
        for node in graph.node:
            read = [types[name] for name in node.input if name]
            type_ = read[node.op_type == "Where"] if read else "FLOAT"
            if type_ not in allowed.get(node.op_type, ()):
                beyond.add((node.op_type, type_))
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    walk(attribute.g, types)

    walk(model.graph, {})
    return beyond


def export(run: Path, out: Path, *flags: str) -> int:
    pytest.importorskip("onnxscript")
    return main(["export", str(run), "--out", str(out), *flags])


def code_of(readme: Path) -> str:
    """The program that a page shows."""
    (code,) = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    return code


def test_onnxruntime_says_what_the_run_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DETR, Mask2Former and captions, one file each (of captions two), in batches of another size than the traced one."""
    run = finished.runs() / "stage2"
    assert export(run, tmp_path / "exported", "--verify", "4") == 0
    printed = capsys.readouterr().out
    for task in ("detection", "segmentation", "captioning"):
        assert re.search(rf"verify   {task}: .* on 4 pictures", printed), printed
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == [
        "README.md", "captioning_encoder.onnx", "captioning_step.onnx", "detection.onnx", "segmentation.onnx",
    ]  # fmt: skip
    outside = {path.stem: unlisted(path) for path in (tmp_path / "exported").glob("*.onnx")}
    # TensorRT has UINT8 for inputs and outputs of a network alone; the shape of one is asked for here.
    of_paddings = {("Shape", "UINT8"), ("CumSum", "INT64"), ("IsNaN", "FLOAT")}
    assert outside == {
        "captioning_encoder": {("Shape", "UINT8"), ("Equal", "BOOL")},
        "captioning_step": set(),
        "detection": of_paddings | {("Pad", "BOOL")},
        "segmentation": of_paddings,
    }
    import onnxruntime

    pictures = np.random.default_rng(0).integers(0, 256, (3, 40, 70, 3)).astype(np.uint8)
    for task in ("detection", "segmentation"):
        path = tmp_path / "exported" / f"{task}.onnx"
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        together = dict(zip(names, session.run(None, {"images": pictures}), strict=True))
        assert together["boxes"].shape[2] == 4 and len(together["scores"]) == 3
        alone = dict(zip(names, session.run(None, {"images": pictures[2:]}), strict=True))
        np.testing.assert_allclose(together["scores"][2], alone["scores"][0], atol=1e-5)
        if task == "segmentation":
            assert together["masks"].shape[2:] == (40, 70) and together["masks"].dtype == bool
            assert together["attended"].shape == (3, 1, 4, 16)  # layers, queries, cells

    model = visft_ds.load(tmp_path / "exported")
    prediction = model.predict(pictures[0], threshold=0)
    assert prediction.boxes is not None and prediction.caption is not None
    assert len(prediction.boxes) == 4  # queries


def test_masks_leave_with_their_boxes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the head that the recipe for own data trains where objects have masks; in both formats."""
    head = {"type": "dense", "num_classes": 91, "width": 32, "masks": True, "max_detections": 5}
    extra = {**finished.SMALL, "visft.tasks.detection.head": head, "visft.mode": "shared"}
    extra |= {"visft.tasks.segmentation": None, "visft.tasks.captioning": None}
    run_ranks(["launchers/train.py", *command(finished.shards(), tmp_path / "run", extra=extra)], world=1)
    for form in ("onnx", "torch"):
        assert export(tmp_path / "run", tmp_path / form, "--verify", "4", "--format", form) == 0
        assert re.search(
            r"detection: \d\d objects, .*, 0 pixels differ of [\d,]+ at borders on 4", capsys.readouterr().out
        )
    assert unlisted(tmp_path / "onnx/detection.onnx") == {("Shape", "UINT8")}
    (tmp_path / "onnx/run.py").write_text(code_of(tmp_path / "onnx/README.md").replace(">= 0.5", ">= 0.01"))
    Image.new("RGB", (90, 60), "gray").save(tmp_path / "onnx/photograph.jpg")
    ran = subprocess.run(
        [sys.executable, "-P", "-i", "run.py", "photograph.jpg"],
        cwd=tmp_path / "onnx", input="print(len(masks), masks[0].shape, sum(mask.sum() for mask in masks))",
        capture_output=True, text=True, env={},
    )  # fmt: skip
    prediction = visft_ds.load(tmp_path / "onnx").predict(tmp_path / "onnx/photograph.jpg", threshold=0.01)
    assert isinstance(prediction.instances, Masks) and len(prediction.instances) == 5
    assert f"5 (60, 90) {prediction.instances.masks.sum()}" in ran.stdout, ran.stdout + ran.stderr


def test_a_run_on_tiles_leaves_with_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures are cut and joined as for the run, each tile seen in the size of training."""
    head = {"type": "dense", "num_classes": 91, "width": 32, "masks": True, "max_detections": 5}
    extra = {**finished.SMALL, "visft.tasks.detection.head": head, "visft.mode": "shared"}
    extra |= {"visft.tasks.segmentation": None, "visft.tasks.captioning": None}
    extra |= {"visft.shared.image.tile": [36, 12]}
    run = tmp_path / "run"
    run_ranks(["launchers/train.py", *command(finished.shards(), run, extra=extra)], world=1)
    assert export(run, tmp_path / "out", "--verify", "all") == 0
    printed = capsys.readouterr().out
    assert "on 16 tiles" in printed and "mask/AP " in printed  # four pictures, of four tiles each
    assert "squares of 36 pixels" in (tmp_path / "out/README.md").read_text()
    picture = np.random.default_rng(0).integers(0, 256, (56, 90, 3), np.uint8)
    ours, theirs = (visft_ds.load(place, device="cpu") for place in (run, tmp_path / "out"))
    assert theirs.tiles_of(None) == ours.tiles_of(None) == (36, 12)
    found, again = (model.predict(picture, threshold=0).boxes for model in (ours, theirs))
    np.testing.assert_allclose(again.xyxy, found.xyxy, atol=1e-3)
    assert export(run, tmp_path / "page", "--web") == 2


def test_a_program_of_torch_runs_without_this_package(tmp_path: Path) -> None:
    out = tmp_path / "exported"
    assert export(finished.runs() / "stage1", out, "--format", "torch", "--tasks", "detection") == 0
    code = code_of(out / "README.md")
    assert "visft_ds" not in code
    (out / "run.py").write_text(code)
    Image.new("RGB", (90, 60), "gray").save(out / "photograph.jpg")
    command = [sys.executable, "-P", "run.py", "photograph.jpg"]
    ran = subprocess.run(command, cwd=out, capture_output=True, text=True, env={})
    assert ran.returncode == 0 and "boxes (1, 4, 4)" in ran.stdout, ran.stdout + ran.stderr


def test_the_code_of_the_page_runs(tmp_path: Path) -> None:
    """With onnxruntime, numpy and Pillow alone."""
    out = tmp_path / "exported"
    assert export(finished.runs() / "stage1", out, "--tasks", "detection", "--web") == 0
    Image.new("RGB", (90, 60), "gray").save(out / "photograph.jpg")
    (out / "run.py").write_text(code_of(out / "README.md"))
    command = [sys.executable, "-P", "run.py", "photograph.jpg"]
    ran = subprocess.run(command, cwd=out, capture_output=True, text=True, env={})
    assert ran.returncode == 0 and (out / "found.jpg").exists(), ran.stderr
    assert "detection.onnx" in (out / "index.html").read_text()


def test_an_export_that_differs_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from visft_ds.export import answers

    right = answers.ANSWERS["detection", answers.DetectionOutput]

    def wrong(*arguments: Any) -> dict[str, torch.Tensor]:
        answer = right(*arguments)
        return {**answer, "boxes": answer["boxes"] * 1.001}

    monkeypatch.setitem(answers.ANSWERS, ("detection", answers.DetectionOutput), wrong)
    assert export(finished.runs() / "stage1", tmp_path / "exported", "--tasks", "detection") == 2
    assert "boxes differ by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", ["--half", "--int8"])
def test_fewer_bits_make_a_smaller_file_that_runs(
    bits: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished.runs() / "stage2"
    assert export(run, tmp_path / "full", "--tasks", "detection") == 0
    assert export(run, tmp_path / "fewer", "--tasks", "detection", bits) == 0
    assert re.search(r"verify   box/AP50 [\d.]+, of the export [\d.]+", capsys.readouterr().out)
    sizes = [(tmp_path / name / "detection.onnx").stat().st_size for name in ("full", "fewer")]
    assert sizes[1] < sizes[0]  # little of the small file is weights


def test_a_backbone_alone_gives_the_features_of_the_run(tmp_path: Path) -> None:
    run = finished.runs() / "stage2"
    assert export(run, tmp_path / "exported", "--tasks", "none") == 0
    import onnxruntime

    (path,) = (tmp_path / "exported").glob("*.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    model = visft_ds.load(run, device="cpu")
    (text,) = session.get_modelmeta().custom_metadata_map.values()
    side = json.loads(text)["image_size"][0]
    pixels = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    features = session.run(None, {"images": pixels})[-1]
    with torch.no_grad():
        expected = model.backbone(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)


def test_predict_reads_an_exported_folder(tmp_path: Path) -> None:
    run = finished.runs() / "stage2"
    assert export(run, tmp_path / "exported", "--tasks", "detection") == 0
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(tmp_path / "picture.png")
    words = ["predict", str(tmp_path / "exported"), str(tmp_path / "picture.png"), "--threshold", "0"]
    assert main([*words, "--out", str(tmp_path / "found")]) == 0
    assert (tmp_path / "found/predictions.json").is_file()
