"""Contrastive image-text training: a small CLIP from nothing, or the text tower of any CLIP on new captions.

    visft contrast pretrain --data toy --out clip
    visft contrast text --model clip/open_clip_model.safetensors --data shards --train lora --out tuned
    deepspeed --num_gpus 8 --module visft_ds contrast text --model open_clip:ViT-B-32:laion2b_s34b_b79k \\
        --data coco --out tuned

--data: shards of visft shards, a COCO tree, Karpathy's splits or Flickr30k. --out is a new folder: weights and
configuration as open_clip loads them, a record and a model card. Exit status: 0 fine, 2 wrong usage or unusable input,
130 interrupted (nothing is left).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from visft_ds import program
from visft_ds.flags import Parser

#: Command -> (module that has its `add_parser`, its line of help).
COMMANDS = {
    "pretrain": ("pretrain", "a small CLIP from random weights, as base weights of toy runs"),
    "text": ("text_command", "the text tower of a CLIP on new captions; the vision tower is frozen"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words and words[0].startswith("--local_rank="):  # the deepspeed launcher puts it in front
        words = words[1:]
    given = _parser(words[:1]).parse_args(words)
    from visft_ds.parallel import distributed
    from visft_ds.resilience.errors import RankError, tell

    try:
        given.run(given)
    except (ValueError, OSError, RuntimeError) as error:
        alone = isinstance(error, ValueError) and distributed.joined()  # before that, every rank runs into the same
        return tell(RankError(str(error)) if alone else error, "contrast")
    except KeyboardInterrupt:
        print("\ncontrast: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def _parser(command: Sequence[str]) -> argparse.ArgumentParser:
    """Flags of the command that is given; of the others their names, as their modules take seconds to import."""
    parser = Parser(prog=program("contrast"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        parser_of = commands.add_parser(name, help=text)
        if [name] == list(command):
            import_module(f"visft_ds.experiments.contrastive.{module}").add_flags(parser_of)
    return parser
