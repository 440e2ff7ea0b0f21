"""What each layout brings: pictures with the captions that belong to them, by name only, never by position."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

from flux2_core.config.sections import CAPTION_SOURCES, COLUMN, Data
from flux2_core.data import captions, metadata
from flux2_core.data.listing import Listing
from flux2_core.data.pictures import load
from flux2_core.data.sources import lance_rows, parquet_rows, tar_members
from flux2_core.data.sources.columns import columns, text_column
from flux2_core.data.sources.walls import refused, shown
from flux2_core.errors import DataError

FOLDER, METADATA, TAR, PARQUET, LANCE = "folder", "metadata", ".tar", ".parquet", ".lance"
_NAMES = {
    METADATA: "a folder with metadata",
    TAR: "WebDataset tar files",
    PARQUET: "Parquet files with picture bytes",
    LANCE: "Lance tables",
    FOLDER: "a folder of picture files",
}
_TEXTS = {FOLDER: ("textfile", "lines"), TAR: ("textfile", "lines", COLUMN), PARQUET: (COLUMN,), LANCE: (COLUMN,)}
_CHUNK, _THREADS = 512, 16  # caption files read at a time, from a store 30 ms away


@dataclass(frozen=True, slots=True)
class Rejected:
    """A file or metadata row that is left out, and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Note:
    """Something that leaves nothing out, but that a person should know."""

    path: str
    message: str


@dataclass(frozen=True, slots=True)
class Found:
    """A picture and what its layout says of it: a name for ids and pairing ("" for a nameless row), a raw caption."""

    name: str
    uri: str
    text: object = None
    missing: str = "no caption"
    mask: str | None = None
    references: tuple[str, ...] = ()


def layout_of(listing: Listing, data: Data, *, place: str) -> str:
    """Which layout it is.

    Raises:
        DataError: a mixture, or one that has no captions of the kind that `data.caption` asks for.
    """
    kinds = sorted({os.path.splitext(name)[1].lower() for name in listing.containers if not _is_metadata(name)})
    if listing.pictures:
        kinds.append(FOLDER)
    if len(kinds) > 1:
        named = " and ".join(_NAMES[kind] for kind in kinds)
        raise DataError(f"{place} is a mixture of {named}: keep one, or make a data set of each")
    kind = kinds[0] if kinds else FOLDER
    source = COLUMN if data.caption.startswith(COLUMN) else data.caption
    if kind == FOLDER and source in ("auto", "metadata", COLUMN):
        there = [name for name in metadata.NAMES if listing.has(name)]
        if len(there) > 1:
            raise DataError(f"{place} holds {' and '.join(there)}: keep one")
        if there:
            return METADATA
    if source in (*CAPTION_SOURCES, COLUMN) and source not in (*_TEXTS[kind], "auto", "filename"):
        allowed = ", ".join(("auto", *_TEXTS[kind], "filename")).replace(COLUMN, f"{COLUMN}NAME")
        without = f" without {' or '.join(metadata.NAMES)}" if kind == FOLDER else ""
        raise DataError(f"{place} is {_NAMES[kind]}{without}: caption={data.caption!r} is none of {allowed}")
    return kind


def find(listing: Listing, layout: str, data: Data) -> Iterator[Found | Rejected | Note]:
    """Every picture in sorted order, and what is wrong or notable.

    Raises:
        DataError: a metadata file, archive or table cannot be read as a whole.
    """
    yield from itertools.starmap(Rejected, listing.rejected)
    yield from itertools.starmap(Note, listing.notes)
    if layout != FOLDER:
        yield Note(listing.root, f"read as {_NAMES[layout]}")
    if layout == METADATA:
        yield from _by_metadata(listing, data)
    elif layout == FOLDER:
        group = _Group(listing.pictures, listing.texts, listing.uri, listing.read)
        yield from _paired(group, data, threads=listing.keys is not None)
    else:
        for name in listing.containers:
            if not _is_metadata(name):
                yield from _tar(listing.uri(name), data) if layout == TAR else _table(listing.uri(name), layout, data)


@dataclass(frozen=True)
class _Group:
    """Pictures and caption files that are paired by base name: those of a folder, or of one archive."""

    pictures: list[str]
    texts: dict[str, list[str]]
    uri: Callable[[str], str]
    read: Callable[[str], bytes]


def _is_metadata(name: str) -> bool:
    return name in metadata.NAMES


def _paired(group: _Group, data: Data, *, threads: bool = False) -> Iterator[Found | Rejected | Note]:
    if data.caption not in ("auto", "textfile", "lines") and not data.caption.startswith(COLUMN):
        yield from (Found(name, group.uri(name)) for name in group.pictures)
        return
    sharing = Counter(os.path.splitext(name)[0] for name in group.pictures)
    for name, text in _mapped(partial(_sidecar, group, data), group.pictures, threads=threads):
        stem = os.path.splitext(name)[0]
        if isinstance(text, DataError):
            yield Rejected(group.uri(name), str(text))
            continue
        missing = f"no caption: {PurePosixPath(stem).name}.txt is missing and default_caption is not set"
        yield Found(name, group.uri(name), text, missing)
        if text is not None and sharing[stem] > 1:
            yield Note(group.uri(name), "its caption file also belongs to a picture of the same name")
    for stem in sorted(group.texts.keys() - sharing.keys()):
        for name in group.texts[stem]:
            yield Note(shown(group.uri(name)), "a text file without a picture of its name")


