"""`python -m visft_ds COMMAND`: the command `visft`, also where its folder is not on the path."""

import sys

from visft_ds.cli import main

if __name__ == "__main__":
    sys.exit(main())
