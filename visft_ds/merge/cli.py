"""Flags of visft merge and visft vlm. What costs seconds to import is imported when the flags are right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visft_ds.config.flags import DOWNLOAD_HELP
from visft_ds.errors import tell
from visft_ds.flags import Parser, command_parser
from visft_ds.run_files import check_exists

USAGE = """Merge LoRA adapters into base weights, or average several of them.

    visft merge runs/stage2-dinov3_b --out merged.safetensors
    visft merge runs/seed0 runs/seed1 --scale 0.5 --out mean
    visft merge --adapter ADAPTER --backbone EVA02_CLIP_E_psz14_plus_s9B.pt --out merged.safetensors

--out NAME.safetensors gets whole weights, by timm's names, that each command here takes for a backbone;
--out NAME, a folder, the adapter alone. visft export writes either in the form of another library.

RUN is a run or a checkpoint, --adapter takes an adapter folder, also of PEFT, or a LoRA file as ViSFT
published them. --backbone is needed where there is no run; alone it is rewritten.

Exit status: 0 written, 2 --verify found different outputs (nothing is kept), or wrong usage or input.
"""

VLM = """Put the tower that a run trained into a vision-language model of transformers.

    hf download Salesforce/blip2-opt-2.7b --local-dir blip2
    visft vlm blip2 runs/stage2-eva_g --out blip2-visft

MODEL is a folder with BLIP-2 or a model in LLaVA's style. Its tower has to be the base of the run, as it is
where the model was trained with a frozen tower; names, shapes and values are compared. What the model
trained itself, such as BLIP-2's norm behind the tower, stays, and so does where it reads the tower: its
configuration says the block and the tokens.

Exit status: 0 it fits, 2 wrong usage or input.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    flags = _parser().parse_args(arguments)
    flags.adapters = [*flags.runs, *flags.adapters]
    try:
        for adapter in flags.adapters:
            check_exists(adapter)
        flags.in_folder = not flags.out.suffix
        flags.format = "peft" if flags.in_folder else "timm"
        if flags.out.suffix not in ("", ".safetensors"):
            raise ValueError(
                f"--out {flags.out}: give NAME.safetensors for weights, or NAME without a dot for an adapter"
            )
        is_base_alone = flags.backbone is not None and flags.scale == 1 and not flags.in_folder
        if not flags.adapters and not is_base_alone:
            raise ValueError(
                "give RUN or --adapter PATH, or --backbone FILE with --out NAME.safetensors to rewrite it"
            )
        from visft_ds.merge.command import merge_files

        merge_files(flags)
    except (ValueError, OSError) as error:
        return tell(error, "merge")
    return 0


def vlm(arguments: Sequence[str] | None = None) -> int:
    """Run `visft vlm`; returns the exit status."""
    parser = _parser_of_base("vlm", VLM)
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="folder of the vision-language model")
    add("run", type=Path, metavar="RUN", help="run, RUN/checkpoints/step_N, RUN/export or adapter folder")
    add("--out", type=Path, metavar="DIR", help="a new folder for the model (default: only check)")
    flags = parser.parse_args(arguments)
    flags.adapters = [flags.run]
    flags.format = "transformers"
    try:
        check_exists(flags.run)
        from visft_ds.merge.vlm import put_into_vlm

        put_into_vlm(flags)
    except (ValueError, OSError) as error:
        return tell(error, "vlm")
    return 0


def _parser() -> Parser:
    parser = _parser_of_base("merge", USAGE)
    add = parser.add_argument
    adapters: dict[str, Any] = {"dest": "adapters", "type": Path, "action": "append", "default": []}
    runs = "run, RUN/checkpoints/step_N or RUN/export; of several the mean"
    add("runs", nargs="*", type=Path, metavar="RUN", help=runs)
    add("--run", metavar="RUN", help="the same as a flag; repeatable", **adapters)
    add("--adapter", metavar="PATH", help="adapter folder, also of PEFT, or ViSFT LoRA file", **adapters)
    out = "NAME.safetensors: new weights; NAME: a new folder for the adapter alone"
    add("--out", type=Path, required=True, metavar="PATH", help=out)
    dtype = "dtype of the backbone written (%(default)s)"
    add("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help=dtype)
    verify = "load the result with timm, or PEFT, and keep it only if outputs equal base + adapter"
    add("--verify", action="store_true", help=verify)
    return parser


def _parser_of_base(command: str, description: str) -> Parser:
    """A parser with the flags of a base and of the adapter on it."""
    parser = command_parser(command, description)
    add = parser.add_argument
    add("--backbone", metavar="NAME|FILE", help="base weights (default: those of the run)")
    add("--download", action="store_true", help=DOWNLOAD_HELP)
    add("--scale", type=float, default=1.0, help="factor of the adapter's effect (%(default)s)")
    return parser
