"""Merge a LoRA adapter into base weights and write one file that timm or EVA-CLIP reads.

python tools/merge_lora.py --base weights/EVA02_CLIP_E_psz14_plus_s9B.pt --adapter runs/stage2/adapter \\
    --out merged.safetensors --format timm --verify

Base: .safetensors or .pt, any known layout. Adapter: a PEFT folder, or a LoRA file as ViSFT published them.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not tools/, whose profile.py hides the standard library's

import argparse
import json
import math
import time

from visft_ds.interop.files import examples, open_weights
from visft_ds.interop.layouts import find_layout, tower_in
from visft_ds.interop.merge import (
    DTYPES,
    FORMATS,
    MergeReport,
    Share,
    merge_into_file,
    read_adapter,
    resolve_tower,
    scaled,
    verify_merge,
)


def _setting(text: str) -> tuple[str, int | float | bool]:
    """`num_heads=16`, `post_norm=true`: a name and a JSON number or truth value."""
    name, _, value = text.partition("=")
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        parsed = None
    if not isinstance(parsed, int | float):
        raise argparse.ArgumentTypeError(f"{text!r}: write name=number or name=true|false, such as num_heads=16")
    return name, parsed


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="weights the adapter was trained on")
    parser.add_argument("--adapter", type=Path, required=True, help="PEFT folder or ViSFT LoRA file")
    parser.add_argument("--out", type=Path, required=True, help="a new .safetensors file")
    parser.add_argument("--format", choices=sorted(FORMATS), default="timm", help="names of the result (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the tower in the result (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="times the adapter's effect (%(default)s)")
    parser.add_argument("--allow-other-base", action="store_true", help="merge although the base has another sha256")
    parser.add_argument("--verify", action="store_true", help="compare with base + adapter; exit 1 if outputs differ")
    parser.add_argument("--images", type=int, default=2, help="random images for --verify (%(default)s)")
    parser.add_argument("--model", help="preset, where the file does not tell (eva_e, eva_g, ...)")
    parser.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="num_heads or post_norm of the model, where neither file nor preset tells",
    )
    return parser


def main() -> int:
    given = _parser().parse_args()
    try:
        return _run(given)
    except (ValueError, OSError) as error:
        print(f"merge_lora: {error}", file=sys.stderr)
        return 2


def _run(given: argparse.Namespace) -> int:
    if not math.isfinite(given.scale) or given.images < 1:
        raise ValueError("--scale must be a finite number, --images at least 1")
    file = open_weights(given.base)
    tower = tower_in(file, find_layout(file))
    settings = dict(given.set)
    if given.verify or given.model or settings:
        tower = resolve_tower(tower, given.model, settings)
    adapter = scaled(read_adapter(given.adapter), given.scale)
    started = time.perf_counter()
    report = merge_into_file(
        given.base,
        adapter,
        given.out,
        layout=given.format,
        dtype=DTYPES[given.dtype],
        allow_other_base=given.allow_other_base,
        tower=tower,
    )
    print(
        f"base     {given.base} ({report.source_layout}; {tower.describe()})\n"
        f"         sha256 {report.base_sha256}\n"
        f"adapter  {given.adapter} (rank {adapter.rank}, scaling {adapter.scaling:g}, {'+'.join(adapter.targets)})\n"
        f"out      {given.out} ({given.format}, {given.dtype}, {report.tensors} tensors, "
        f"{given.out.stat().st_size / 1e6:,.1f} MB, {time.perf_counter() - started:.1f} s)"
    )
    _print_shares(report, given.dtype)
    for note in report.notes:
        print(f"note: {note}")
    if report.left_out:
        print(f"note: left out, no place in {given.format}: {examples(report.left_out, 3)}")
    if not given.verify:
        return 0
    result = verify_merge(given.base, adapter, given.out, tower, dtype=DTYPES[given.dtype], images=given.images)
    print(
        f"verify   {given.images} random images: largest difference {result.max_abs:.3g}, relative "
        f"{result.relative:.3g} (allowed {result.tolerance:.2g}); the adapter's own effect {result.effect:.3g}"
    )
    if result.passed and result.relative > 0.5 * result.effect:
        print("warning: the difference is as large as the adapter's effect; write --dtype fp32 or fp16 to keep it")
    if not result.passed:
        print(f"merge_lora: {given.out} does not compute what base + adapter does", file=sys.stderr)
        return 1
    return 0


def _print_shares(report: MergeReport, dtype: str) -> None:
    print("block    retained     error   (share of the adapter's change that is in the file; |missing| / |change|)")
    rows: list[tuple[str, Share]] = [(str(index), share) for index, share in enumerate(report.blocks)]
    for name, share in [*rows, ("all", report.total)]:
        print(f"{name:>5} {share.retained:>11.1%} {share.error:>9.2g}" if share.wanted else f"{name:>5}   no change")
    if report.total.lost:
        print(
            f"warning: {dtype} cannot hold this change: its numbers near the weights are farther apart than the "
            f"change is large, so most of it rounds away. Write --dtype fp32, or fp16 where it fits"
        )


if __name__ == "__main__":
    sys.exit(main())
