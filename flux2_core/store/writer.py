"""Writing rows: batches collected beside the caller and committed from one background thread, each row exactly once.

A writer knows the keys of the version that it read, writes the files of the rows that are missing there, and commits
them as a Lance `Merge`, the one operation that Lance refuses if anything at all was committed since (rows added,
dropped, moved, a proof). Then it looks at what is new, and commits the same files again. So a commit reads the keys of
those between its last one and this one, however many there are before (decision 0034), and rows of other writers, of
older cacheloom's `merge_insert` too, are never doubled: that refuses a commit that is in the way in its turn.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import lance
import numpy as np
import pyarrow as pa

from flux2_core.errors import CacheloomError
from flux2_core.store import keyset
from flux2_core.store.faults import CONFLICT, RETRY_WAITS_S, patiently
from flux2_core.store.keyset import Keys
from flux2_core.store.row import Row, attribute_names, checksum
from flux2_core.store.schemas import CHECKSUM, KEY, PAYLOAD
from flux2_core.store.table import Table, physical_schema

CONFLICTS = 50  # of one commit, before the store counts as failing: eight writers that hammer need about ten
CONFLICT_WAIT_S = 0.1  # at most, by chance, so that writers that met once do not meet again


class Writer:
    """Collects rows and commits them from one background thread, while the caller encodes the next ones.

    Holds one batch at most: half of it is collected while the other half is committed, so a killed process loses no
    more than that. A batch is full after so many rows, bytes or seconds. Leaving the block commits the rest; when the
    block raises, what was added is committed too, so that a restart encodes nothing twice.
    """

    def __init__(
        self,
        table: Table,
        *,
        batch_rows: int,
        batch_bytes: int,
        batch_s: float = float("inf"),
        waits_s: Sequence[float] = RETRY_WAITS_S,
    ) -> None:
        self._table = Table.open(table.uri)  # its own handle: the caller's stays at its version
        self._commit_rows, self._commit_bytes, self._commit_s = batch_rows // 2, batch_bytes // 2, batch_s / 2
        self._waits_s, self._since = waits_s, time.monotonic()
        self._pending: dict[str, Row] = {}
        self._pending_bytes = 0
        self._names = set(attribute_names(table.kind))
        self._known = _Known(self._table)
        self._thread = ThreadPoolExecutor(1, "store-write")
        self._commit: Future[int] | None = None
        self.inserted = 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except CacheloomError as failure:
            error.add_note(f"rows added before this could not be committed either: {failure}")

    def add(self, row: Row) -> None:
        """Take a row; a key that waits in the batch already is ignored. The payload is copied unless it is `bytes`.

        Raises:
            DataError, SetupError: an earlier batch could not be committed.
        """
        if self._commit is not None and self._commit.done():
            self._settle()
        if row.key in self._pending:
            return
        if set(row.attributes) != self._names:
            raise ValueError(f"attributes of a {self._table.kind} row are {self._names}, got {set(row.attributes)}")
        payload = row.payload if isinstance(row.payload, bytes) else bytes(row.payload)
        self._pending[row.key] = Row(row.key, payload, row.attributes)
        self._pending_bytes += len(payload)
        full = len(self._pending) >= self._commit_rows or self._pending_bytes >= self._commit_bytes
        if full or time.monotonic() - self._since >= self._commit_s:
            self._hand_over()

    def close(self) -> None:
        """Commit what waits.

        Raises:
            DataError, SetupError: a batch could not be committed.
        """
        try:
            self._hand_over()
            self._settle()
        finally:
            self._thread.shutdown()

    def _hand_over(self) -> None:
        self._settle()
        self._since = time.monotonic()
        if self._pending:
            self._commit = self._thread.submit(self._insert, list(self._pending.values()))
            self._pending, self._pending_bytes = {}, 0

    def _settle(self) -> None:
        """Wait for the commit under way and count it, or raise what it raised."""
        commit, self._commit = self._commit, None
        if commit is not None:
            self.inserted += commit.result()

    def _insert(self, rows: Sequence[Row]) -> int:
        batch = _Batch(rows)

        def once() -> int:
            try:
                return _insert_missing(self._known, batch)
            except (OSError, ValueError, RuntimeError) as error:
                # Lance does not see a short write, and then misses the bytes
                if "exceeds blob object size" not in str(error):
                    raise
                raise OSError(errno.ENOSPC, "no space left: a file written just now is cut short") from error

        return patiently(once, uri=self._table.uri, waits_s=self._waits_s, before_retry=self._table.reopen)


class _Known:
    """The keys of a table's newest version, read fragment by fragment as it grows."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.fragments: dict[int, lance.fragment.FragmentMetadata] = {}
        self._keys = keyset.of([])
        self._own: set[str] = set()  # files of ours, whose keys need not be read

    def look(self) -> None:
        """Move to the newest version: new fragments are read, and all where one is gone or has lost rows."""
        dataset = self.table.dataset
        dataset.checkout_latest()
        there = {fragment.fragment_id: fragment for fragment in dataset.get_fragments()}
        if any(
            number not in there or there[number].deletion_file() != _dropped(old)
            for number, old in self.fragments.items()
        ):
            self.fragments, self._keys, self._own = {}, keyset.of([]), set()
        new = [fragment for number, fragment in there.items() if number not in self.fragments]
        if unread := [fragment for fragment in new if fragment.data_files()[0].path not in self._own]:
            batches = dataset.scanner(columns=[KEY], fragments=unread).to_reader()
            self._add(keyset.of(*(batch.column(KEY) for batch in batches)))
        self.fragments |= {fragment.fragment_id: fragment.metadata for fragment in new}

    def missing(self, rows: Sequence[Row]) -> list[Row]:
        """Rows whose keys are not there."""
        _, there = keyset.find(keyset.array(row.key for row in rows), self._keys)
        return [row for row, is_there in zip(rows, there.tolist(), strict=True) if not is_there]

    def add(self, rows: Sequence[Row], files: Sequence[lance.fragment.FragmentMetadata]) -> None:
        """These rows were committed in these files."""
        self._own |= {file.path for fragment in files for file in fragment.files}
        self._add(keyset.of(row.key for row in rows))

    def _add(self, keys: Keys) -> None:
        self._keys = np.insert(self._keys, np.searchsorted(self._keys, keys), keys)


