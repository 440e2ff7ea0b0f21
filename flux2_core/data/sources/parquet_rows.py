"""Pictures in the rows of Parquet files; a row group is read as a whole and kept for its neighbours."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flux2_core.data.sources.columns import Columns, picture_column
from flux2_core.errors import DataError
from flux2_core.store.random_access import open_at, version

BUFFER_BYTES = 2**16
GROUPS = 4  # row groups in memory, 50 MB each at the usual 100 rows of 500 kB

_lock = threading.Lock()


def schema(uri: str) -> pa.Schema:
    """Columns of the file.

    Raises:
        DataError: it is no Parquet file; names it.
    """
    return _opened(uri).schema_arrow


def rows(uri: str, columns: Columns) -> tuple[list[Any], list[Any]]:
    """(names, texts) of all rows; the pictures' bytes stay where they are."""
    wanted = [column for column in (columns.name, columns.text) if column is not None]
    table = _opened(uri).read(columns=wanted)
    none = [None] * table.num_rows
    names = none
    if columns.name is not None:
        top, _, nested = columns.name.partition(".")
        column = table.column(top)
        names = (pc.struct_field(column, nested) if nested else column).to_pylist()
    return names, table.column(columns.text).to_pylist() if columns.text is not None else none


def read(uri: str, row: int) -> bytes | None:
    """The picture's bytes in a row, None where it has none."""
    with _lock:  # threads ask for the same row group at once
        first, group = _group_of(uri, version(uri), row)
    value = group[row - first].as_py()
    return value["bytes"] if isinstance(value, dict) else value


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
    column = picture_column(file.schema_arrow)
    struct = pa.types.is_struct(file.schema_arrow.field(column).type)
    try:
        return file.read_row_group(number, columns=[f"{column}.bytes" if struct else column]).column(0)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"row group {number} cannot be read ({error})") from error


def _opened(uri: str) -> pq.ParquetFile:
    try:
        return _open(uri, version(uri, fresh=True))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{uri}: not a Parquet file that can be read ({error}); write it again") from error


@functools.lru_cache(maxsize=GROUPS)
def _open(uri: str, stamp: tuple[int, str]) -> pq.ParquetFile:
    return pq.ParquetFile(pa.PythonFile(open_at(uri, buffer_bytes=BUFFER_BYTES), mode="r"))
