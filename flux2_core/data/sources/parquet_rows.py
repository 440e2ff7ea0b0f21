"""Pictures in the rows of Parquet files; a row group is read as a whole and kept for its neighbours."""

from __future__ import annotations

import functools
import threading

import pyarrow as pa
import pyarrow.parquet as pq

from flux2_core.data.sources import columns
from flux2_core.errors import DataError
from flux2_core.store.random_access import mark, open_at, planned, version

BUFFER_BYTES = 2**16
GROUPS = 4  # row groups in memory, 50 MB each at the usual 100 rows of 500 kB

_lock = threading.Lock()


def rows(uri: str, caption: str) -> columns.Rows:
    """Names and captions of the file as it is now.

    Raises:
        DataError: it is no Parquet file, or has no such columns; names it.
    """
    try:
        seen = version(uri, fresh=True)
        known, file = mark(uri, seen), _open(uri, seen)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{uri}: not a Parquet file that can be read ({error}); write it again") from error
    stamps: list[str] = []
    for number in range(file.metadata.num_row_groups):
        stamps += [f"{known}.{number}.{len(stamps)}"] * file.metadata.row_group(number).num_rows
    return columns.rows(uri, file.schema_arrow, file.read, caption=caption, stamps=stamps)


def read(uri: str, stamp: str, address: str) -> bytes | None:
    """The picture's bytes in a row, None where it has none.

    Args:
        uri: The file.
        stamp: The mark that it must have, the number of the row group, and that of the group's first row.
        address: The number of the row.

    Raises:
        DataError: it is another file by now, or the row group cannot be read.
    """
    known, number, first = stamp.split(".")
    with _lock:  # threads ask for the same row group at once
        group = _group(uri, planned(uri, known), int(number))
    return columns.picture_bytes(group[columns.row_number(address) - int(first)].as_py())


@functools.lru_cache(maxsize=GROUPS)
def _group(uri: str, seen: tuple[int, str], number: int) -> pa.ChunkedArray:
    try:
        file = _open(uri, seen)
        return file.read_row_group(number, columns=[columns.bytes_column(file.schema_arrow)]).column(0)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"row group {number} cannot be read ({error})") from error


@functools.lru_cache(maxsize=GROUPS)
def _open(uri: str, seen: tuple[int, str]) -> pq.ParquetFile:
    return pq.ParquetFile(pa.PythonFile(open_at(uri, seen, buffer_bytes=BUFFER_BYTES), mode="r"))
