"""Names of files that stand in other files, such as annotation files: they may not lead out of their folder.

What a user has put into the folder under that name, a link to another disk among it, is followed.
"""

from __future__ import annotations


def wrong_name(name: str) -> str | None:
    """Reason why a name, with folders divided by "/", may not be used; None for a good one."""
    if not name or not name.isprintable():
        return "it is empty or has control characters"
    return "it leads out of its folder" if name.startswith("/") or ".." in name.split("/") else None


def checked_name(name: str, where: object) -> str:
    """The name, which stands in the file `where`. Raises ValueError, naming both, as `wrong_name` says."""
    if reason := wrong_name(name):
        raise ValueError(f"{where}: the file name {name[:80]!r} is not allowed: {reason}")
    return name


def shown_name(name: str) -> str:
    """The name for a message: signs that would end its line or move a terminal's cursor are written as escapes."""
    return name if name.isprintable() else repr(name)
