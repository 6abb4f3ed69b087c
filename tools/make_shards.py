import sys, os.path as o; sys.path[:] = [o.dirname(o.dirname(o.realpath(__file__)))] + [p for p in sys.path if o.realpath(p) != o.dirname(o.realpath(__file__))]  # noqa: E401, E501, E702, I001  # fmt: skip
"""COCO -> shards that any WebDataset reader opens, checked and reproducible.

    python tools/make_shards.py build --images train2017 --instances instances_train2017.json \\
        --captions captions_train2017.json --out shards --split train
    python tools/make_shards.py verify shards
    python tools/make_shards.py info shards --categories
    python tools/make_shards.py info --step 1000 --run runs/stage2-eva_e

Exit status: 0 fine, 1 problems found, 2 wrong usage or unusable input, 3 more than a tenth of the
annotations would be lost (nothing is written), 130 interrupted.
"""

import argparse
from collections.abc import Sequence

from visft_ds.config.removed import refuse_removed
from visft_ds.shards.build_command import add_build_parser
from visft_ds.shards.commands import add_info_parser, add_verify_parser, run_info
from visft_ds.shards.drops import TooManyDropsError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        refuse_removed("make_shards", arguments)
        parser = _parser()
        options, rest = parser.parse_known_args(arguments)
        options.rest = rest
        if rest and options.run is not run_info:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return int(options.run(options))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"make_shards: {error}", file=sys.stderr)
        return 3 if isinstance(error, TooManyDropsError) else 2
    except KeyboardInterrupt:
        print("\nmake_shards: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make_shards.py", description="COCO -> checked, reproducible shards")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_build_parser(commands)
    add_verify_parser(commands)
    add_info_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
