"""Pictures in the rows of Lance tables that other tools wrote: a bytes or blob column, by position in a version."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator

import lance
import pyarrow as pa

from flux2_core.data.sources import columns
from flux2_core.data.sources.walls import MOST_ROWS, too_large
from flux2_core.errors import DataError
from flux2_core.store import hashing, objects
from flux2_core.store.faults import explained

INSIDE = (0, 1, 2)  # kinds of blob descriptors whose bytes are files of the table: inline, packed, dedicated


def rows(uri: str, caption: str, picture: str | None = None) -> columns.Rows:
    """Names and captions of the newest version, which is read whatever is written later.

    Raises:
        DataError: it is no Lance table, lies partly elsewhere, or has no such columns; names it.
    """
    _open.cache_clear()
    dataset, stamp = _open(uri, None)
    with explained(uri):
        count = dataset.count_rows()
    if count > MOST_ROWS:
        raise DataError(f"{uri}: {count:,} rows, up to {MOST_ROWS:,} are read: make several tables of it")

    def read_columns(wanted: list[str]) -> Iterator[pa.RecordBatch]:
        with explained(uri):
            yield from dataset.scanner(columns=wanted, batch_size=16 * columns.FEW_ROWS).to_batches()

    stamps = [stamp] * count
    return columns.rows(uri, dataset.schema, read_columns, caption=caption, stamps=stamps, picture=picture)


def read(uri: str, stamp: str, address: str) -> bytes | None:
    """The picture's bytes in a row, None where it has none.

    Raises:
        DataError: the table has no such version any more, or the row only names a place outside the table.
    """
    row, column = columns.located(address)
    with _planned(uri):
        dataset, found = _open(uri, int(stamp.partition(".")[0]))
    if found != stamp:
        raise DataError(f"its container {objects.CHANGED}")
    name = columns.picture_column(dataset.schema, column)
    with _planned(uri):
        if isinstance(dataset.schema.field(name).type, pa.BaseExtensionType):  # Lance's blobs
            described = dataset.take([row], columns=[name]).column(0)[0].as_py()
            if described is not None and (described["kind"] not in INSIDE or described["blob_uri"]):
                place = described["blob_uri"]
                raise DataError(f"the row only names a place outside the table ({place}): store its bytes")
            if described is not None and (problem := too_large(described["size"])):
                raise DataError(problem)
            return next((data for _, data in dataset.read_blobs(name, indices=[row])), None)
        taken = dataset.take([row], columns=[columns.bytes_column(dataset.schema, column)])
        return columns.picture_bytes(taken.column(0)[0].as_py())


@contextlib.contextmanager
def _planned(uri: str) -> Iterator[None]:
    """A version that was sound when it was planned, and fails now, has been removed or written over."""
    try:
        with explained(uri):
            yield
    except DataError as error:
        if error.__cause__ is None:  # ours, not Lance's
            raise
        raise DataError(f"its container {objects.CHANGED} ({error})") from error


@functools.lru_cache(maxsize=8)
def _open(uri: str, number: int | None) -> tuple[lance.LanceDataset, str]:
    """A version and its stamp: its number, and the names of its files, since a table made anew counts from 1 too."""
    if not objects.is_remote(uri):
        _see_files(uri)
    with explained(uri):
        options = objects.storage_options() if objects.is_remote(uri) else None
        dataset = lance.dataset(uri, version=number, storage_options=options)
        files = [file.path for part in dataset.get_fragments() for file in part.data_files()]
        elsewhere = ", ".join(sorted(base.path for base in dataset.base_paths().values()))
    if elsewhere:
        raise DataError(
            f"{uri}: a shallow clone, or a table with more bases: it names files elsewhere ({elsewhere}); write it "
            "whole, as Lance's deep_clone does"
        )
    return dataset, f"{dataset.version}.{hashing.digest(files)[:8]}"


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
