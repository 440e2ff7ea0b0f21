"""The data set doctor: pictures that look alike, captions that are cut off, triggers that are missing.

Everything here takes what `plan` has read already, as columns, and is linear in the number of pictures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from flux2_core import captions
from flux2_core.config import Config

# A look: 8 bytes that say where the picture grows brighter from left to right (dHash), 48 of its colours on 4x4 fields.
HASH_BYTES, FIELDS = 8, 4
LOOK_BYTES = HASH_BYTES + 3 * FIELDS**2
FLAT = 2.0  # of 255: a smaller step is no edge, so that the noise of a plain background sets no bits
ALIKE_BITS = 4  # of 64
ALIKE_COLOUR = 8.0  # mean difference of the fields, of 255: recompressed and resized copies stay under 3
NEIGHBOURS = 64  # compared with each picture in a crowd that agrees in one band
HISTOGRAM_BINS = 8


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


def token_lengths(counts: npt.NDArray[np.int64], *, limit: int) -> dict[str, Any]:
    """Longest, mean and a histogram of prompt lengths in tokens; the last bin holds those over the limit."""
    edges = [limit * step // HISTOGRAM_BINS for step in range(HISTOGRAM_BINS + 1)]
    within = np.histogram(counts[counts <= limit] - 1, bins=edges)[0].tolist()  # a bin is low + 1 to high
    bins = [{"from": low + 1, "to": high} for low, high in pairwise(edges)]
    over = {"from": limit + 1, "to": None, "texts": int((counts > limit).sum())}
    return {
        "limit": limit,
        "longest": int(counts.max()),
        "mean": round(float(counts.mean()), 1),
        "histogram": [*(place | {"texts": count} for place, count in zip(bins, within, strict=True)), over],
    }


def truncated(pictures: pa.Table, texts: Sequence[str], counts: npt.NDArray[np.int64], *, limit: int) -> list[Any]:
    """`id` and `tokens` of every picture with a caption that loses its end, in their order."""
    cut = {texts[place]: int(counts[place]) for place in np.flatnonzero(counts > limit).tolist()}
    if not cut:
        return []
    column = pictures.column("captions").combine_chunks()
    hit = pc.is_in(column.flatten(), value_set=pa.array(list(cut), pa.string()))
    rows = pc.list_parent_indices(column).filter(hit).unique()
    found = pictures.select(["id", "captions"]).take(rows).to_pylist()
    return [{"id": row["id"], "tokens": max(cut.get(text, 0) for text in row["captions"])} for row in found]


def trigger_coverage(config: Config, pictures: pa.Table, *, injected: Mapping[int, int]) -> list[dict[str, Any]]:
    """Per data set with a trigger: captions that mention it, pictures where it was injected, ids of those without."""
    found = []
    for ordinal, data in enumerate(config.data):
        if data.trigger is None or data.regularisation:
            continue
        mine = pictures.filter(pc.equal(pictures.column("dataset"), ordinal))
        without, mentioned, total = [], 0, 0
        for sample, texts in zip(mine.column("id").to_pylist(), mine.column("captions").to_pylist(), strict=True):
            hits = sum(captions.mentions(text, data.trigger) for text in texts)
            mentioned, total = mentioned + hits, total + len(texts)
            if not hits:
                without.append(sample)
        found.append(
            {"dataset": ordinal, "trigger": data.trigger, "captions": total, "mentioned": mentioned}
            | {"injected": injected.get(ordinal, 0), "without": without}
        )
    return found
