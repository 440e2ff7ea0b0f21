"""Pictures in the rows of Lance tables that other tools wrote: a bytes or blob column, read by position."""

from __future__ import annotations

import functools

import lance
import pyarrow as pa

from flux2_core.data.sources import columns
from flux2_core.store import objects
from flux2_core.store.faults import explained


def rows(uri: str, caption: str) -> columns.Rows:
    """Names and captions of the newest version, which is read from here on.

    Raises:
        DataError: it is no Lance table, or has no such columns; names it.
    """
    _open.cache_clear()
    dataset = _open(uri)

    def read_columns(wanted: list[str]) -> pa.Table:
        with explained(uri):
            return dataset.scanner(columns=wanted).to_table()

    return columns.rows(uri, dataset.schema, read_columns, caption=caption, count=dataset.count_rows())


def read(uri: str, address: str) -> bytes | None:
    """The picture's bytes in a row, None where it has none."""
    row, dataset = columns.row_number(address), _open(uri)
    name = columns.picture_column(dataset.schema)
    with explained(uri):
        if isinstance(dataset.schema.field(name).type, pa.BaseExtensionType):  # Lance's blobs
            return next((data for _, data in dataset.read_blobs(name, indices=[row])), None)
        taken = dataset.take([row], columns=[columns.bytes_column(dataset.schema)])
        return columns.picture_bytes(taken.column(0)[0].as_py())


@functools.lru_cache(maxsize=8)
def _open(uri: str) -> lance.LanceDataset:
    with explained(uri):
        return lance.dataset(uri, storage_options=objects.storage_options() if objects.is_remote(uri) else None)