def _mapped(read: Callable[[str], object], names: list[str], *, threads: bool) -> Iterable[tuple[str, object]]:
    if not threads:
        yield from ((name, read(name)) for name in names)
        return
    with ThreadPoolExecutor(_THREADS, "captions") as pool:
        for start in range(0, len(names), _CHUNK):  # the pool's `map` would hold a future for every name at once
            part = names[start : start + _CHUNK]
            yield from zip(part, pool.map(read, part), strict=True)


def _sidecar(group: _Group, data: Data, name: str) -> object:
    """The caption beside a picture, None where there is none, or why it cannot be used."""
    there = group.texts.get(os.path.splitext(name)[0], [])
    texts, jsons = ([name for name in there if name.lower().endswith(suffix)] for suffix in tar_members.TEXTS)
    found = jsons if data.caption.startswith(COLUMN) or (data.caption == "auto" and not texts) else texts
    if not found:
        return None
    if len(found) > 1:
        return DataError(f"{' and '.join(sorted(found))} differ only in case: keep one caption file")
    try:
        held = group.read(found[0])
    except DataError as error:
        return DataError(f"its caption file {found[0]} {error}")
    try:
        return captions.decode(held) if found is texts else _json_text(held, data)
    except DataError as error:
        return error


def _json_text(held: bytes, data: Data) -> object:
    try:
        row = json.loads(held)
    except (ValueError, RecursionError) as error:
        raise DataError(f"its .json is no JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError("its .json is not an object with a caption in it")
    column = text_column(row, caption=data.caption)
    return None if column is None else row[column]


def _tar(uri: str, data: Data) -> Iterator[Found | Rejected | Note]:
    found = tar_members.members(uri)
    counts = Counter(member.name for member in found)
    held: dict[str, bytes] = {}
    group = _Group([], {}, partial("{}#{}".format, uri), held.__getitem__)
    for member in found:
        stem, suffix = os.path.splitext(member.name)
        problem = "its name stands in the archive more than once" if counts[member.name] > 1 else member.problem
        if suffix.lower() in load.PICTURE_SUFFIXES or (problem and suffix.lower() in tar_members.TEXTS):
            if problem:
                yield Rejected(shown(f"{uri}#{member.name}"), problem)
            else:
                group.pictures.append(member.name)
        elif suffix.lower() in tar_members.TEXTS:
            group.texts.setdefault(stem, []).append(member.name)
            held[member.name] = member.text if member.text is not None else b"x" * (captions.MAX_BYTES + 1)
    group.pictures.sort()
    yield from _paired(group, data)


def _table(uri: str, layout: str, data: Data) -> Iterator[Found | Rejected | Note]:
    source = parquet_rows if layout == PARQUET else lance_rows
    schema = source.schema(uri)
    try:
        used = columns(schema, caption=data.caption)
    except DataError as error:
        raise DataError(f"{uri}: {error}") from None
    missing = f"no caption: the row has none in column {used.text}"
    if used.text is None:
        missing = f'no caption: there is no column text or caption; say caption = "{COLUMN}NAME" ({schema.names})'
    for row, (name, text) in enumerate(zip(*source.rows(uri, used), strict=True)):
        place = f"{uri}#{row}"
        if name and (problem := refused(name)):
            yield Note(place, f"goes by its row's number: {problem}")
            name = None
        yield Found(os.path.normpath(name) if name else "", place, text, missing)


def _by_metadata(listing: Listing, data: Data) -> Iterator[Found | Rejected | Note]:
    file = next(name for name in metadata.NAMES if listing.has(name))
    path = listing.uri(file)
    try:
        rows = metadata.rows(path, listing.read(file), caption=data.caption)
    except DataError as error:
        raise DataError(str(error) if str(error).startswith(path) else f"{path} {error}") from None
    refused_already = {uri for uri, _ in listing.rejected}
    named: dict[str, list[metadata.Row]] = {}
    for row in rows:
        if row.problem:
            yield Rejected(shown(row.file_name or row.where), f"{row.problem} ({row.where})")
            continue
        name = os.path.normpath(row.file_name)
        problem = listing.unusable(name)
        if problem is None:
            named.setdefault(name, []).append(row)
        elif listing.uri(name) not in refused_already:
            yield Rejected(listing.uri(name), f"{problem} ({row.where})")
    beside = {name for row in rows for name in (row.mask, *row.references)}
    for name in sorted({*named, *(name for name in listing.pictures if name not in beside)}):
        yield from _row(listing, name, named.get(name, []))


def _row(listing: Listing, name: str, rows: list[metadata.Row]) -> Iterator[Found | Rejected | Note]:
    uri = listing.uri(name)
    if problem := next((f"{row.text_problem} ({row.where})" for row in rows if row.text_problem), None):
        yield Rejected(uri, problem)
        return
    if any((row.text, row.mask, row.references) != (rows[0].text, rows[0].mask, rows[0].references) for row in rows):
        places = ", ".join(row.where for row in rows)
        yield Rejected(uri, f"several rows say different things of it: keep one, with a list of captions ({places})")
        return
    if not rows:
        yield Found(name, uri, missing="no caption: no row of the metadata gives it a text")
        return
    row = rows[0]
    for other in (row.mask, *row.references):
        if other is not None and (problem := listing.unusable(other)):
            yield Rejected(uri, f"its mask or reference {other}: {problem} ({row.where})")
            return
    mask = None if row.mask is None else listing.uri(row.mask)
    missing = f"no caption: its row has none ({row.where})"
    yield Found(name, uri, row.text, missing, mask, tuple(listing.uri(other) for other in row.references))
    if len(rows) > 1:
        yield Note(uri, "several rows name it with the same caption: it is used once")
