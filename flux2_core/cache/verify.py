"""Whether a cache is whole: every file and row of it compared with what was written, some rows with a new encoding.

Damage is listed, never raised: a table that cannot be opened is one entry, and the rest is still looked at. All rows of
the tables are read, those of other configurations too, for they share files.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

from flux2_core.cache import leases, prompt_rows, sealed
from flux2_core.cache.index import Index, TableRef, read_index
from flux2_core.cache.keys import text_key
from flux2_core.config.sections import Config
from flux2_core.data import texts as data_texts
from flux2_core.data.samples import needed_rows
from flux2_core.errors import DataError
from flux2_core.model.folder import ModelFolder
from flux2_core.model.tensor_bytes import from_bytes
from flux2_core.run.folder import RunFolder
from flux2_core.store import mend, objects, parquet, schemas, seals, upkeep
from flux2_core.store.reader import Reader
from flux2_core.store.table import Table

READ_AT_ONCE = 16  # a dev caption of raw rows is up to 16 MB
TOLERANCE = {"fp32": 1e-4, "fp16": 0.01, "bf16": 0.03}  # relative; other batches and devices sum in another order
CHANGED = "the file is not what was written"


def verify_rows(
    config: Config, model: ModelFolder, *, progress: Callable[[str, int, int], None] = lambda *_: None
) -> dict[str, Any]:
    """Read everything that the cache holds for this configuration; list what is corrupt and what is missing.

    `progress` gets the table's kind, how many of its rows are read, and how many there are.

    Raises:
        DataError: nothing is cached for it.
    """
    corrupt = [_entry("file", uri, uri, uri, CHANGED) for uri in _changed_files(config)]
    try:
        index = read_index(config, model)
        samples = parquet.read_parquet(index.samples)
    except (DataError, FileNotFoundError) as error:
        if not corrupt:
            raise
        corrupt.append(_entry("index", corrupt[0]["uri"], "", "all rows", str(error)))
        return {"rows": 0, "corrupt": corrupt, "missing": []}
    missing: list[dict[str, str]] = []
    rows = 0
    latents = {key: of + row["id"] for row in samples.to_pylist() for of, key in needed_rows(row)}
    tables = {"text": (index.text, _texts(config, index, samples)), "latents": (index.latents, latents)}
    for kind, (table, wanted) in tables.items():
        corrupt += [_entry("file", table.uri, uri, uri, CHANGED) for uri in seals.damaged(table.uri)]
        read = _Rows(table, wanted, functools.partial(progress, kind))
        corrupt += [_entry(what, table.uri, key, wanted.get(key, key), reason) for what, key, reason in read.corrupt()]
        missing += [{"uri": table.uri, "key": key, "of": wanted[key]} for key in read.missing]
        rows += len(read.places)
    return {"rows": rows, "corrupt": corrupt, "missing": missing}


def chosen(config: Config, model: ModelFolder, count: int) -> tuple[list[str], Any]:
    """So many texts and rows of the samples table, drawn by the tables' versions: other rows after each `cache`."""
    index = read_index(config, model)
    samples = parquet.read_parquet(index.samples)
    dice = random.Random(f"{index.samples} {index.text.version} {index.latents.version}")
    texts = data_texts.texts(config, samples)
    places = sorted(dice.sample(range(samples.num_rows), min(count, samples.num_rows)))
    return dice.sample(texts, min(count, len(texts))), samples.take(places)


def compare(config: Config, model: ModelFolder, again: dict[str, TableRef]) -> tuple[int, list[dict[str, str]]]:
    """Compare rows that were encoded again, in tables by kind, with the cached ones.

    Returns:
        How many rows were compared, and an entry for each that differs by more than `TOLERANCE`.
    """
    index = read_index(config, model)
    count, differing = 0, []
    for stored, table in ((index.text, again[schemas.KIND_TEXT]), (index.latents, again[schemas.KIND_LATENTS])):
        made = Table.open(table.uri)
        keys = list(made.keys())
        ours = Reader(Table.open(stored.uri, version=stored.version), keys).fetch(keys)
        for old, new in zip(ours, Reader(made, keys).fetch(keys), strict=True):
            error = _difference(old.payload, new.payload, made.kind, stored.fingerprint)
            made_in = (stored.fingerprint[name] for name in ("dtype", "precision") if name in stored.fingerprint)
            allowed = max(map(TOLERANCE.__getitem__, made_in))
            if error > allowed:
                reason = f"encoded again it differs by {error:.2%}, allowed is {allowed:.2%}"
                of = str(old.attributes.get(schemas.TEXT, old.key))
                differing.append(_entry("row", stored.uri, old.key, of, reason))
        count += len(keys)
    return count, differing


