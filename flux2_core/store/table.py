"""Lance tables of key -> bytes in which a row exists exactly once, whoever writes.

A key is a hash of everything its bytes depend on, so a row never changes: a writer inserts what is missing and leaves
the rest alone (`flux2_core.store.writer`), without a coordinator. Lance is not fork-safe: use threads or spawned
processes. Measured (2 cores, pylance 14.0.2): `read_blobs` is 1.3 x as fast as `take_blobs`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lance
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flux2_core.errors import DataError
from flux2_core.store import hashing, keyset, objects, schemas
from flux2_core.store.faults import RETRY_WAITS_S, explained, patiently
from flux2_core.store.hashing import first_difference
from flux2_core.store.keyset import Keys, Some
from flux2_core.store.row import SCHEMAS, attribute_names
from flux2_core.store.schemas import KEY, PAYLOAD

BORN = "_row_created_at_version"  # Lance's own column, where row ids are stable
SCAN_ROWS = 65_536  # keys held at a time while scanning: about 10 MB
SPARE_FRAGMENTS = 1_000  # a scan of so many takes 0.4 s of CPU; to write one GB again takes 4
ROWS_PER_FRAGMENT = 4_096  # of a compacted table: 4 GB of latents, a size that a rewrite can still redo


class Table:
    """A table at one immutable version; later commits are seen after `checkout_latest` only."""

    def __init__(self, uri: str, dataset: lance.LanceDataset) -> None:
        self.uri = uri
        self.dataset = dataset
        self.kind, self.fingerprint = schemas.read_identity(uri, dataset.schema_metadata)

    @classmethod
    def open_or_create(
        cls, uri: str, *, kind: str, fingerprint: Mapping[str, Any], proof: Callable[[], dict[str, Any]] | None = None
    ) -> Table:
        """Open the newest version, or create an empty table; safe when several processes do so at once.

        A table that is made gets the proof beside its fingerprint.

        Raises:
            DataError: a table with another kind, fingerprint or contract version is there.
            SetupError: the folder or store cannot be written.
        """
        dataset = _dataset_or_none(uri)
        if dataset is None:
            dataset = _create(uri, kind, schemas.identity(kind, fingerprint, proof and proof()))
        table = cls(uri, dataset)
        if table.kind != kind:
            raise DataError(f"{uri}: holds {table.kind} rows, {kind} rows were wanted; give each kind its own URI")
        if difference := first_difference(json.loads(hashing.canonical(dict(fingerprint))), table.fingerprint):
            raise DataError(
                f"{uri}: its rows were encoded differently ({difference}); undo that, or use another output.cache"
            )
        return table

    @classmethod
    def open(cls, uri: str, *, version: int | None = None) -> Table:
        """Open a version (default: the newest).

        Raises:
            DataError: no such table or version, or one of another contract version.
        """
        dataset = _dataset_or_none(uri, version=version)
        if dataset is None:
            wanted = "" if version is None else f" at version {version}"
            raise DataError(f"{uri}: no table there{wanted}; run `cacheloom cache` first, or correct output.cache")
        return cls(uri, dataset)

    @property
    def version(self) -> int:
        """The version that this object reads."""
        return int(self.dataset.version)

    @property
    def proof(self) -> dict[str, Any] | None:
        """What the libraries of its rows made of fixed inputs (`cache.proofs`); None: written before there were proofs.

        Raises:
            DataError: it is damaged.
        """
        if (said := self.dataset.schema_metadata.get(schemas.META_PROOF)) is None:
            return None
        try:
            return dict(json.loads(said))
        except ValueError:
            raise DataError(f"{self.uri}: its proof is unreadable: damaged; remove the table, cache again") from None

    def prove(self, proof: Mapping[str, Any]) -> dict[str, Any]:
        """Commit a proof beside the fingerprint of a table from before; return the one that stands there then.

        Of two at once the first one's stands: Lance refuses the second.
        """

        def once() -> dict[str, Any]:
            self.dataset.checkout_latest()
            if self.proof is None:
                self.dataset.update_schema_metadata({schemas.META_PROOF: hashing.canonical(dict(proof))})
            return self.proof or {}

        return patiently(once, uri=self.uri, waits_s=RETRY_WAITS_S)

    def checkout_latest(self) -> None:
        """Move to the newest version."""
        with explained(self.uri):
            self.dataset.checkout_latest()

    def reopen(self) -> None:
        """A fresh handle at the same version, which reads the credentials anew."""
        self.dataset = lance.dataset(self.uri, version=self.version, storage_options=options(self.uri))

    def rows(self) -> int:
        """Number of rows."""
        with explained(self.uri):
            return int(self.dataset.count_rows())

    def keys(self) -> Iterator[str]:
        """Every key, in no particular order."""
        with explained(self.uri):  # the names of damaged rows may be no text
            for batch in self._scan([KEY]):
                yield from batch.column(KEY).to_pylist()

    def holds(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Which of the keys have a row; reads the key column only."""
        order = np.argsort(keys)
        wanted, found = keys[order], np.zeros(keys.size, np.bool_)
        for batch in self._scan([KEY]) if keys.size else ():
            places, there = keyset.find(keyset.array(batch.column(KEY)), wanted)
            found[order[places[there]]] = True
        return found

    def present(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys that have a row."""
        wanted = keyset.of(keys)
        return {key.decode() for key in wanted[self.holds(wanted)].tolist()}

    def attributes(self, keys: Some) -> Iterator[dict[str, Any]]:
        """Key and attributes of the rows that are present, in no particular order."""
        for batch in self._among(keyset.of(keys), [KEY, *attribute_names(self.kind)]):
            yield from batch.to_pylist()

    def select(self, keys: Keys, columns: list[str]) -> tuple[Keys, pa.Table]:
        """Those of sorted keys that have a row, and the named columns of these rows, their stable ids and addresses.

        Of the payload its description (where its bytes lie).
        """
        schema = pa.schema([self.dataset.schema.field(name) for name in columns])
        for name in (schemas.ROW_ID, schemas.ROW_ADDRESS):
            schema = schema.append(pa.field(name, pa.uint64()))
        found, parts = [keyset.WIDEST], list[pa.RecordBatch]()
        for batch in self._among(keys, [KEY, *columns], places=True):
            found.append(keyset.array(batch.column(KEY)))  # a third less than in Arrow's own form
            parts.append(batch.select(schema.names))
        return np.concatenate(found), pa.Table.from_batches(parts) if parts else schema.empty_table()

    def head(self, columns: list[str], count: int) -> list[dict[str, Any]]:
        """Some rows' columns, the payload not among them."""
        with explained(self.uri):
            return list(self.dataset.scanner(columns=columns, limit=count).to_table().to_pylist())

    def data_files(self) -> dict[int, list[str]]:
        """Names of the data files of each fragment, by its number."""
        with explained(self.uri):
            parts = self.dataset.get_fragments()
            return {part.fragment_id: [file.path for file in part.data_files()] for part in parts}

    def births(self) -> Iterator[tuple[Keys, npt.NDArray[np.int64]]]:
        """Every key with the version that its row came with, by the batch."""
        for batch in self._scan([KEY, BORN]):
            yield keyset.array(batch.column(KEY)), batch.column(BORN).to_numpy()

    def written_s(self) -> float:
        """When this version was committed, in seconds since 1970."""
        return float(self.dataset.get_version()["timestamp"].timestamp())

    def compaction_due(self) -> bool:
        """Whether `merge` would pay: more than twice the fragments that the rows need, and some more."""
        with explained(self.uri):
            return len(self.dataset.get_fragments()) > 2 * (self.rows() // ROWS_PER_FRAGMENT) + SPARE_FRAGMENTS

    def version_before(self, moment_s: float) -> int:
        """The newest version from that moment (seconds since 1970) or before; 0 where none is left."""
        with explained(self.uri):
            known = self.dataset.versions()
        return max((int(each["version"]) for each in known if each["timestamp"].timestamp() <= moment_s), default=0)

    def payloads(self, row_ids: list[int]) -> list[bytes | None]:
        """Payloads by stable row id, in that order; unverified: `Reader` compares checksums."""
        with explained(self.uri):
            return [payload for _, payload in self.dataset.read_blobs(PAYLOAD, ids=row_ids, preserve_order=True)]

    def _among(self, keys: Keys, columns: list[str], *, places: bool = False) -> Iterator[pa.RecordBatch]:
        for batch in self._scan(columns, places=places) if keys.size else ():
            _, wanted = keyset.find(keyset.array(batch.column(KEY)), keys)
            if wanted.any():
                yield batch.filter(pa.array(wanted))

    def _scan(self, columns: list[str], *, places: bool = False) -> Iterator[pa.RecordBatch]:
        with explained(self.uri):
            scanner = self.dataset.scanner(
                columns=columns, batch_size=SCAN_ROWS, with_row_id=places, with_row_address=places
            )
            yield from scanner.to_reader()


def _create(uri: str, kind: str, identity: Mapping[str, str]) -> lance.LanceDataset:
    """Commit version 1, or return the table that another process created first.

    `max_retries=0` makes the commit strict. `lance.write_dataset(mode="create")` is not: a loser of the race was seen
    to commit its empty table as version 2, over the winner's (8 threads, 1 in 3 races on S3).
    """
    schema = physical_schema(kind).with_metadata(dict(identity))

    def commit() -> lance.LanceDataset:
        try:
            if not objects.is_remote(uri):
                Path(uri).parent.mkdir(parents=True, exist_ok=True)
            return lance.LanceDataset.commit(
                uri,
                lance.LanceOperation.Overwrite(schema, []),
                max_retries=0,
                enable_stable_row_ids=True,
                storage_options=options(uri),
            )
        except (OSError, ValueError, RuntimeError):
            if (dataset := _dataset_or_none(uri)) is not None:
                return dataset
            raise

    return patiently(commit, uri=uri, waits_s=RETRY_WAITS_S)


def _dataset_or_none(uri: str, *, version: int | None = None) -> lance.LanceDataset | None:
    def read() -> lance.LanceDataset | None:
        try:
            return lance.dataset(uri, version=version, storage_options=options(uri))
        except (OSError, ValueError) as error:
            if "not found" in str(error).lower():
                return None
            raise

    return patiently(read, uri=uri, waits_s=RETRY_WAITS_S)


def options(uri: str) -> dict[str, str] | None:
    """What Lance needs to reach a table: nothing on a local folder."""
    return objects.storage_options() if objects.is_remote(uri) else None


def physical_schema(kind: str) -> pa.Schema:
    """The kind's schema with the payload as Lance's blob type: rows up to 1 GB packed into shared .blob files."""
    schema = SCHEMAS[kind]()
    place = schema.get_field_index(PAYLOAD)
    return schema.set(place, lance.blob_field(PAYLOAD, dedicated_size_threshold=1 << 30))
