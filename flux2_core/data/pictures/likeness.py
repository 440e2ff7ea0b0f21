"""Likeness: pictures that look alike, by a few bytes of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

# A look: 8 bytes that say where the picture grows brighter from left to right (dHash), 48 of its colours on 4x4 fields.
HASH_BYTES, FIELDS = 8, 4
LOOK_BYTES = HASH_BYTES + 3 * FIELDS**2
FLAT = 2.0  # of 255: a smaller step is no edge, so that the noise of a plain background sets no bits
ALIKE_BITS = 4  # of 64
ALIKE_COLOUR = 8.0  # mean difference of the fields, of 255: recompressed and resized copies stay under 3
NEIGHBOURS = 64  # compared with each picture in a crowd that agrees in one band


def look(rgb: Image.Image) -> bytes:
    """How an RGB picture looks, in 56 bytes that survive resizing and recompression."""
    grey_HW = np.asarray(rgb.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.float32)
    rising = np.packbits(grey_HW[:, 1:] > grey_HW[:, :-1] + FLAT)
    return rising.tobytes() + rgb.resize((FIELDS, FIELDS), Image.Resampling.BOX).tobytes()


def alike(looks: Sequence[bytes]) -> list[list[int]]:
    """Groups of places whose pictures look alike, each group and all of them in order.

    Two hashes that differ in at most 4 of 64 bits agree in at least one of 5 bands, so candidates are found by sorting
    by each band. Where more than 64 agree in a band, each is compared with its next 64 in the order of hashes only.
    """
    if not looks:
        return []
    table = np.frombuffer(b"".join(looks), np.uint8).reshape(-1, LOOK_BYTES)
    distinct, kind_of = np.unique(table, axis=0, return_inverse=True)
    hashes = np.ascontiguousarray(distinct[:, :HASH_BYTES]).view(np.uint64)[:, 0]
    colours = distinct[:, HASH_BYTES:].astype(np.int16)
    parent = np.arange(len(distinct))
    for band in _bands(hashes):
        order = np.lexsort((hashes, band))
        for distance in range(1, min(NEIGHBOURS, len(order) - 1) + 1):
            left, right = order[:-distance], order[distance:]
            same = band[left] == band[right]
            if not same.any():
                break
            left, right = left[same], right[same]
            close = np.bitwise_count(hashes[left] ^ hashes[right]) <= ALIKE_BITS
            left, right = left[close], right[close]
            close = np.abs(colours[left] - colours[right]).mean(axis=1) <= ALIKE_COLOUR
            _join(parent, left[close], right[close])
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for place, kind in enumerate(kind_of.ravel().tolist()):
        groups[_root(parent, kind)].append(place)
    return [group for group in groups.values() if len(group) > 1]


def _bands(hashes: npt.NDArray[np.uint64]) -> Iterator[npt.NDArray[np.uint64]]:
    width, left = divmod(64, ALIKE_BITS + 1)
    shift = 0
    for place in range(ALIKE_BITS + 1):
        bits = width + (place < left)
        yield (hashes >> np.uint64(shift)) & np.uint64((1 << bits) - 1)
        shift += bits


def _join(parent: npt.NDArray[np.int64], left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> None:
    for a, b in zip(left.tolist(), right.tolist(), strict=True):
        one, other = _root(parent, a), _root(parent, b)
        if one != other:
            parent[max(one, other)] = min(one, other)


def _root(parent: npt.NDArray[np.int64], place: int) -> int:
    while parent[place] != place:
        parent[place] = place = int(parent[parent[place]])
    return place
