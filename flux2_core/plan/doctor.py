"""The data set doctor: pictures that look alike, captions that are cut off, triggers that are missing.

Everything here takes what `plan` has read already, as columns, and is linear in the number of pictures.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from flux2_core.config.sections import Config
from flux2_core.data import words
from flux2_core.store import parquet

HISTOGRAM_BINS = 8
NOUNS = "image|picture|photo|reference"
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
NUMBERED = re.compile(rf"\b(?:{NOUNS})s? #?(\d{{1,2}}(?:(?:, ?| and | & |, and )\d{{1,2}})*)\b", re.IGNORECASE)
COUNTED = re.compile(rf"\b({'|'.join(ORDINALS)}) (?:input |reference )?(?:{NOUNS})\b", re.IGNORECASE)


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
        mine = parquet.Rows(pictures, np.flatnonzero(pc.equal(pictures.column("dataset"), ordinal).to_numpy()))
        without, mentioned, total = [], 0, 0
        for picture in mine:
            hits = sum(words.mentions(text, data.trigger) for text in picture["captions"])
            mentioned, total = mentioned + hits, total + len(picture["captions"])
            if not hits:
                without.append(picture["id"])
        found.append(
            {"dataset": ordinal, "trigger": data.trigger, "captions": total, "mentioned": mentioned}
            | {"injected": injected.get(ordinal, 0), "without": without}
        )
    return found


def references(pictures: pa.Table) -> dict[str, Any]:
    """How many pictures have how many references, and ids of those whose captions name one more than there are.

    What names one: "image 2", "images 1 and 2", "second image", also of a picture, photo or reference. Captions of a
    data set without any references name none.
    """
    counts = pc.list_value_length(pictures.column("references")).to_numpy()
    edits = set(pictures.column("dataset").to_numpy()[counts > 0].tolist())
    mine = parquet.Rows(pictures, np.flatnonzero(np.isin(pictures.column("dataset").to_numpy(), list(edits))))
    unmatched = [row["id"] for row in mine if max(map(_highest, row["captions"]), default=0) > len(row["references"])]
    return {"pictures": {str(n): of for n, of in sorted(Counter(counts[counts > 0].tolist()).items())}} | {
        "unmatched": unmatched
    }


def _highest(caption: str) -> int:
    """The highest number of a reference that a caption names; 0 where it names none."""
    return max(_named(caption), default=0)


def _named(caption: str) -> Iterator[int]:
    for listed in NUMBERED.findall(caption):
        yield from map(int, re.findall(r"\d+", listed))
    yield from (ORDINALS.index(word.lower()) + 1 for word in COUNTED.findall(caption))
