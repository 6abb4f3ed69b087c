"""Flags of `visft export`. What costs seconds to import is imported when the flags are right."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from visft_ds.errors import tell
from visft_ds.flags import Parser, check_extra, command_parser
from visft_ds.interop.formats import ADAPTERS, FORMATS
from visft_ds.predict.cli import add_parts
from visft_ds.run_files import check_exists

USAGE = """Write a trained model in a form that runs without this package.

    visft export runs/stage1-small_data --out exported
    visft export runs/stage1-small_data --out exported --tasks detection --web
    visft export runs/stage1-small_data --out small --int8
    visft export runs/stage2-dinov3_b --out merged --format timm
    visft export --adapter ADAPTER --backbone FILE --out merged --format open_clip

onnx and torch are whole models: backbone, head and decoding in one. Each task becomes a file TASK.onnx, or
TASK.pt2, a program of torch: uint8 RGB pictures (B, H, W, 3) of any size in; boxes in their pixels, scores,
labels, masks or word ids out. README.md in the folder shows how to run them; visft predict --run FOLDER and
visft_ds.load(FOLDER) read it back.

timm, transformers and open_clip get the weights of the backbone with the adapter merged in, peft and
peft_transformers the adapter alone: a folder with the configuration that the library reads, and a model card.
Without RUN the backbone is that of --backbone, alone or with an adapter: a folder, also of PEFT, or a LoRA
file as ViSFT published them.

Exit status: 0 written, 2 it computes something else than the model (nothing is kept), or wrong usage.
"""
#: Flags that weights do not take.
_OF_WHOLE_MODELS = (
    *("tasks", "heads", "vocabulary", "picture-size", "images", "half", "int8", "allow-loss", "web"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    flags = _parser().parse_args(arguments)
    try:
        if flags.first is not None and flags.run is not None:
            raise ValueError(f"two runs: {flags.first} and --run {flags.run}; export them one by one")
        flags.run = flags.run or flags.first
        if flags.run is not None:
            check_exists(flags.run)
        if flags.format in FORMATS:
            _export_weights(flags)
            return 0
        _check_whole_model(flags)
        if flags.format == "onnx":
            check_extra("visft export", "onnx", ("onnx", "onnxscript", "onnxruntime"))
        from visft_ds.export.command import export

        export(flags)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        return tell(error, "export")
    return 0


def _export_weights(flags: argparse.Namespace) -> None:
    """Write the backbone's weights, or an adapter, for another library.

    Raises ValueError as `merge_files`, and for flags of whole models.
    """
    form = flags.format
    for flag in _OF_WHOLE_MODELS:
        if getattr(flags, flag.replace("-", "_")):
            raise ValueError(f"--{flag} is of whole models: --format {form} writes the backbone alone")
    if flags.out.suffix == ".safetensors":
        raise ValueError(f"--out {flags.out}: give a folder; visft merge writes such a file")
    flags.adapters = [Path(path) for path in (flags.run, flags.adapter) if path is not None]
    for path in flags.adapters:
        check_exists(path)
    if len(flags.adapters) > 1:
        raise ValueError("give RUN or --adapter PATH, not both: visft merge writes the mean of several")
    if not flags.adapters and (flags.backbone is None or form in ADAPTERS):
        raise ValueError(
            "give RUN or --adapter PATH, or --backbone FILE alone to write it for timm and others"
        )
    from visft_ds.merge.command import merge_files

    flags.in_folder = True
    flags.scale = 1.0
    flags.dtype = flags.dtype or "fp32"
    flags.verify = flags.verify != 0
    merge_files(flags)


def _check_whole_model(flags: argparse.Namespace) -> None:
    """Raise ValueError for flags that whole models do not take."""
    if flags.run is None:
        raise ValueError("give RUN, whose model is written, or --format timm for weights alone")
    if flags.dtype is not None:
        raise ValueError(f"--dtype is of weights: --half computes --format {flags.format} in fp16")
    if flags.verify == 0:
        raise ValueError("--verify none is of weights: predictions of whole models are always compared")


def picture_size(text: str) -> tuple[int, int]:
    """(height, width) of HEIGHTxWIDTH."""
    sides = re.fullmatch(r"0*([1-9]\d*)x0*([1-9]\d*)", text, re.ASCII)
    if sides is None:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: give HEIGHTxWIDTH, such as 480x640")
    return int(sides[1]), int(sides[2])


def pictures_to_verify(text: str) -> int | None:
    """Number of pictures; 0: none; None: all."""
    if text in ("none", "all"):
        return 0 if text == "none" else None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: give a number from 1, all, or none")
    return int(text)


def _parser() -> Parser:
    parser = command_parser("export", USAGE)
    add = parser.add_argument
    run = "a run, RUN/checkpoints/step_N or RUN/export; of weights also an adapter"
    add("first", type=Path, nargs="?", metavar="RUN", help=run)
    add("--run", type=Path, metavar="RUN", help="the same as a flag")
    add("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    form = "the whole model as ONNX, or as a program of torch.export; the backbone's weights for another "
    form += "library, or the adapter alone (peft: over timm's model, peft_transformers); default %(default)s"
    add("--format", choices=("onnx", "torch", *FORMATS), default="onnx", help=form)
    add_parts(parser)
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="dtype of weights for another library (fp32)")
    shape = "shape of the pictures, where evaluation depends on it (default: of most validation pictures)"
    add("--picture-size", type=picture_size, metavar="HxW", help=shape)
    verify = "pictures that predictions must be equal on (%(default)s), or all, with metrics of both; "
    verify += "weights are loaded by their library and compared on noise, or with none not at all"
    add("--verify", type=pictures_to_verify, default=16, metavar="N|all|none", help=verify)
    images = "pictures to compare instead of the run's validation split"
    add("--images", nargs="+", metavar="IMAGE|FOLDER|PATTERN", help=images)
    add("--half", action="store_true", help="backbone in fp16; metrics may fall by a point")
    add("--int8", action="store_true", help="convolutions and layers in 8 bits, calibrated; likewise")
    add("--allow-loss", action="store_true", help="keep --half or --int8 whatever it costs")
    add("--web", action="store_true", help="also index.html, which runs the detector in a browser")
    return parser
