"""Keys by the million as sorted arrays: 64 bytes a key, where a `str` in a set takes 180."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Keys = npt.NDArray[np.bytes_]
Some: TypeAlias = Iterable[str] | Keys | pa.Array | pa.ChunkedArray
AT_ONCE = 65_536  # keys that are Python objects at a time: 6 MB
WIDEST = np.empty(0, "S64")  # of a hash; arrays of one width are compared without a copy


def array(keys: Some) -> Keys:
    """Keys in their order, repeats included; an Arrow column may have nulls, which are left out."""
    return np.concatenate([WIDEST, *(np.array(part, np.bytes_) for part in _parts(keys))])


def of(*keys: Some) -> Keys:
    """All of some keys, sorted, each once."""
    found: Keys = np.concatenate([WIDEST, *(array(part) for part in keys)])
    found.sort()
    fresh = np.ones(found.size, np.bool_)
    fresh[1:] = found[1:] != found[:-1]
    return found if fresh.all() else found[fresh]


def find(
    keys: Keys, known: Keys, *, order: npt.NDArray[np.int64] | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Where among known keys, sorted or given with their order, each key stands, and whether it does.

    Of a key that does not the place says nothing.
    """
    if not known.size:
        return np.zeros(keys.shape, np.int64), np.zeros(keys.shape, np.bool_)
    places = np.minimum(np.searchsorted(known, keys, sorter=order), known.size - 1)
    places = places if order is None else order[places]
    return places, known[places] == keys


def _parts(keys: Some) -> Iterator[Any]:
    if isinstance(keys, np.ndarray):
        yield keys
        return
    if isinstance(keys, pa.Array | pa.ChunkedArray):
        for batch in pa.table({"key": keys.drop_null()}).to_batches(max_chunksize=AT_ONCE):
            yield batch.column(0).cast(pa.binary()).to_pylist()
        return
    source = iter(keys)
    while part := [key.encode() for key in islice(source, AT_ONCE)]:
        yield part
