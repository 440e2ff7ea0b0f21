"""Garbage collection: drop what no index names, and give back the room.

An index names a samples table, which names rows; a run's folder has a copy of its own, and who works holds a lease on
what it needs (`leases`). Rows, tables and indexes go only when nothing names them and they are older than a safe age.
Beside live work nothing is lost: a `cache` takes its lease before it looks for rows, names are read again after rows
were dropped (what was named meanwhile is put back), and a version that is still read keeps its files.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flux2_core.cache import index, leases, prompt_rows, sealed
from flux2_core.cache.keys import text_key
from flux2_core.config.sections import Config
from flux2_core.data.needs import LATENTS, NULL_TEXT
from flux2_core.errors import DataError
from flux2_core.store import keyset, objects, parquet, schemas, seals, upkeep
from flux2_core.store.hashing import digest
from flux2_core.store.keyset import Keys
from flux2_core.store.reader import Reader
from flux2_core.store.table import Table
from flux2_core.store.writer import Writer

RETIRED = "retired-"  # tag of a version that indexes have left: the time, then the version
NAMING = [schemas.LATENT_KEY, schemas.TEXT_KEYS, schemas.ROLES, schemas.REFERENCES, schemas.MASK, schemas.REJECTED]
KINDS = (schemas.KIND_TEXT, schemas.KIND_LATENTS)


@dataclass
class _Names:
    """What kept indexes name."""

    indexes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Kept indexes by URI, which name the newest version of a table after it was rewritten."""
    reading: list[dict[str, Any]] = field(default_factory=list)
    """Names of what is read at the version that it was found at: leases, and indexes that are not ours to rewrite."""
    leases: list[dict[str, Any]] = field(default_factory=list)
    old: list[str] = field(default_factory=list)
    """Indexes and leases that can go."""
    samples: set[str] = field(default_factory=set)
    keys: list[Keys] = field(default_factory=list)
    """Of each samples table, sorted."""
    texts: set[str] = field(default_factory=set)
    caching: bool = False
    """Whether a `cache` is at work."""


def collect(config: Config, *, keep: timedelta, dry_run: bool) -> dict[str, Any]:
    """Drop rows, tables, samples tables and indexes that no index names and that are older than `keep`.

    Raises:
        DataError: an index is damaged: what it names cannot be known.
    """
    names, before = _names(config, keep), _size(config)
    dropped, kept_young, freed, skipped = dict.fromkeys(KINDS, 0), 0, 0, []
    for kind, uri in _tables(config):
        try:
            table = Table.open(uri)
        except DataError as error:  # of another contract, or damaged: `verify` says more
            skipped.append(str(error))
            continue
        gone, young = _unnamed(table, names, keep)
        dropped[kind] += len(gone)
        kept_young += len(young)
        if dry_run:
            reader = Reader(table, gone)
            freed += sum(reader.size(key) for key in gone)
        else:
            _drop(config, table, gone, keep=keep)
            if not _settle(config, uri, names, keep=keep):
                skipped.append(f"{uri}: its files are not merged, for rows are being written; a later gc does that")
    files = _unnamed_files(config, keep)
    for file, size in files.items():
        if dry_run:
            freed += size
        else:
            objects.delete(file)
    return {
        "dropped": dropped,
        "files": len(files),
        "kept_young": kept_young,
        "freed": freed if dry_run else before - _size(config),
        "caching": names.caching,
        "held": [leases.told(lease) for lease in names.leases],
        "skipped": skipped,
        "dry_run": dry_run,
    }


def _names(config: Config, keep: timedelta) -> _Names:
    """Read every index of the cache and of the runs, and what they name."""
    names, now = _Names(), time.time()
    names.leases, names.old = leases.read(config.output.cache, now=now)
    names.reading += names.leases
    leased = {lease["samples"] for lease in names.leases}
    names.caching = any(lease[leases.WORK] == "cache" and leases.at_work(lease) for lease in names.leases)
    root = Path(config.output.root).expanduser().absolute()
    used = set()
    for path in sorted(root.glob("*/index.json")):
        tree = sealed.read(str(path))
        if objects.exists(objects.join(config.output.cache, tree["samples"])):  # else it is of another cache
            used.add(digest(tree["settings"]))
            if _ours(config, tree) and not _trains(path.parent):
                names.indexes[str(path)] = tree
            else:
                names.reading.append(tree)
    for uri, _ in objects.listing(objects.join(config.output.cache, "samples")):
        if uri.endswith(".json"):
            tree = sealed.read(uri)
            recent = now - tree.get(index.WRITTEN, 0.0) < keep.total_seconds()
            if recent or digest(tree["settings"]) in used or tree["samples"] in leased:
                names.indexes[uri] = tree
            else:
                names.old.append(uri)
        elif not uri.endswith(".parquet"):
            names.old.append(uri)
    _read_samples(config, names)
    return names


def _ours(config: Config, tree: dict[str, Any]) -> bool:
    """Whether a run's index is of this cache: another one may hold a samples table of the same content.

    A cache that was moved is still the one; of a copied one the run's is the first. Indexes of before say nothing.
    """
    here, there = config.output.cache.rstrip("/"), tree.get(index.CACHE)
    if there is not None:
        return there == here or not objects.exists(objects.join(there, tree["samples"]))
    return all(tree[kind]["version"] in upkeep.versions(objects.join(here, tree[kind]["uri"])) for kind in KINDS)


