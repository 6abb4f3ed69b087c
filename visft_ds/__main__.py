"""`python -m visft_ds COMMAND`: the command `visft`, also where its folder is not on the path."""

from visft_ds.cli import run

if __name__ == "__main__":
    run()
