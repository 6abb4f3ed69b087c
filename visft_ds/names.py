"""Names of files that stand in other files, such as annotation files: they may not lead out of their folder.

What a user has put into the folder under that name, a link to another disk among it, is followed.
"""

from __future__ import annotations


def wrong_name(name: str, *, folders: bool = False) -> str | None:
    """Reason why a name may not be used, None for a good one.

    Args:
        folders: it may have folders in it, divided by "/".
    """
    parts = name.split("/")
    if not name or not name.isprintable():
        return "it is empty or has control characters"
    if not folders and (len(parts) > 1 or "\\" in name or name == "."):
        return "it is not a plain file name"
    return "it leads out of its folder" if name.startswith("/") or ".." in parts else None


def checked_name(name: str, where: object, *, folders: bool = False) -> str:
    """The name, which stands in the file `where`. Raises ValueError, naming both, as `wrong_name` says."""
    if reason := wrong_name(name, folders=folders):
        raise ValueError(f"{where}: the file name {name[:80]!r} is not allowed: {reason}")
    return name


def shown_name(name: str) -> str:
    """The name for a message: signs that would end its line or move a terminal's cursor are written as escapes."""
    return name if name.isprintable() else repr(name)