class _Batch:
    """Rows on their way into a table, and the files that hold those of them that were missing when last looked for."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self._written: list[Row] = []
        self._files: list[lance.fragment.FragmentMetadata] = []

    def files(self, missing: list[Row], table: Table) -> list[lance.fragment.FragmentMetadata]:
        """Files of the missing rows: those of before unless rows came or went meanwhile."""
        if missing != self._written:
            rows = _arrow(missing, table.kind)
            self._files = lance.fragment.write_fragments(rows, table.dataset, mode="append")
            self._written = missing
        return self._files


def _insert_missing(known: _Known, batch: _Batch) -> int:
    """Insert the rows whose keys are not there, in one commit; returns how many. Keys must differ among the rows."""
    for _ in range(CONFLICTS):
        known.look()
        if not (missing := known.missing(batch.rows)):
            return 0
        files, dataset = batch.files(missing, known.table), known.table.dataset
        everything = lance.LanceOperation.Merge([*known.fragments.values(), *files], dataset.lance_schema)
        try:
            known.table.dataset = lance.LanceDataset.commit(dataset, everything, dataset.version, max_retries=0)
        except OSError as error:
            if not CONFLICT.search(str(error)):
                raise
            refused = error
            time.sleep(random.uniform(0, CONFLICT_WAIT_S))
        else:
            known.add(missing, files)
            return len(missing)
    raise refused


def _arrow(rows: Sequence[Row], kind: str) -> pa.Table:
    columns = {
        KEY: pa.array([row.key for row in rows], pa.string()),
        CHECKSUM: pa.array([checksum(row) for row in rows], pa.uint64()),
        PAYLOAD: lance.blob_array([row.payload for row in rows]),
    }
    schema = physical_schema(kind)
    for name in attribute_names(kind):
        columns[name] = pa.array([row.attributes[name] for row in rows], schema.field(name).type)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _dropped(fragment: lance.fragment.FragmentMetadata) -> str | None:
    """Which rows of a fragment are dropped, by the name of the file that says so."""
    return None if fragment.deletion_file is None else str(fragment.deletion_file.path(fragment.id))
