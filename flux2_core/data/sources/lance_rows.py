"""Pictures in the rows of Lance tables that other tools wrote: a bytes or blob column, read by position."""

from __future__ import annotations

import functools
import os

import lance
import pyarrow as pa

from flux2_core.data.sources import columns
from flux2_core.errors import DataError
from flux2_core.store import objects
from flux2_core.store.faults import explained

INSIDE = (0, 1, 2)  # kinds of blob descriptors whose bytes are files of the table: inline, packed, dedicated


def rows(uri: str, caption: str) -> columns.Rows:
    """Names and captions of the newest version, which is read from here on.

    Raises:
        DataError: it is no Lance table, lies partly elsewhere, or has no such columns; names it.
    """
    _open.cache_clear()
    dataset = _open(uri)

    def read_columns(wanted: list[str]) -> pa.Table:
        with explained(uri):
            return dataset.scanner(columns=wanted).to_table()

    return columns.rows(uri, dataset.schema, read_columns, caption=caption, count=dataset.count_rows())


def read(uri: str, address: str) -> bytes | None:
    """The picture's bytes in a row, None where it has none.

    Raises:
        DataError: the row only names a place outside the table.
    """
    row, dataset = columns.row_number(address), _open(uri)
    name = columns.picture_column(dataset.schema)
    with explained(uri):
        if isinstance(dataset.schema.field(name).type, pa.BaseExtensionType):  # Lance's blobs
            described = dataset.take([row], columns=[name]).column(0)[0].as_py()
            if described is not None and (described["kind"] not in INSIDE or described["blob_uri"]):
                place = described["blob_uri"]
                raise DataError(f"the row only names a place outside the table ({place}): store its bytes")
            return next((data for _, data in dataset.read_blobs(name, indices=[row])), None)
        taken = dataset.take([row], columns=[columns.bytes_column(dataset.schema)])
        return columns.picture_bytes(taken.column(0)[0].as_py())


@functools.lru_cache(maxsize=8)
def _open(uri: str) -> lance.LanceDataset:
    if not objects.is_remote(uri):
        _see_files(uri)
    with explained(uri):
        dataset = lance.dataset(uri, storage_options=objects.storage_options() if objects.is_remote(uri) else None)
        elsewhere = ", ".join(sorted(base.path for base in dataset.base_paths().values()))
    if elsewhere:
        raise DataError(
            f"{uri}: a shallow clone, or a table with more bases: it names files elsewhere ({elsewhere}); write it "
            "whole, as Lance's deep_clone does"
        )
    return dataset


def _see_files(folder: str) -> None:
    """See that a table on disk is files and folders alone: Lance follows links, and waits for ever at a pipe."""
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as found:
            for entry in found:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif not entry.is_file(follow_symlinks=False):
                    raise DataError(f"{folder}: {entry.path} is a link, pipe, socket or device: copy the table whole")
