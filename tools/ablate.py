import sys, os.path as o; sys.path[:] = [o.dirname(o.dirname(o.realpath(__file__)))] + [p for p in sys.path if o.realpath(p) != o.dirname(o.realpath(__file__))]  # noqa: E401, E501, E702, I001  # fmt: skip
"""Ten questions about the recipe as experiments; see visft_ds/experiments/ablations/cli.py and docs/ablations.md."""

if __name__ == "__main__":  # the processes of steps import this file too, and nothing of it
    from visft_ds.experiments.ablations.cli import main

    sys.exit(main())
