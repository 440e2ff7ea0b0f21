"""Random access to a table by key, every row verified, at the speed of reading plain files.

Where a row's bytes lie is looked up once: Lance describes each blob by kind, file and position, and its files never
change. A local row is then one `preadv` into the caller's memory, hashed while it is in the core's cache. Measured
(2 MB rows, page cache warm): 0.47 ms of CPU into memory that is used again, 1.1 ms for `Path.read_bytes`, which asks
the system for fresh pages each time. A remote row is one ranged request, on several threads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from flux2_core.errors import DataError
from flux2_core.store import keyset, objects, schemas
from flux2_core.store.faults import RETRY_WAITS_S, explained, patiently
from flux2_core.store.keyset import Keys, Some
from flux2_core.store.row import Row, attribute_names, checksum, head
from flux2_core.store.schemas import CHECKSUM, PAYLOAD

if TYPE_CHECKING:
    from flux2_core.store.table import Table

REMOTE_THREADS = 8  # at 30 ms a round trip one thread reads 23 MB/s, eight read 360 (design.md, Data plane)
READ_BYTES = 1 << 18  # read, then hashed, before the next: half a core's second-level cache
INLINE, PACKED = 0, 1  # kinds of Lance's blob descriptors: bytes inside the data file, or in a .blob file beside it
Integers = np.ndarray[Any, np.dtype[Any]]


class Reader:
    """Random access by key: keys are resolved to places once, rows are verified on every read.

    Keys in an array must be sorted. Thread-safe. Holds keys, places, checksums and attributes of the wanted rows, never
    payloads: 120 bytes a row, and its text.
    """

    def __init__(self, table: Table, keys: Some, *, waits_s: Sequence[float] = RETRY_WAITS_S) -> None:
        self.table = table
        self._waits_s, self._remote = waits_s, objects.is_remote(table.uri)
        wanted = keys if isinstance(keys, np.ndarray) else keyset.of(keys)
        names = attribute_names(table.kind)
        self._keys, part = patiently(
            lambda: table.select(wanted, [CHECKSUM, PAYLOAD, *names]), uri=table.uri, waits_s=waits_s
        )
        self._order = np.argsort(self._keys, kind="stable")
        with explained(table.uri):
            self._ids: Integers = part.column(schemas.ROW_ID).to_numpy()
            self._sums: Integers = part.column(CHECKSUM).to_numpy()
            self._columns = {name: part.column(name) for name in names}
            self._locate(part.drop_columns(names))
        self.missing = [key.decode() for key in wanted[~self._find(wanted)[1]].tolist()]
        self._pool = ThreadPoolExecutor(REMOTE_THREADS, "store-read") if self._remote else None

    def keys(self) -> set[str]:
        """Wanted keys that have a row."""
        return {key.decode() for key in self._keys.tolist()}

    def where(self, key: str) -> tuple[str, int]:
        """File and first byte of a row's payload."""
        place = self._at(key)
        return self._files[self._file[place]] or f"row {self._ids[place]}", int(self._position[place])

    def size(self, key: str) -> int:
        """Bytes of a row's payload.

        Raises:
            DataError: there is no such row, or its recorded place is outside its file.
        """
        place = self._at(key)
        if not self._remote and not self._inside[place]:
            raise self._corrupt(key, f"its place is outside {self._files[self._file[place]]}, or that file is gone")
        return int(self._size[place])

    def attributes(self, key: str) -> dict[str, str | int]:
        """A row's columns beside key, checksum and payload; unverified until the row is fetched.

        Raises:
            DataError: there is no such row, or its text is damaged.
        """
        place = self._at(key)
        try:
            return {name: column[place].as_py() for name, column in self._columns.items()}
        except UnicodeDecodeError as error:
            raise self._corrupt(key, "its text is none") from error

    def fetch(self, keys: Sequence[str]) -> list[Row]:
        """Rows in the order of the keys (which may repeat), each payload in memory of its own.

        Raises:
            DataError: a row is missing or corrupt; names the key and the table.
        """
        if self._pool is None:
            return self.fetch_into(keys, [np.empty(self.size(key), np.uint8).data for key in keys])
        return list(self._pool.map(self._from_afar, keys))

    def fetch_into(self, keys: Sequence[str], buffers: Sequence[memoryview]) -> list[Row]:
        """Fill writable buffers of `size(key)` bytes each (of a batch's tensor, pinned or not); rows hold them.

        Raises:
            DataError: as `fetch`; buffers may then hold anything.
        """
        for key, buffer in zip(keys, buffers, strict=True):
            if len(buffer) != (size := self.size(key)):
                raise ValueError(f"row {key} has {size} bytes, its buffer {len(buffer)}")
        if self._pool is not None:
            rows = self.fetch(keys)
            for row, buffer in zip(rows, buffers, strict=True):
                buffer[:] = row.payload
            return [Row(row.key, buffer, row.attributes) for row, buffer in zip(rows, buffers, strict=True)]
        rows = []
        for key, buffer in zip(keys, buffers, strict=True):
            place, values = self._at(key), self.attributes(key)
            if not self._files[self._file[place]]:
                buffer[:] = self._through_lance([key])[0].payload
            elif self._read(key, place, buffer, xxhash.xxh3_64(head(key, values))) != int(self._sums[place]):
                raise self._corrupt(key, "checksum differs")
            rows.append(Row(key, buffer, values))
        return rows

    def _locate(self, part: pa.Table) -> None:
        """Work out each row's file, position and size.

        A data file is `data/<name>.lance`; the n-th .blob file that belongs to it is `data/<name>/<n>.blob`, n written
        in 32 binary digits, lowest first. Positions count from the start of either file. (pylance 14; every row's
        checksum would tell.)
        """
        self._files: list[str] = []
        if not part.num_rows:
            return
        kind, self._position, self._size, blob = (
            pc.struct_field(part.column(PAYLOAD), name).to_numpy() for name in ("kind", "position", "size", "blob_id")
        )
        fragment = part.column(schemas.ROW_ADDRESS).to_numpy() >> np.uint64(32)
        of = (fragment << np.uint64(2) | kind) << np.uint64(32) | np.where(kind == PACKED, blob, 0).astype(np.uint64)
        each, self._file = np.unique(of, return_inverse=True)
        paths = self.table.data_files()
        self._files = [self._path(paths.get(file >> 34, []), file >> 32 & 3, file % 2**32) for file in each.tolist()]
        if not self._remote:
            known = np.array([bool(file) for file in self._files])[self._file]
            lengths = [os.path.getsize(file) if os.path.isfile(file) else 0 for file in self._files]
            length = np.array(lengths, np.uint64)[self._file]
            self._inside = ~known | ((self._position <= length) & (self._size <= length - self._position))

    def _path(self, data: list[str], kind: int, blob: int) -> str:
        """A blob's file, or nothing where Lance itself must find it: another kind, or columns in several files."""
        if len(data) != 1 or kind not in (INLINE, PACKED):
            return ""
        if kind == INLINE:
            return objects.join(self.table.uri, "data", data[0])
        return objects.join(self.table.uri, "data", data[0].removesuffix(".lance"), f"{blob:032b}"[::-1] + ".blob")

    def _at(self, key: str) -> int:
        (place,), (there,) = self._find(np.array([key.encode()]))
        if not there:
            raise DataError(f"{self.table.uri}: no row {key} (version {self.table.version}); run `cacheloom cache`")
        return int(place)

    def _find(self, keys: Keys) -> tuple[Integers, npt.NDArray[np.bool_]]:
        return keyset.find(keys, self._keys, order=self._order)

    def _read(self, key: str, place: int, buffer: memoryview, hasher: xxhash.xxh3_64) -> int:
        """Read a payload piece by piece and return the row's checksum."""
        file, start, done = self._files[self._file[place]], int(self._position[place]), 0
        try:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                while done < len(buffer):
                    piece = buffer[done : done + READ_BYTES]
                    count = os.preadv(descriptor, [piece], start + done)
                    if not count:
                        raise self._corrupt(key, f"{file} ends too early")
                    hasher.update(piece[:count])
                    done += count
            finally:
                os.close(descriptor)
        except FileNotFoundError as error:
            raise self._gone(file, key) from error
        except OSError as error:
            raise self._corrupt(key, f"{file}: {error.strerror}") from error
        return hasher.intdigest()

    def _from_afar(self, key: str) -> Row:
        """A row by one ranged request: where its bytes lie is known, so that Lance need not ask for that again."""
        place = self._at(key)
        if not (file := self._files[self._file[place]]):
            return self._through_lance([key])[0]
        start, size = int(self._position[place]), int(self._size[place])
        try:
            payload = size and patiently(
                lambda: objects.read(file, span=(start, start + size)), uri=self.table.uri, waits_s=self._waits_s
            )
        except DataError as error:
            raise self._gone(file, key) if isinstance(error.__cause__, FileNotFoundError) else error from error
        row = Row(key, memoryview(payload or b""), self.attributes(key))
        if checksum(row) != int(self._sums[place]):
            raise self._corrupt(key, "checksum differs")
        return row

    def _through_lance(self, keys: Sequence[str]) -> list[Row]:
        rows = []
        for key, payload in zip(keys, self._payloads(keys), strict=True):
            row = Row(key, memoryview(payload), self.attributes(key))
            if checksum(row) != int(self._sums[self._at(key)]):
                raise self._corrupt(key, "checksum differs")
            rows.append(row)
        return rows

    def _payloads(self, keys: Sequence[str]) -> list[bytes]:
        ids = [int(self._ids[self._at(key)]) for key in keys]
        try:
            found = patiently(
                lambda: self.table.payloads(ids),
                uri=self.table.uri,
                waits_s=self._waits_s,
                before_retry=self.table.reopen,
            )
        except DataError as error:
            if len(keys) == 1:
                raise self._corrupt(keys[0], str(error)) from error
            # one bad row fails the whole batch: read them one at a time to name it
            return [self._payloads([key])[0] for key in keys]
        if len(found) != len(keys) or any(payload is None for payload in found):
            raise self._corrupt(keys[0] if len(keys) == 1 else f"among {', '.join(keys)}", "no payload")
        return [payload for payload in found if payload is not None]

    def _gone(self, file: str, key: str) -> DataError:
        return DataError(
            f"{file}: gone, with row {key} in it: somebody removed the cache, or dropped its rows (`gc`), while it was "
            "read; run `cacheloom cache`, then the same again"
        )

    def _corrupt(self, key: str, why: str) -> DataError:
        return DataError(
            f"{self.table.uri}: row {key} is corrupt ({why}); run `cacheloom verify --drop`, then `cacheloom cache`, "
            "which writes it again"
        )
