"""Images that a data set holds twice: the same file, or nearly the same picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

#: Bits in which the hashes of two pictures may differ and still be nearly the same. Among the 1,275 pairs of 51
#: photographs of COCO the closest are 11 bits apart, the next 14. Copies of these photographs differ by at most 3 bits
#: when encoded with quality 30, brought to half or 1.7 times the size, or to grey; 50 of 51 by at most 4 at 0.3 times
#: the size, and 44 of 51 without a hundredth at each border.
NEAR = 4
#: Two hashes that differ in at most NEAR bits agree in all bits of at least one of so many bands.
_BANDS = NEAR + 1


@dataclass(frozen=True)
class Fingerprint:
    """What an image is recognised by."""

    image_id: int
    size: int  #: bytes of its file
    crc32: int
    dhash: int  #: 0: unknown


@dataclass(frozen=True)
class Duplicate:
    """An image that repeats another one."""

    image_id: int
    of: int  #: id of the image that stays
    exact: bool  #: the files have the same content
    distance: int  #: bits in which the hashes differ


def find_duplicates(images: Sequence[Fingerprint], same: Callable[[int, int], bool]) -> list[Duplicate]:
    """The images to leave out so that no two of the rest are alike.

    By ascending id: an image that is like one that stays is a duplicate of it, of the closest one where there are
    several. So a chain of similar pictures, each like its neighbours, does not vanish but for its first.

    Args:
        images: in any order.
        same: whether the files of two image ids have the same content; asked where size and crc32 agree.
    """
    ordered = sorted(images, key=lambda image: image.image_id)
    neighbours = near_hashes(np.array([image.dhash for image in ordered], dtype=np.uint64))
    files: dict[tuple[int, int], list[int]] = defaultdict(list)  # (size, crc32) -> ids that stay
    first: dict[int, int] = {}  # hash -> lowest id that stays
    found = []
    for image in ordered:
        alike = files[image.size, image.crc32]
        twin = next((other for other in alike if same(other, image.image_id)), None)
        close = [(0, first[image.dhash])] if image.dhash and image.dhash in first else []
        close += [(distance, first[other]) for other, distance in neighbours.get(image.dhash, ()) if other in first]
        if twin is not None:
            found.append(Duplicate(image.image_id, twin, True, 0))
        elif close:
            distance, other = min(close)
            found.append(Duplicate(image.image_id, other, False, distance))
        else:
            alike.append(image.image_id)
            first.setdefault(image.dhash, image.image_id)
    return found


def find_in_other(images: Sequence[Fingerprint], others: Sequence[Fingerprint]) -> list[Duplicate]:
    """The images that another split has as well, each with the closest image there.

    Files count as equal when size, crc32 and hash agree, since those of the other split are not at hand.
    """
    files = {(other.size, other.crc32, other.dhash): other.image_id for other in reversed(others)}
    by_hash = {other.dhash: other.image_id for other in reversed(others) if other.dhash}
    known = [image.dhash for image in (*images, *others)]
    neighbours = near_hashes(np.array(known, dtype=np.uint64))
    found = []
    for image in images:
        twin = files.get((image.size, image.crc32, image.dhash))
        if twin is not None:
            found.append(Duplicate(image.image_id, twin, True, 0))
            continue
        candidates = [(image.dhash, 0), *neighbours.get(image.dhash, ())]
        close = [(distance, by_hash[other]) for other, distance in candidates if other in by_hash]
        if close:
            distance, other_id = min(close)
            found.append(Duplicate(image.image_id, other_id, False, distance))
    return found


def near_hashes(hashes: Hashes) -> dict[int, list[tuple[int, int]]]:
    """Hash -> [(another one among `hashes`, 1 to NEAR bits apart, that distance)]; 0 is no hash and is left out."""
    unique = np.unique(hashes)
    unique = unique[unique != 0]
    near: dict[int, list[tuple[int, int]]] = defaultdict(list)
    pairs: set[tuple[int, int]] = set()
    bits = np.unpackbits(unique.view(np.uint8).reshape(-1, 8), axis=1)
    for first in range(_BANDS):
        # Bits that stand side by side are alike in many pictures; those of a band come from all over the hash.
        chosen = bits[:, first::_BANDS].astype(np.uint32)
        band = chosen @ (1 << np.arange(chosen.shape[1], dtype=np.uint32))
        order = np.argsort(band, kind="stable")
        sorted_band, sorted_hashes = band[order], unique[order]
        # Compare each with its first follower in the same band, then with its second, ...
        left = np.arange(len(unique))
        step = 1
        while True:
            left = left[left + step < len(unique)]
            left = left[sorted_band[left] == sorted_band[left + step]]
            if not len(left):
                break
            one, two = sorted_hashes[left], sorted_hashes[left + step]
            close = _distances(one, two) <= NEAR
            pairs.update(zip(one[close].tolist(), two[close].tolist(), strict=True))
            step += 1
    for one, two in sorted({(min(pair), max(pair)) for pair in pairs}):
        distance = (one ^ two).bit_count()
        near[one].append((two, distance))
        near[two].append((one, distance))
    return dict(near)


def _distances(one: Hashes, two: Hashes) -> npt.NDArray[np.int64]:
    """Bits in which hashes differ."""
    differing = (one ^ two).view(np.uint8).reshape(-1, 8)
    return np.unpackbits(differing, axis=1).sum(axis=1, dtype=np.int64)
