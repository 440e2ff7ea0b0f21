"""Pictures in the rows of Parquet files; a row group is read as a whole and kept for its neighbours."""

from __future__ import annotations

import functools
import threading

import pyarrow as pa
import pyarrow.parquet as pq

from flux2_core.data.sources import columns
from flux2_core.errors import DataError
from flux2_core.store.random_access import open_at, version

BUFFER_BYTES = 2**16
GROUPS = 4  # row groups in memory, 50 MB each at the usual 100 rows of 500 kB

_lock = threading.Lock()


def rows(uri: str, caption: str) -> columns.Rows:
    """Names and captions of the file as it is now.

    Raises:
        DataError: it is no Parquet file, or has no such columns; names it.
    """
    try:
        file = _open(uri, version(uri, fresh=True))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{uri}: not a Parquet file that can be read ({error}); write it again") from error
    return columns.rows(uri, file.schema_arrow, file.read, caption=caption, count=file.metadata.num_rows)


def read(uri: str, address: str) -> bytes | None:
    """The picture's bytes in a row, None where it has none."""
    row = columns.row_number(address)
    with _lock:  # threads ask for the same row group at once
        first, group = _group_of(uri, version(uri), row)
    return columns.picture_bytes(group[row - first].as_py())


def _group_of(uri: str, stamp: tuple[int, str], row: int) -> tuple[int, pa.ChunkedArray]:
    metadata, first = _open(uri, stamp).metadata, 0
    for number in range(metadata.num_row_groups):
        count = metadata.row_group(number).num_rows
        if first <= row < first + count:
            return first, _group(uri, stamp, number)
        first += count
    raise DataError(f"there are {first} rows only")


@functools.lru_cache(maxsize=GROUPS)
def _group(uri: str, stamp: tuple[int, str], number: int) -> pa.ChunkedArray:
    file = _open(uri, stamp)
    try:
        return file.read_row_group(number, columns=[columns.bytes_column(file.schema_arrow)]).column(0)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"row group {number} cannot be read ({error})") from error


@functools.lru_cache(maxsize=GROUPS)
def _open(uri: str, stamp: tuple[int, str]) -> pq.ParquetFile:
    return pq.ParquetFile(pa.PythonFile(open_at(uri, buffer_bytes=BUFFER_BYTES), mode="r"))
