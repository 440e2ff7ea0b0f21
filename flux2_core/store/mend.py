"""Mending a table: what is damaged goes, what is sound stays, so that `cache` fills the gap and `verify` is clean.

A damaged manifest takes its version with it; of a damaged data file the rows that still agree with their checksums are
written once more. Files of history (transactions, tags, the hint at the newest version, lists of hashes) just go: Lance
and `seal` make them anew. Versions that name a removed file cannot be read any more; an index that names one is
rewritten by the next `cache`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import lance

from flux2_core.errors import CacheloomError, DataError
from flux2_core.store import objects, seals
from flux2_core.store.faults import explained
from flux2_core.store.reader import Reader
from flux2_core.store.row import Row
from flux2_core.store.schemas import KEY
from flux2_core.store.table import Table, options
from flux2_core.store.writer import Writer

VERSIONS, DATA, DELETIONS = "/_versions/", "/data/", "/_deletions/"


def mend(uri: str, damaged: Iterable[str]) -> None:
    """Take damaged files out of a table; rows that were in them and are sound stay.

    Args:
        uri: of the table. Where no version of it can be opened any more, all of it goes.
        damaged: URIs of its files, as `seals.damaged` gives them. Files that were never sealed are found by reading.

    Raises:
        DataError: the table is sound and of another version of this project; it is left as it is.
        SetupError: the table cannot be written.
    """
    root = uri.rstrip("/")
    names = {path[len(root) :]: path for path in damaged}
    for name, path in names.items():
        if not name.startswith((DATA, DELETIONS)):
            objects.delete(path)
    if (table := _newest(uri)) is None:
        objects.delete_below(uri)
        return
    broken = _broken(table, names)
    if broken:
        _rewrite(table, broken)
    for name, path in names.items():
        if name.startswith((DATA, DELETIONS)):
            objects.delete(path)
    seals.forget(uri, names)
    seals.seal(uri)


def _newest(uri: str) -> Table | None:
    """The newest version that can be opened; manifests that are damaged are removed. None: there is none.

    Raises:
        DataError: it is sound, and refused for something else: its rows are another version's of this project.
    """
    manifests = sorted(
        path for path, _ in objects.listing(objects.join(uri, VERSIONS.strip("/"))) if path.endswith(".manifest")
    )
    for path in manifests:  # named by what is left up to 2**64: the newest first
        try:
            table = Table.open(uri)
            table.dataset.get_fragments()
            return table
        except DataError:
            if seals.agrees(uri, path):
                raise
            objects.delete(path)
            seals.forget(uri, [path[len(uri.rstrip("/")) :]])
    return None


def _broken(table: Table, names: Iterable[str]) -> set[int]:
    """Fragments that name a damaged file, or whose keys cannot be read."""
    found = set()
    for fragment in table.dataset.get_fragments():
        files = {f"{DATA}{file.path}" for file in fragment.data_files()}
        if (deletion := fragment.metadata.deletion_file) is not None:
            files.add("/" + deletion.path(fragment.fragment_id))
        if not files.isdisjoint(names) or _keys(fragment) is None:
            found.add(fragment.fragment_id)
    return found


def _keys(fragment: lance.LanceFragment) -> list[str] | None:
    """Keys of a fragment; None where they cannot be read."""
    try:
        with explained("fragment"):
            return list(fragment.to_table(columns=[KEY]).column(KEY).to_pylist())
    except DataError:
        return None


def _rewrite(table: Table, broken: set[int]) -> None:
    """Leave fragments behind, and write their sound rows once more."""
    fragments = [table.dataset.get_fragment(number) for number in sorted(broken)]
    keys = [key for fragment in fragments if fragment is not None for key in _keys(fragment) or ()]
    rows = _sound(table, keys)
    with explained(table.uri):
        lance.LanceDataset.commit(
            table.uri,
            lance.LanceOperation.Delete([], sorted(broken), "false"),
            read_version=table.version,
            storage_options=options(table.uri),
        )
    with Writer(table, batch_rows=64, batch_bytes=1 << 28) as writer:
        for row in rows:
            writer.add(row)


def _sound(table: Table, keys: Sequence[str]) -> Iterator[Row]:
    """Rows that agree with their checksums; the reader has looked up where their bytes lie before they are dropped."""
    try:
        reader = Reader(table, keys)
    except CacheloomError:
        return iter(())
    return _each_sound(reader, sorted(reader.keys()))


def _each_sound(reader: Reader, keys: Sequence[str]) -> Iterator[Row]:
    for key in keys:  # one at a time: a dev caption of raw rows is up to 16 MB
        try:
            yield from reader.fetch([key])
        except DataError:
            continue  # encoded again by the next `cache`
