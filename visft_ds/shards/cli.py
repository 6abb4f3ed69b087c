"""COCO, YOLO or captioned images -> shards that any WebDataset reader opens, checked and reproducible.

    visft shards MYFOLDER                 what it is, is recognised; `visft shards build MYFOLDER` with all flags
    visft shards build --images train2017 --instances instances_train2017.json \\
        --captions captions_train2017.json --out shards --split train
    visft shards verify shards
    visft shards info shards --categories
    visft shards info --step 1000 --run runs/stage2-eva_e

Exit status: 0 fine, 1 problems found, 2 wrong usage or unusable input, 3 more than a tenth of the
annotations would be lost (nothing is written), 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from visft_ds import program
from visft_ds.flags import Parser
from visft_ds.redaction import redacted

#: Command -> its module, the function there that adds its flags, its line of help. Modules take seconds to import.
COMMANDS = {
    "build": ("build_command", "add_build_parser", "make shards, index and manifest; goes on where it was interrupted"),
    "permute": ("permute", "add_permute_parser", "a control: the same images with the labels of one another"),
    "verify": ("commands", "add_verify_parser", "read every byte and list what is wrong"),
    "info": ("commands", "add_info_parser", "what a folder holds, or the images of a training step"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments and arguments[0] not in COMMANDS and not arguments[0].startswith("-"):
            if not Path(arguments[0]).exists():
                raise ValueError(f"{arguments[0]} is neither a folder nor a command; there are {', '.join(COMMANDS)}")
            arguments = ["build", *arguments]
        parser = _parser(arguments[:1])
        options, rest = parser.parse_known_args(arguments)
        options.rest = rest
        if rest and arguments[0] != "info":  # which takes the flags of visft train
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return int(options.run(options))
    except (ValueError, OSError, RuntimeError) as error:
        from visft_ds.shards.findings import TooManyDropsError

        print(f"shards: {redacted(error)}", file=sys.stderr)
        return 3 if isinstance(error, TooManyDropsError) else 2
    except KeyboardInterrupt:
        print("\nshards: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    parser = Parser(
        prog=program("shards"),
        description="COCO, YOLO or captioned images -> checked, reproducible shards",
        epilog="visft shards FOLDER is short for visft shards build FOLDER",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, function, summary) in COMMANDS.items():
        if [name] == list(given):
            getattr(import_module(f"visft_ds.shards.{module}"), function)(commands, summary)
        else:
            commands.add_parser(name, help=summary)
    return parser
