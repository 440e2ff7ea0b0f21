"""The inventory: what was found in each picture of a data set, kept in the cache, so that a repeat opens what changed.

A row's key is a hash of all that an inspection depends on: the code and libraries that look, the picture's URI, and its
size and time (on a store its ETag; in a container the stamp in its URI). What is not found by its key is read. Other
bytes of the same size and time are not seen here: encoding sees them by their sha256, and `--trust-nothing` does.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flux2_core.config.places import beside
from flux2_core.config.sections import Config
from flux2_core.data.pictures import load
from flux2_core.data.pictures.load import Inspected
from flux2_core.data.sources.read import plain
from flux2_core.errors import DataError
from flux2_core.store import hashing, keyset, objects, parquet
from flux2_core.store.keyset import Keys

FOLDER = "inventory"
KEY_BYTES = 16
AT_ONCE = 4096  # rows that are Python objects at a time; a row of the table takes 125 bytes
SCHEMA = pa.schema([
    ("key", pa.binary(KEY_BYTES)),
    ("sha256", pa.binary(32)),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("problem", pa.string()),
    ("warnings", pa.list_(pa.string())),
    ("look", pa.binary()),
])  # fmt: skip
Mapper = Callable[[Callable[[str], Inspected], list[str]], Iterable[Inspected]]


class Inventory:
    """What is known of one data set's files, and what is found of them now."""

    def __init__(self, config: Config, ordinal: int, *, trusting: bool) -> None:
        """Open what the last `cache` left, unless nothing is to be trusted.

        Args:
            config: its cache, data set and `latents`.
            ordinal: of the data set.
            trusting: whether what is known is used.
        """
        data, self._latents = config.data[ordinal], config.latents
        folders = (data.masks, *data.references, data.rejected)
        self._roots = [data.path, *(beside(data.path, folder) for folder in folders if folder)]
        name = hashing.digest([self._roots, self._latents.decoder, self._latents.background])
        self.uri = objects.join(config.output.cache, FOLDER, f"{name[:32]}.parquet")
        self.damage: str | None = None
        """Why what was left there cannot be used."""
        self._known = SCHEMA.empty_table()
        try:
            if trusting:
                self._known = parquet.read_parquet(self.uri).cast(SCHEMA)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (DataError, OSError, ValueError):  # ValueError: of another schema
            self.damage = "damaged or unreadable: every picture is read again"
        self._hits = np.empty(0, np.int64)
        self._fresh: list[pa.RecordBatch] = []
        self._rows: list[dict[str, Any]] = []

    def looked(self, files: list[str], *, decode: bool, mapper: Mapper) -> Iterator[Inspected]:
        """What is in each file, in order; those that are not known are looked at."""
        look = partial(load.inspect, decode=decode, latents=self._latents)
        keys = self._keys(files, decode=decode)
        places = self._places(keys)
        self._hits = np.unique(places[places >= 0])
        found = iter(mapper(look, [file for file, place in zip(files, places, strict=True) if place < 0]))
        for start in range(0, len(files), AT_ONCE):
            part = places[start : start + AT_ONCE]
            known = map(_seen, self._known.take(part[part >= 0]).to_pylist())
            for place, key in zip(part, keys[start : start + AT_ONCE], strict=True):
                yield next(known) if place >= 0 else self._add(key, next(found))

    def write(self) -> None:
        """Leave what is known by now in the cache, for the next time."""
        self._flush()
        if not self._fresh and len(self._hits) == self._known.num_rows and not self.damage:
            return
        table = pa.concat_tables([self._known.take(self._hits), pa.Table.from_batches(self._fresh, SCHEMA)])
        _, first = np.unique(_column(table), return_index=True)  # sorted, and each once
        parquet.write_parquet(self.uri, table.take(first), {})

    def _add(self, key: bytes, seen: Inspected) -> Inspected:
        if key and seen.sha256:  # what could not be read now may be readable later, with nothing changed
            whole = key.ljust(KEY_BYTES, b"\0"), bytes.fromhex(seen.sha256)
            row = (*whole, seen.width, seen.height, seen.problem, seen.warnings, seen.look)
            self._rows.append(dict(zip(SCHEMA.names, row, strict=True)))
            if len(self._rows) == AT_ONCE:
                self._flush()
        return seen

    def _flush(self) -> None:
        if self._rows:
            self._fresh.append(pa.RecordBatch.from_pylist(self._rows, schema=SCHEMA))
            self._rows = []

    def _keys(self, files: list[str], *, decode: bool) -> Keys:
        """The key of each file; nothing where it is gone."""
        reading = hashing.digest([_reader(), decode, self._latents.decoder, self._latents.background])
        listed = {uri: stamp for root in self._roots if objects.is_remote(root) for uri, stamp in objects.stamps(root)}

        def key(file: str) -> bytes:
            stamp = listed.get(file) if objects.is_remote(file) else _stamp(file)
            if plain(file) == file and stamp is None:
                return b""
            return hashlib.blake2b(f"{reading}\0{stamp}\0{file}".encode(), digest_size=KEY_BYTES).digest()

        return np.fromiter(map(key, files), dtype=f"S{KEY_BYTES}", count=len(files))

    def _places(self, keys: Keys) -> npt.NDArray[np.int64]:
        """Where each key stands in the table of what is known; -1 where it does not."""
        places, there = keyset.find(keys, _column(self._known))
        return np.where(there & (keys != b""), places, -1)


def _stamp(file: str) -> tuple[int, int] | None:
    try:
        status = os.stat(file)
    except OSError:  # a member of a container, or gone
        return None
    return status.st_size, status.st_mtime_ns


def _column(table: pa.Table) -> Keys:
    return np.frombuffer(b"".join(table.column("key").to_pylist()), dtype=f"S{KEY_BYTES}")


def _seen(row: dict[str, Any]) -> Inspected:
    sha256, warnings = row["sha256"].hex(), tuple(row["warnings"])
    return Inspected(sha256, row["width"], row["height"], row["problem"], warnings, row["look"])


@functools.cache
def _reader() -> str:
    """A hash of the code and the libraries that look at pictures: another version may see something else in them."""
    here = Path(__file__).parent
    code = [
        file.read_text(encoding="utf-8")
        for room in ("pictures", "sources")
        for file in sorted((here / room).glob("*.py"))
    ]
    return hashing.digest([*code, version("pillow"), version("simplejpeg"), version("numpy")])
