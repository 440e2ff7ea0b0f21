"""Parquet at a URI: whole tables, written at once and sealed with a checksum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from flux2_core.errors import DataError
from flux2_core.store import objects

SEAL_BYTES = 12  # of a Parquet file: the letters xxh3 and 8 bytes


def read_parquet(uri: str, *, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet table, or some of its columns; its metadata is in `.schema.metadata` (bytes to bytes).

    Raises:
        FileNotFoundError: nothing is there.
        DataError: the file was not written by `write_parquet`, or a bit of it changed since.
    """
    data = objects.read(uri)
    seal_at = len(data) - _tail_length(data) - SEAL_BYTES
    if seal_at < 0 or data[seal_at : seal_at + SEAL_BYTES] != _seal(data[:seal_at], data[seal_at + SEAL_BYTES :]):
        raise DataError(f"{uri}: damaged, or not written by cacheloom; remove it and run `cacheloom cache` again")
    return pq.read_table(pa.BufferReader(data), columns=columns)


def write_parquet(uri: str, table: pa.Table, metadata: Mapping[str, str]) -> None:
    """Write a table, whole or not at all; zstd; `metadata` is added to the schema's.

    Parquet's page checksums leave headers and footer open (a flipped bit there read back as other rows), so a
    checksum of the whole file stands between the last page and the footer, where every reader passes over it.
    """
    merged = {**(table.schema.metadata or {}), **{name.encode(): text.encode() for name, text in metadata.items()}}
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(merged), sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    pages, tail = data[: -_tail_length(data)], data[-_tail_length(data) :]
    objects.write(uri, pages + _seal(pages, tail) + tail)


def _tail_length(data: bytes) -> int:
    """Bytes of a Parquet file's footer, its length (4 bytes, little-endian) and the closing magic."""
    return int.from_bytes(data[-8:-4], "little") + 8


def _seal(pages: bytes, tail: bytes) -> bytes:
    hasher = xxhash.xxh3_64(pages)
    hasher.update(tail)
    return b"xxh3" + hasher.digest()
