"""The public names exist, and importing the package costs nothing."""

from __future__ import annotations

import visft_ds
from tests.ranks import python

LOOK = """
import sys
before = set(sys.modules)
import visft_ds
dir(visft_ds)
print(*{name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names) - {"visft_ds"})
visft_ds.fit
print("torch" in sys.modules)
"""


def test_public_names_are_where_the_table_says() -> None:
    assert set(visft_ds._PUBLIC) <= set(dir(visft_ds))
    for name, module in visft_ds._PUBLIC.items():
        assert getattr(visft_ds, name).__module__ == module


def test_importing_the_package_imports_nothing_of_others() -> None:
    assert python("-c", LOOK).splitlines() == ["", "False"]


FROZEN = """
import gc, sys
import visft_ds
for visft_ds.is_command in (False, True):
    for module in ("colorsys", "colorsys", "wave", "wave"):
        with visft_ds.importing():
            __import__(module)
        print(gc.get_freeze_count() > 0, gc.isenabled())
        gc.unfreeze()
    del sys.modules["colorsys"], sys.modules["wave"]
"""


def test_only_imports_of_a_command_are_never_looked_at_again() -> None:
    """What a script holds itself when it imports would stay for ever, too."""
    assert python("-c", FROZEN).splitlines() == ["False True"] * 4 + ["True True", "False True"] * 2
