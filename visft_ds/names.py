"""Names of files that stand in other files: indexes, descriptions of data sets, manifests.

A name may not lead out of the folder that it is meant for. What a user has put into the folder under that name, a link
to another disk among it, is the user's own business and is followed.
"""

from __future__ import annotations

import re
import unicodedata

#: Most file systems hold no longer part of a path, and no longer path.
_MOST_BYTES, _MOST_BYTES_IN_ALL = 255, 4095
#: Names that are devices on some systems, in every folder and with every suffix.
_DEVICE = re.compile(r"(con|prn|aux|nul|com[1-9]|lpt[1-9])\s*(\..*)?", re.IGNORECASE)


def wrong_name(name: str, *, folders: bool = False) -> str | None:
    """Reason why a name may not be used, None for a good one.

    Args:
        folders: it may have folders in it, divided by "/".
    """
    parts = name.split("/")
    if not name:
        return "it is empty"
    if any(unicodedata.category(sign) in ("Cc", "Cs") for sign in name):
        return "it has control characters"
    if not folders and (len(parts) > 1 or "\\" in name or name == "."):
        return "it is not a plain file name"
    if name.startswith("/") or ".." in parts:
        return "it leads out of its folder"
    sizes = [len(part.encode()) for part in parts]
    if max(sizes) > _MOST_BYTES or sum(sizes) + len(sizes) - 1 > _MOST_BYTES_IN_ALL:
        return f"it is too long: {max(sizes)} bytes, systems allow {_MOST_BYTES}, and {_MOST_BYTES_IN_ALL} with folders"
    if any(_DEVICE.fullmatch(part) for part in parts):
        return "it is the name of a device on some systems"
    return None


def checked_name(name: str, where: object, *, folders: bool = False) -> str:
    """The name, which stands in the file `where`. Raises ValueError, naming both, as `wrong_name` says."""
    if reason := wrong_name(name, folders=folders):
        raise ValueError(f"{where}: the file name {name[:80]!r} is not allowed: {reason}")
    return name


def shown_name(name: str) -> str:
    """The name for a message: signs that would end its line or move a terminal's cursor are written as escapes."""
    return "".join(sign.encode("unicode_escape").decode() if not sign.isprintable() else sign for sign in name)
