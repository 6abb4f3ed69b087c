import sys, os.path as o; sys.path[:] = [o.dirname(o.dirname(o.realpath(__file__)))] + [p for p in sys.path if o.realpath(p) != o.dirname(o.realpath(__file__))]  # noqa: E401, E501, E702, I001  # fmt: skip
USAGE = """Contrastive image-text training: a small CLIP from nothing, or the text tower of any CLIP on new captions.

    python tools/contrast.py pretrain --data toy --out clip
    python tools/contrast.py text --model clip/open_clip_model.safetensors --data shards --train lora --out tuned
    deepspeed --num_gpus 8 tools/contrast.py text --model open_clip:ViT-B-32:laion2b_s34b_b79k --data coco --out tuned

--data: shards of tools/make_shards.py, a COCO tree, Karpathy's splits or Flickr30k. --out is a new folder: weights and
configuration as open_clip loads them, a record and a model card. Exit status: 0 fine, 2 wrong usage or unusable input,
130 interrupted (nothing is left).
"""

import argparse
from collections.abc import Sequence

from visft_ds.data.store import StoreFailed
from visft_ds.experiments.contrastive.pretrain_command import add_pretrain_parser
from visft_ds.experiments.contrastive.text_command import add_text_parser
from visft_ds.parallel import distributed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words and words[0].startswith("--local_rank="):  # the deepspeed launcher puts it in front
        words = words[1:]
    given = _parser().parse_args(words)
    rank = distributed.rank()
    try:
        given.run(given)
    except (ValueError, OSError, StoreFailed) as error:
        if not rank or distributed.joined():  # before that, every rank runs into the same
            print(f"contrast: {f'[rank {rank}] ' if rank else ''}{error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("\ncontrast: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="contrast.py", description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_pretrain_parser(commands)
    add_text_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
