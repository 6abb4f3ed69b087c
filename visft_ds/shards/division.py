"""Validation split off from a data set that came as one split: which images go to which side.

Images are ordered by a hash of the seed and their name (of their group, where images belong together), so the
same names and seed give the same division on any machine, in whatever order a file lists them.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from visft_ds.files import shown_name


def group_in(name: str, pattern: str) -> str | None:
    """The group of an image of this name: what the first parenthesis with a match has, or else all that a
    regular expression finds in it; None: nothing.
    """
    match = re.search(pattern, name)
    if match is None:
        return None
    return next(text for text in (*match.groups(), match[0]) if text is not None)


@dataclass(frozen=True)
class Division:
    """Division of the images of a split into training and validation.

    `group` is a regular expression that is searched in each file name: images with the same match, or the
    same text in its first parenthesis, stay on one side.
    """

    share: float  #: of the images that become validation, between 0 and 1
    seed: int
    group: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"--val {self.share:g}: a share between 0 and 1 is allowed, e.g. --val 0.2")
        if self.group is not None:
            try:
                re.compile(self.group)
            except re.error as error:
                raise ValueError(
                    f"--group {self.group!r} is not a regular expression: {error}; "
                    "e.g. --group '^[^_]+' keeps the images of each first word together"
                ) from error

    def group_of(self, name: str) -> str:
        """The group of an image of this file name. Raises ValueError for a name without a match."""
        if self.group is None:
            return name
        group = group_in(name, self.group)
        if group is None:
            raise ValueError(
                f"--group {self.group!r} matches no part of the file name {shown_name(name)}: "
                "each name must have a match"
            )
        return group

    def validation(self, names: Collection[str]) -> set[str]:
        """Those of the file names that become validation: whole groups, at least one on each side.

        Groups are taken in the order of their hashes, each if it brings the number of images nearer to the
        share. Raises ValueError for fewer than two groups.
        """
        group_of = {name: self.group_of(name) for name in names}
        sizes = Counter(group_of.values())
        if len(sizes) < 2:
            if self.group is None:
                raise ValueError(f"--val needs at least 2 images, there are {len(names)}")
            raise ValueError(
                f"--group {self.group!r} puts all {len(names)} images into one group: at least 2 are needed"
            )
        *candidates, _ = sorted(sizes, key=self._hash)
        target = self.share * len(group_of)
        validation = set[str]()
        count = 0
        for group in candidates:
            larger = count + sizes[group]
            if abs(larger - target) < abs(count - target):
                validation.add(group)
                count = larger
        if not validation:
            validation.add(min(candidates, key=sizes.__getitem__))
        return {name for name, group in group_of.items() if group in validation}

    def _hash(self, group: str) -> bytes:
        return hashlib.sha256(f"{self.seed} {group}".encode(errors="backslashreplace")).digest()
