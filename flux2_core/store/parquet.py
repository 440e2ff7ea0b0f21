"""Parquet at a URI: whole tables, written at once and sealed with a checksum; and their rows one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from flux2_core.errors import DataError
from flux2_core.store import objects

SEAL_BYTES = 12  # of a Parquet file: the letters xxh3 and 8 bytes
AT_ONCE = 4096  # rows that are Python objects at a time


class Rows(Sequence[dict[str, Any]]):
    """Some rows of a table, each a dictionary while somebody looks at it: as columns they take a tenth of that."""

    def __init__(self, table: pa.Table, places: npt.NDArray[np.int64]) -> None:
        self._table, self._places = table, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, place: slice) -> Rows: ...

    def __getitem__(self, place: int | slice) -> dict[str, Any] | Rows:
        if isinstance(place, slice):
            return Rows(self._table, self._places[place])
        row: dict[str, Any] = self._table.slice(int(self._places[place]), 1).to_pylist()[0]
        return row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), AT_ONCE):
            yield from self._table.take(self._places[start : start + AT_ONCE]).to_pylist()

    def column(self, name: str) -> pa.ChunkedArray:
        """One value of each row."""
        return self._table.column(name).take(self._places)


def read_parquet(uri: str, *, columns: Sequence[str] | None = None, optional: Sequence[str] = ()) -> pa.Table:
    """Read a Parquet table, or some of its columns; its metadata is in `.schema.metadata` (bytes to bytes).

    Of `columns` those that are `optional` need not be there.

    Raises:
        FileNotFoundError: nothing is there.
        DataError: the file was not written by `write_parquet`, or a bit of it changed since.
    """
    data = memoryview(objects.read(uri))
    seal_at = len(data) - _tail_length(data) - SEAL_BYTES
    if seal_at < 0 or data[seal_at : seal_at + SEAL_BYTES] != _seal(data[:seal_at], data[seal_at + SEAL_BYTES :]):
        raise DataError(f"{uri}: damaged, or not written by cacheloom; remove it and run `cacheloom cache` again")
    if columns is not None and optional:
        there = pq.read_schema(pa.BufferReader(data)).names
        columns = [name for name in columns if name in there or name not in optional]
    return pq.read_table(pa.BufferReader(data), columns=columns)


def write_parquet(uri: str, table: pa.Table, metadata: Mapping[str, str]) -> None:
    """Write a table, whole or not at all; zstd; `metadata` is added to the schema's.

    Parquet's page checksums leave headers and footer open (a flipped bit there read back as other rows), so a
    checksum of the whole file stands between the last page and the footer, where every reader passes over it.
    """
    merged = {**(table.schema.metadata or {}), **{name.encode(): text.encode() for name, text in metadata.items()}}
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(merged), sink, compression="zstd")
    data = memoryview(sink.getvalue())
    pages, tail = data[: -_tail_length(data)], data[-_tail_length(data) :]
    objects.write(uri, b"".join([pages, _seal(pages, tail), tail]))


def _tail_length(data: memoryview) -> int:
    """Bytes of a Parquet file's footer, its length (4 bytes, little-endian) and the closing magic."""
    return int.from_bytes(data[-8:-4], "little") + 8


def _seal(pages: memoryview, tail: memoryview) -> bytes:
    hasher = xxhash.xxh3_64(pages)
    hasher.update(tail)
    return b"xxh3" + hasher.digest()