def _read_samples(config: Config, names: _Names) -> None:
    for tree in [*names.indexes.values(), *names.reading]:
        uri = objects.join(config.output.cache, tree["samples"])
        names.texts |= {NULL_TEXT, *tree.get(index.TEXTS, [])}
        if uri in names.samples:
            continue
        try:
            names.keys.append(_keys(parquet.read_parquet(uri, columns=NAMING, optional=(schemas.REJECTED,))))
        except FileNotFoundError:
            if leases.WORK in tree and not leases.at_work(tree):
                continue  # it was killed before it wrote the table
            who = leases.told(tree) if leases.WORK in tree else "an index"
            raise DataError(
                f"{uri}: not there, though it is named ({who}); a `cache` is starting: run gc again, or cache again"
            ) from None
        names.samples.add(uri)


def _keys(samples: pa.Table) -> Keys:
    """Keys of all rows that samples name, whatever the training makes use of."""
    texts = pc.list_flatten(samples.column(schemas.TEXT_KEYS))
    roles = pc.struct_field(pc.list_flatten(samples.column(schemas.ROLES)), schemas.KEY)
    return keyset.of(texts, roles.unique(), *(kind.keys(samples) for kind in LATENTS.values()))


def _tables(config: Config) -> Iterator[tuple[str, str]]:
    """(kind, URI) of every tensor table."""
    for kind in KINDS:
        place = objects.join(config.output.cache, kind)
        names = {uri[len(place) + 1 :].split("/", 1)[0] for uri, _ in objects.listing(place)}
        yield from ((kind, objects.join(place, name)) for name in sorted(names) if name.endswith(".lance"))


def _unnamed(table: Table, names: _Names, keep: timedelta) -> tuple[list[str], list[str]]:
    """Keys of rows that nothing names: those that can go, and those that are too young."""
    texts = keyset.of((text_key(table.fingerprint, text) for text in names.texts), [prompt_rows.PAD_KEY])
    oldest = table.version_before(time.time() - keep.total_seconds())
    old: list[str] = []
    young: list[str] = []
    for keys, versions in table.births():
        named = np.any([keyset.find(keys, known)[1] for known in (*names.keys, texts)], axis=0)
        for key, version in zip(keys[~named], versions[~named], strict=True):
            (old if version <= oldest else young).append(key.decode())
    return old, young


def _drop(config: Config, table: Table, gone: list[str], *, keep: timedelta) -> None:
    """Delete rows, and put back what was named while that was done."""
    if not gone:
        return
    upkeep.drop(table.uri, gone)
    still, _ = _unnamed(table, _names(config, keep), keep)
    if named := sorted(set(gone) - set(still)):
        with Writer(table, batch_rows=64, batch_bytes=1 << 26) as writer:
            reader = Reader(table, named)
            for key in named:
                writer.add(reader.fetch([key])[0])


def _settle(config: Config, uri: str, names: _Names, *, keep: timedelta) -> bool:
    """Rewrite the table without holes, have its indexes name that version, and remove the files of those before.

    Returns:
        Whether it was rewritten: not beside a `cache`, which would commit before that is done, and make it void.
    """
    merged = not names.caching and upkeep.merge(uri)
    version, name = Table.open(uri).version, uri[len(config.output.cache.rstrip("/")) + 1 :]
    if not names.caching:  # it is about to write indexes itself
        _move_indexes(uri, name, names, version)
    gone = {f"index-{old.rsplit('/', 1)[-1].removesuffix('.json')}" for old in names.old}
    for tag, pinned in upkeep.tags(uri).items():
        since = float(tag.split("-")[1]) if tag.startswith(RETIRED) else None
        expired = since is not None and time.time() - since >= keep.total_seconds()
        if tag in gone or (expired and pinned not in _in_use(names, name)):
            upkeep.untag(uri, tag)
    upkeep.clean(uri, keep=keep)
    seals.seal(uri)
    return merged


def _move_indexes(uri: str, name: str, names: _Names, version: int) -> None:
    """Name the newest version in every index, then in its tag; the versions left are kept for a while."""
    left = _in_use(names, name) & upkeep.versions(uri)
    for place, known in names.indexes.items():
        tree = sealed.read(place)
        for kind in KINDS:
            if known[kind]["uri"] == name and tree[kind] == known[kind] and tree[kind]["version"] != version:
                left.add(tree[kind]["version"])
                tree[kind]["version"] = known[kind]["version"] = version
                objects.write(place, sealed.encode(tree))
    there = upkeep.tags(uri)
    for old in left - {pinned for tag, pinned in there.items() if tag.startswith(RETIRED)} - {version}:
        upkeep.tag(uri, f"{RETIRED}{int(time.time())}-{old}", old)
    for tag in there:
        if tag.startswith("index-"):
            upkeep.tag(uri, tag, version)


def _in_use(names: _Names, name: str) -> set[int]:
    """Versions of a table that are read as they are."""
    return {tree[kind]["version"] for tree in names.reading for kind in KINDS if tree.get(kind, {}).get("uri") == name}


def _unnamed_files(config: Config, keep: timedelta) -> dict[str, int]:
    """Old indexes and leases, and samples tables that nothing names, with their sizes.

    Listed before names are read: a `cache` announces its samples table before it writes it.
    """
    places = [objects.join(config.output.cache, name) for name in ("samples", leases.FOLDER)]
    there = {uri: size for place in places for uri, size in objects.listing(place)}
    names = _names(config, keep)
    return {
        uri: size
        for uri, size in there.items()
        if uri in names.old or (uri.endswith(".parquet") and uri not in names.samples)
    }


def _trains(run: Path) -> bool:
    """Whether a training holds the run's lock."""
    lock = run / ".lock"
    if not lock.is_file():
        return False
    with lock.open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _size(config: Config) -> int:
    return sum(size for _, size in objects.listing(config.output.cache))
