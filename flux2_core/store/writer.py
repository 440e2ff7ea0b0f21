"""Writing rows: batches collected beside the caller and committed from one background thread, each row exactly once."""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import lance
import pyarrow as pa

from flux2_core.errors import CacheloomError
from flux2_core.store.faults import RETRY_WAITS_S, patiently
from flux2_core.store.row import Row, attribute_names, checksum
from flux2_core.store.schemas import CHECKSUM, KEY, PAYLOAD
from flux2_core.store.table import Table, physical_schema


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
        def once() -> int:
            self._table.dataset.checkout_latest()  # fewer conflicts: each one writes the batch again
            try:
                return _insert_missing(self._table.dataset, rows, kind=self._table.kind)
            except (OSError, ValueError, RuntimeError) as error:
                # Lance does not see a short write, and then misses the bytes
                if "exceeds blob object size" not in str(error):
                    raise
                raise OSError(errno.ENOSPC, "no space left: a file written just now is cut short") from error

        return patiently(once, uri=self._table.uri, waits_s=self._waits_s, before_retry=self._table.reopen)


def _insert_missing(dataset: lance.LanceDataset, rows: Sequence[Row], *, kind: str) -> int:
    """Insert the rows whose keys are not there, in one commit; returns how many. Keys must differ among the rows.

    Reads every fragment's keys, never an index: with one, two writers can insert the same row (decision 0023).
    """
    columns = {
        KEY: pa.array([row.key for row in rows], pa.string()),
        CHECKSUM: pa.array([checksum(row) for row in rows], pa.uint64()),
        PAYLOAD: lance.blob_array([row.payload for row in rows]),
    }
    schema = physical_schema(kind)
    for name in attribute_names(kind):
        columns[name] = pa.array([row.attributes[name] for row in rows], schema.field(name).type)
    batch = pa.table([columns[name] for name in schema.names], schema=schema)
    builder = dataset.merge_insert(KEY).when_not_matched_insert_all().use_index(False).conflict_retries(50)
    return int(builder.execute(batch)["num_inserted_rows"])
