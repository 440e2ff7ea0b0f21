"""Random access to a table by key, every row verified."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from flux2_core import objects, tables
from flux2_core.errors import DataError
from flux2_core.rows import Row, attribute_names, checksum
from flux2_core.storage_faults import RETRY_WAITS_S, patiently
from flux2_core.tables import CHECKSUM, KEY

if TYPE_CHECKING:
    from flux2_core.store import Table

REMOTE_THREADS = 8  # at 30 ms a round trip one thread reads 23 MB/s, eight read 360 (design.md, Data plane)


class Reader:
    """Random access by key: keys are resolved to stable row ids once, rows are verified on every read.

    Thread-safe. Holds keys, ids, checksums and attributes of the wanted rows, never payloads.
    """

    def __init__(self, table: Table, keys: Iterable[str], *, waits_s: Sequence[float] = RETRY_WAITS_S) -> None:
        self.table = table
        self._waits_s = waits_s
        wanted = dict.fromkeys(keys)
        names = attribute_names(table.kind)
        part = patiently(
            lambda: table.select(wanted, [KEY, CHECKSUM, *names], row_ids=True), uri=table.uri, waits_s=waits_s
        ).combine_chunks()
        self._ids: np.ndarray[Any, np.dtype[np.uint64]] = part.column(tables.ROW_ID).to_numpy()
        self._sums: np.ndarray[Any, np.dtype[np.uint64]] = part.column(CHECKSUM).to_numpy()
        self._attributes = part.select(names)
        self._place = {key: place for place, key in enumerate(part.column(KEY).to_pylist())}
        self.missing = [key for key in wanted if key not in self._place]
        self._pool = ThreadPoolExecutor(REMOTE_THREADS, "store-read") if objects.is_remote(table.uri) else None

    def fetch(self, keys: Sequence[str]) -> list[Row]:
        """Rows in the order of the keys (which may repeat); payloads are read-only views, no copy is made.

        Raises:
            DataError: a row is missing or corrupt; names the key and the table.
        """
        places = [self._at(key) for key in keys]
        if self._pool is None or len(places) < 2:
            return self._rows(keys, places)
        step = -(-len(places) // REMOTE_THREADS)
        starts = range(0, len(places), step)
        parts = self._pool.map(
            self._rows, (keys[at : at + step] for at in starts), (places[at : at + step] for at in starts)
        )
        return list(itertools.chain.from_iterable(parts))

    def _at(self, key: str) -> int:
        place = self._place.get(key)
        if place is None:
            raise DataError(f"{self.table.uri}: no row {key} (version {self.table.version}); run `cacheloom cache`")
        return place

    def _rows(self, keys: Sequence[str], places: Sequence[int]) -> list[Row]:
        if not places:
            return []
        attributes = self._attributes.take(pa.array(places)).to_pylist()
        rows = []
        for key, place, payload, values in zip(keys, places, self._payloads(keys, places), attributes, strict=True):
            row = Row(key, memoryview(payload), values)
            if checksum(row) != int(self._sums[place]):
                raise self._corrupt(key, "checksum differs")
            rows.append(row)
        return rows

    def _payloads(self, keys: Sequence[str], places: Sequence[int]) -> list[bytes]:
        ids = [int(self._ids[place]) for place in places]

        try:
            found = patiently(
                lambda: self.table.payloads(ids),
                uri=self.table.uri,
                waits_s=self._waits_s,
                before_retry=self.table.reopen,
            )
        except DataError as error:
            if len(places) == 1:
                raise self._corrupt(keys[0], str(error)) from error
            # one bad row fails the whole batch: read them one at a time to name it
            return [self._payloads([key], [place])[0] for key, place in zip(keys, places, strict=True)]
        if len(found) != len(places) or any(payload is None for payload in found):
            raise self._corrupt(keys[0] if len(keys) == 1 else f"among {', '.join(keys)}", "no payload")
        return [payload for payload in found if payload is not None]

    def _corrupt(self, key: str, why: str) -> DataError:
        return DataError(
            f"{self.table.uri}: row {key} is corrupt ({why}); run `cacheloom verify`, then `cacheloom cache` "
            "writes the row again once it is dropped"
        )