def drop(corrupt: list[dict[str, str]]) -> int:
    """Take out all that is corrupt, so that the next `cache` makes it again; returns how many entries were settled.

    Corrupt rows are deleted, damaged files of a table are mended around (`store.mend`), other files removed.
    """
    tables: dict[str, tuple[list[str], list[str]]] = {}
    for entry in corrupt:
        if not entry["uri"].endswith(".lance"):
            objects.delete(entry["uri"])
            continue
        files, rows = tables.setdefault(entry["uri"], ([], []))
        if entry["kind"] != "version":  # which mending finds by itself
            (files if entry["kind"] == "file" else rows).append(entry["key"])
    for uri, (files, rows) in tables.items():
        mend.mend(uri, files)
        if rows and any(objects.listing(uri)):
            upkeep.drop(uri, rows)
            seals.seal(uri)
    return len(corrupt)


class _Rows:
    """Reads every row of a table, at the version that training uses and at the newest one, no place twice."""

    def __init__(self, table: TableRef, wanted: dict[str, str], progress: Callable[[int, int], None]) -> None:
        self._table, self._wanted, self._progress = table, wanted, progress
        self.missing: list[str] = []
        self.places: set[tuple[str, int]] = set()

    def corrupt(self) -> Iterator[tuple[str, str, str]]:
        """Rows by key, and versions of the table, that cannot be read: ("row" or "version", which, reason)."""
        newest = None
        for version in (self._table.version, None):
            try:
                table = Table.open(self._table.uri, version=version)
                if table.version == newest:
                    return
                newest = table.version
                reader = Reader(table, table.keys())
            except DataError as error:
                yield "version", f"version {version}" if version else "the newest version", str(error)
                continue
            present = reader.keys()
            if version is not None:
                self.missing = sorted(self._wanted.keys() - present)
            unread = [key for key in present if reader.where(key) not in self.places]
            for start in range(0, len(unread), READ_AT_ONCE):
                self._progress(start, len(unread))
                yield from (("row", *found) for found in _corrupt(reader, unread[start : start + READ_AT_ONCE]))
            self._progress(len(unread), len(unread))
            self.places |= {reader.where(key) for key in present}


def _corrupt(reader: Reader, keys: list[str]) -> Iterator[tuple[str, str]]:
    """Rows are read together, singly where one fails."""
    try:
        reader.fetch(keys)
    except DataError as error:
        if len(keys) == 1:
            yield keys[0], str(error)
        else:
            for key in keys:
                yield from _corrupt(reader, [key])


def _changed_files(config: Config) -> Iterator[str]:
    """Indexes, leases, samples tables and the run's quarantine, as far as they are not what was written."""
    run = RunFolder(config)
    places = [objects.join(config.output.cache, name) for name in ("samples", leases.FOLDER)]
    files = [uri for place in places for uri, _ in objects.listing(place)]
    for uri in [*files, *(str(path) for path in (run.index, run.quarantine) if path.is_file())]:
        if uri.endswith(".parquet"):
            try:
                parquet.read_parquet(uri)
            except DataError:
                yield uri
        elif uri.endswith(".json") and sealed.decode(objects.read(uri)) is None:
            yield uri


def _texts(config: Config, index: Index, samples: Any) -> dict[str, str]:
    wanted = {text_key(index.text.fingerprint, text): text for text in data_texts.texts(config, samples)}
    return wanted | ({prompt_rows.PAD_KEY: "the pad row"} if prompt_rows.ragged(index.text.fingerprint) else {})


def _difference(old: bytes | memoryview, new: bytes | memoryview, kind: str, fingerprint: dict[str, Any]) -> float:
    """Relative difference of two payloads of one kind of table: 0 where the bytes are equal."""
    if old == new:
        return 0.0
    if len(old) != len(new):
        return float("inf")
    if kind == schemas.KIND_TEXT:
        a, b = (prompt_rows.decode(payload, fingerprint).double() for payload in (old, new))
    else:
        a, b = (from_bytes(payload, dtype=fingerprint["dtype"], width=1).double() for payload in (old, new))
    error = float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b).clamp_min(1e-12))
    return error if error == error else float("inf")


def _entry(kind: str, uri: str, key: str, of: str, reason: str) -> dict[str, str]:
    return {"kind": kind, "uri": uri, "key": key, "of": of, "reason": reason}
