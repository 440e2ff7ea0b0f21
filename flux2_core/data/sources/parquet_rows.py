"""Pictures in the rows of Parquet files; a row group is read as a whole and kept for its neighbours."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from flux2_core.data.sources import columns
from flux2_core.data.sources.walls import MOST_ROWS
from flux2_core.errors import DataError
from flux2_core.store.random_access import mark, open_at, planned, version

BUFFER_BYTES = 2**16
FILES = 4  # open at a time
GROUP_BYTES = 2**30  # of the pictures of a row group, unpacked
KEPT, KEPT_BYTES = 2, 2**29  # row groups that stay in any case, and what more of them may take: ten of 50 MB
TOO_LARGE = "over 1 GiB of pictures, and it is read as a whole: write the file with fewer rows to a group, 100 say"

_Group = tuple[str, tuple[int, str], int, str | None]  # its file, that file's version, its number, the column
_groups: OrderedDict[_Group, tuple[pa.ChunkedArray | DataError, int]] = OrderedDict()
_lock = threading.Lock()


def rows(uri: str, caption: str, picture: str | None = None) -> columns.Rows:
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
        count = file.metadata.row_group(number).num_rows
        if len(stamps) + count > MOST_ROWS:
            raise DataError(f"{uri}: over {MOST_ROWS:,} rows: make several files of it")
        if _size(file, number, picture) > GROUP_BYTES:
            raise DataError(f"{uri}: row group {number} has {TOO_LARGE}")
        stamps += [f"{known}.{number}.{len(stamps)}"] * count

    def read_columns(wanted: list[str]) -> Iterator[pa.RecordBatch]:
        try:
            yield from file.iter_batches(columns.FEW_ROWS, columns=wanted)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{uri}: its captions cannot be read ({error}); write it again") from error

    schema = file.schema_arrow
    return columns.rows(uri, schema, read_columns, caption=caption, stamps=stamps, picture=picture)


def read(uri: str, stamp: str, address: str) -> bytes | None:
    """The picture's bytes in a row, None where it has none.

    Args:
        uri: The file.
        stamp: The mark that it must have, the number of the row group, and that of the group's first row.
        address: The number of the row.

    Raises:
        DataError: it is another file by now, or the row group cannot be read or is too large.
    """
    (known, number, first), (row, column) = stamp.split("."), columns.located(address)
    with _lock:  # threads ask for the same row group at once
        group = _group(uri, planned(uri, known), int(number), column)
    if isinstance(group, DataError):
        raise group
    return columns.picture_bytes(group[row - int(first)].as_py())


def _group(uri: str, seen: tuple[int, str], number: int, column: str | None) -> pa.ChunkedArray | DataError:
    """The pictures' column of a row group; an error is kept too: each of a million rows would unpack it to find it."""
    key = uri, seen, number, column
    if key not in _groups:
        _groups[key] = _unpacked(*key)
        while len(_groups) > KEPT and sum(size for _, size in _groups.values()) > KEPT_BYTES:
            _groups.popitem(last=False)
    _groups.move_to_end(key)
    return _groups[key][0]


def _unpacked(
    uri: str, seen: tuple[int, str], number: int, column: str | None
) -> tuple[pa.ChunkedArray | DataError, int]:
    """A row group and its bytes, or why there is none."""
    held, size = [], 0
    try:
        file = _open(uri, seen)
        wanted = [columns.bytes_column(file.schema_arrow, column)]
        for batch in file.iter_batches(columns.FEW_ROWS, row_groups=[number], columns=wanted):
            held.append(batch.column(0))
            if (size := size + batch.nbytes) > GROUP_BYTES:  # which the file's own figures need not say
                return DataError(f"row group {number} has {TOO_LARGE}"), 0
        return pa.chunked_array(held), size
    except (OSError, pa.ArrowException) as error:
        return DataError(f"row group {number} cannot be read ({error})"), 0


def _size(file: pq.ParquetFile, number: int, picture: str | None) -> int:
    """Bytes of the pictures in a row group, by the file's own figures."""
    group, name = file.metadata.row_group(number), columns.bytes_column(file.schema_arrow, picture)
    chunks = (group.column(place) for place in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == name)


@functools.lru_cache(maxsize=FILES)
def _open(uri: str, seen: tuple[int, str]) -> pq.ParquetFile:
    return pq.ParquetFile(pa.PythonFile(open_at(uri, seen, buffer_bytes=BUFFER_BYTES), mode="r"))
