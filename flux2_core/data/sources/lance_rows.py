"""Pictures in the rows of Lance tables that other tools wrote: a bytes or blob column, read by position."""

from __future__ import annotations

import functools
from typing import Any

import lance
import pyarrow as pa

from flux2_core.data.sources.columns import Columns, picture_column
from flux2_core.store import objects
from flux2_core.store.faults import explained


def schema(uri: str) -> pa.Schema:
    """Columns of the newest version, which is read from here on.

    Raises:
        DataError: it is no Lance table; names it.
    """
    _open.cache_clear()
    return _open(uri).schema


def rows(uri: str, columns: Columns) -> tuple[list[Any], list[Any]]:
    """(names, texts) of all rows; the pictures' bytes stay where they are."""
    wanted = [column for column in (columns.name, columns.text) if column is not None]
    none = [None] * _open(uri).count_rows()
    with explained(uri):
        table = _open(uri).scanner(columns=wanted).to_table() if wanted else pa.table({})
    names, texts = (none if name is None else table.column(name).to_pylist() for name in (columns.name, columns.text))
    return names, texts


def read(uri: str, row: int) -> bytes | None:
    """The picture's bytes in a row, None where it has none."""
    dataset = _open(uri)
    column = picture_column(dataset.schema)
    kind = dataset.schema.field(column).type
    with explained(uri):
        if isinstance(kind, pa.BaseExtensionType):  # Lance's blobs
            return next((data for _, data in dataset.read_blobs(column, indices=[row])), None)
        wanted = f"{column}.bytes" if pa.types.is_struct(kind) else column
        value = dataset.take([row], columns=[wanted]).column(0)[0].as_py()
    return value["bytes"] if isinstance(value, dict) else value


@functools.lru_cache(maxsize=8)
def _open(uri: str) -> lance.LanceDataset:
    with explained(uri):
        return lance.dataset(uri, storage_options=objects.storage_options() if objects.is_remote(uri) else None)
