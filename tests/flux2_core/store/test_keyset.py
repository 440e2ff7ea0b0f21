"""flux2_core.store.keyset: the same answers as sets of `str`, in a third of their memory."""

import random

import numpy as np
import pyarrow as pa

from flux2_core.store import keyset
from tests.flux2_core.store_writers import keys_of

ODD = ["pad", "", "k", "it's", "ü" * 40, "f" * 90]


def test_of_is_a_sorted_set(monkeypatch):
    """Any number of lists, iterators and Arrow columns with nulls give their union, sorted, each key once."""
    monkeypatch.setattr(keyset, "AT_ONCE", 7)
    names = keys_of(range(40))
    column = pa.chunked_array([[*names[20:], None], [], ["pad", None]], pa.string())
    found = keyset.of(iter(names[:30]), column, column.chunk(0), keyset.of(ODD), ())
    assert [key.decode() for key in found.tolist()] == sorted({*names, *ODD}, key=str.encode)
    assert keyset.of([]).size == 0


def test_array_keeps_order_and_repeats(monkeypatch):
    """An array is the keys as they come."""
    monkeypatch.setattr(keyset, "AT_ONCE", 3)
    names = [*keys_of((3, 1, 3, 2)), *ODD, "k"]
    for given in (names, iter(names), pa.chunked_array([names[:4], names[4:]])):
        assert [key.decode() for key in keyset.array(given).tolist()] == names


def test_find_agrees_with_a_dictionary():
    """Each key's place in the sorted array, and whether it stands there; in nothing nothing stands."""
    names = [*keys_of(range(200)), *ODD]
    known = keyset.of(random.Random(1).sample(names, 90))
    place_of = {key: place for place, key in enumerate(known.tolist())}
    places, there = keyset.find(keyset.array(names), known)
    assert there.tolist() == [name.encode() in place_of for name in names]
    assert all(
        place == place_of[name.encode()] for name, place in zip(np.array(names)[there], places[there], strict=True)
    )
    assert not keyset.find(keyset.array(names), keyset.of([]))[1].any()


def test_a_key_is_64_bytes():
    """Hashes take 64 bytes each, beside shorter keys too."""
    assert keyset.of(keys_of(range(10)), ["pad"]).nbytes == 11 * 64
