"""What each layout brings: pictures with the captions that belong to them, by name only, never by position."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from flux2_core.config.dataset import CAPTION_SOURCES, Data
from flux2_core.config.places import COLUMN
from flux2_core.data import captions, metadata
from flux2_core.data.listing import Listing, Note, Rejected
from flux2_core.data.pictures import load
from flux2_core.data.sources.columns import FILE_NAME, Rows, address, text_column
from flux2_core.data.sources.containers import CONTAINERS, Container
from flux2_core.data.sources.tar_members import TEXTS, Member
from flux2_core.data.sources.walls import CAPTION_TOO_LARGE, METADATA_BYTES, refused, shown
from flux2_core.errors import DataError

FOLDER, METADATA = "folder", "metadata"
_SIDECARS = ("textfile", "lines")
_CHUNK, _THREADS = 512, 16  # caption files read at a time, from a store 30 ms away


@dataclass(frozen=True, slots=True)
class Found:
    """A picture and what its layout says of it: a name for ids and pairing ("" for a nameless row), a raw caption."""

    name: str
    uri: str
    text: object = None
    missing: str = "no caption"
    mask: str | None = None
    references: tuple[str, ...] = ()
    rejected: str | None = None


Item = Found | Rejected | Note


@dataclass(frozen=True)
class Layout:
    """A way in which a data set is laid out: how a person calls it, and how its pictures are found."""

    title: str
    captions: tuple[str, ...]
    """Where captions may come from, beside `auto` and `filename`."""
    find: Callable[[Listing, Data], Iterator[Item]]


def layouts() -> dict[str, Layout]:
    """Every layout by name: the two of folders, and that of each kind of container."""
    return {
        METADATA: Layout("a folder with metadata", ("metadata", COLUMN), _by_metadata),
        FOLDER: Layout("a folder of picture files", _SIDECARS, _in_folder),
        **{
            suffix: Layout(kind.title, (*(_SIDECARS if kind.members else ()), COLUMN), partial(_in_containers, kind))
            for suffix, kind in CONTAINERS.items()
        },
    }


def layout_of(listing: Listing, data: Data, *, place: str) -> str:
    """Which of the `layouts` it is.

    Raises:
        DataError: a mixture, or one that has no captions of the kind that `data.caption` asks for.
    """
    known = layouts()
    kinds = sorted({os.path.splitext(name)[1].lower() for name in _containers(listing)})
    kinds += [FOLDER] if listing.pictures or not kinds else []
    if len(kinds) > 1:
        named = " and ".join(known[kind].title for kind in kinds)
        raise DataError(f"{place} is a mixture of {named}: keep one, or make a data set of each")
    (kind,) = kinds
    source = COLUMN if data.caption.startswith(COLUMN) else data.caption
    if kind == FOLDER and source in ("auto", *known[METADATA].captions):
        there = [name for name in metadata.NAMES if listing.has(name)]
        if len(there) > 1:
            raise DataError(f"{place} holds {' and '.join(there)}: keep one")
        kind = METADATA if there else FOLDER
    if data.column(data.rejected) and (kind == FOLDER or (kind != METADATA and CONTAINERS[kind].rows is None)):
        raise DataError(f"{place} is {known[kind].title}, which has no columns: rejected={data.rejected!r} names one")
    allowed = ("auto", *known[kind].captions, "filename")
    if source in (*CAPTION_SOURCES, COLUMN) and source not in allowed:
        without = f" without {' or '.join(metadata.NAMES)}" if kind == FOLDER else ""
        sources = ", ".join(allowed).replace(COLUMN, f"{COLUMN}NAME")
        raise DataError(f"{place} is {known[kind].title}{without}: caption={data.caption!r} is none of {sources}")
    return kind


def find(listing: Listing, layout: str, data: Data) -> Iterator[Item]:
    """Every picture in sorted order, and what is wrong or notable.

    Raises:
        DataError: a metadata file, archive or table cannot be read as a whole.
    """
    yield from listing.rejected
    yield from listing.notes
    found = layouts()[layout]
    if layout != FOLDER:
        yield Note(listing.root, f"read as {found.title}")
    yield from found.find(listing, data)


@dataclass(frozen=True)
class _Group:
    """Pictures and caption files that are paired by base name: those of a folder, or of one archive."""

    pictures: list[str]
    texts: dict[str, list[str]]
    uri: Callable[[str], str]
    read: Callable[[str], bytes | None]
    """None: the file is too large for a caption."""


def _containers(listing: Listing) -> list[str]:
    return [name for name in listing.containers if name not in metadata.NAMES]


def _in_folder(listing: Listing, data: Data) -> Iterator[Item]:
    group = _Group(listing.pictures, listing.texts, listing.uri, listing.read)
    yield from _paired(group, data, threads=listing.keys is not None)


def _in_containers(kind: Container, listing: Listing, data: Data) -> Iterator[Item]:
    for uri in map(listing.uri, _containers(listing)):
        if kind.members is not None:
            yield from _archive(uri, kind.members(uri), data)
        if kind.rows is not None:
            pair = tuple(map(data.column, (data.preferred, data.rejected)))
            yield from _table(uri, kind.rows(uri, data.caption, pair[0]), *pair)


def _paired(group: _Group, data: Data, *, threads: bool = False) -> Iterator[Item]:
    if data.caption not in ("auto", "textfile", "lines") and not data.caption.startswith(COLUMN):
        yield from (Found(name, group.uri(name)) for name in group.pictures)
        return
    sharing = Counter(os.path.splitext(name)[0] for name in group.pictures)
    for name, text in _mapped(partial(_sidecar, group, data), group.pictures, threads=threads):
        stem = os.path.splitext(name)[0]
        if isinstance(text, DataError):
            yield Rejected(group.uri(name), str(text))
            continue
        missing = f"no caption: {os.path.basename(stem)}.txt is missing and default_caption is not set"
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
    texts, jsons = ([name for name in there if name.lower().endswith(suffix)] for suffix in TEXTS)
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
        if held is None:
            raise DataError(CAPTION_TOO_LARGE)
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
    return None if column is None else metadata.bare(row[column])


def _archive(uri: str, members: list[Member], data: Data) -> Iterator[Item]:
    counts = Counter(member.name for member in members)
    held: dict[str, bytes | None] = {}
    places = {member.name: f"{uri}@{member.stamp}#{member.name}" for member in members}
    group = _Group([], {}, places.__getitem__, held.__getitem__)
    for member in members:
        stem, suffix = os.path.splitext(member.name)
        problem = "its name stands in the archive more than once" if counts[member.name] > 1 else member.problem
        if suffix.lower() in load.PICTURE_SUFFIXES or (problem and suffix.lower() in TEXTS):
            if problem:
                yield Rejected(shown(f"{uri}#{member.name}"), problem)
            else:
                group.pictures.append(member.name)
        elif suffix.lower() in TEXTS:
            group.texts.setdefault(stem, []).append(member.name)
            held[member.name] = member.text
    group.pictures.sort()
    yield from _paired(group, data)


def _table(uri: str, rows: Rows, picture: str | None, rejected: str | None) -> Iterator[Item]:
    for row, (name, text, stamp) in enumerate(zip(rows.names, rows.texts, rows.stamps, strict=True)):
        place = f"{uri}@{stamp}#{address(row, picture)}"
        worse = None if rejected is None else f"{uri}@{stamp}#{address(row, rejected)}"
        if name and (problem := refused(name)):
            yield Note(place, f"goes by its row's number: {problem}")
            name = None
        yield Found(os.path.normpath(name) if name else "", place, text, rows.missing, rejected=worse)


def _by_metadata(listing: Listing, data: Data) -> Iterator[Item]:
    file = next(name for name in metadata.NAMES if listing.has(name))
    path = listing.uri(file)
    try:
        held = listing.read(file, most=METADATA_BYTES)
    except DataError as error:
        raise DataError(f"{path} {error}") from None
    if held is None:
        raise DataError(f"{path}: over {METADATA_BYTES // 2**20} MiB; make several data sets of it")
    pair = tuple(map(data.column, (data.preferred, data.rejected)))
    rows = metadata.rows(path, held, caption=data.caption, picture=pair[0] or FILE_NAME, rejected=pair[1])
    refused_already = {item.path for item in listing.rejected}
    named: dict[str, list[metadata.Row]] = {}
    for row in rows:
        if row.problem:
            yield Rejected(shown(row.file_name or row.where), f"{row.problem} ({row.where})")
            continue
        problem, uri = listing.unusable(row.file_name), listing.uri(row.file_name)
        if problem is None:
            named.setdefault(row.file_name, []).append(row)
        elif uri not in refused_already:
            yield Rejected(uri, f"{problem} ({row.where})")
    beside = {name for row in rows for name in row.beside}
    for name in sorted({*named, *(name for name in listing.pictures if name not in beside)}):
        yield from _row(listing, name, named.get(name, []))


def _row(listing: Listing, name: str, rows: list[metadata.Row]) -> Iterator[Item]:
    uri = listing.uri(name)
    if problem := next((f"{row.text_problem} ({row.where})" for row in rows if row.text_problem), None):
        yield Rejected(uri, problem)
        return
    if any(row != rows[0] for row in rows):
        places = ", ".join(row.where for row in rows)
        yield Rejected(uri, f"several rows say different things of it: keep one, with a list of captions ({places})")
        return
    if not rows:
        yield Found(name, uri, missing="no caption: no row of the metadata gives it a text")
        return
    row = rows[0]
    for other in row.beside:
        if problem := listing.unusable(other):
            yield Rejected(uri, f"its mask, reference or rejected picture {other}: {problem} ({row.where})")
            return
    mask, rejected = (None if other is None else listing.uri(other) for other in (row.mask, row.rejected))
    missing = f"no caption: its row has none ({row.where})"
    yield Found(name, uri, row.text, missing, mask, tuple(map(listing.uri, row.references)), rejected)
    if len(rows) > 1:
        yield Note(uri, "several rows name it with the same caption: it is used once")
