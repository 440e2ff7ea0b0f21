"""A data set on disk: which files are pictures, and which caption belongs to each; the folder is a wall.

Pairs are made by name only, never by position. What cannot be used is yielded as `Rejected` with its reason, what is
only worth knowing as `Note`.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from flux2_core import captions, images, metadata_file
from flux2_core.config import CAPTION_SOURCES, Data
from flux2_core.errors import DataError

_KNOWN_OTHERS = frozenset({
    ".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".toml", ".yaml", ".yml", ".parquet", ".npz", ".npy",
    ".safetensors", ".log", ".html", ".xml", ".py", ".lock", ".ini", ".db", ".zip", ".tar", ".gz",
})  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A file that promises to be a picture, with its resolved captions; `id` is unique within the data set."""

    id: str
    path: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Rejected:
    """A file or metadata row that is left out, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Note:
    """Something that leaves nothing out, but that a person should know."""

    path: str
    message: str


@dataclass
class _Listing:
    """Files below the root, as sorted paths relative to it, `/` between parts."""

    pictures: list[str] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)


def scan(data: Data, *, ordinal: int) -> Iterator[Candidate | Rejected | Note]:
    """Everything below `data.path` that is, or should be, a picture with a caption, in sorted order.

    Args:
        data: One `[[data]]` section.
        ordinal: Its place in the configuration, for messages.

    Raises:
        DataError: the folder is missing or holds no picture, or its metadata file cannot be read as a whole.
    """
    root = os.path.abspath(data.path)
    if not os.path.isdir(root):
        hint = " (a local folder is needed)" if "://" in data.path else ""
        raise DataError(f"data.{ordinal}.path={data.path!r}: no such folder{hint}")
    listing = _list(root)
    metadata = _metadata_file(root, data, ordinal=ordinal)
    rows = [] if metadata is None else metadata_file.rows(metadata)
    if metadata is not None:
        found = _from_metadata(root, data, listing, rows)
    elif data.caption in ("auto", "textfile"):
        found = _from_sidecars(root, data, listing)
    else:
        found = _from_names(root, data, listing)
    if not (listing.pictures or listing.rejected or rows):
        raise DataError(f"data.{ordinal}.path={data.path!r}: no pictures in it; put JPEG, PNG or WebP files there")
    return found


def _list(root: str) -> _Listing:
    listing = _Listing()
    _list_folder(root, "", wall=os.path.realpath(root), into=listing)
    listing.pictures.sort()
    return listing


def _list_folder(root: str, folder: str, *, wall: str, into: _Listing) -> None:
    try:
        entries = sorted(os.scandir(os.path.join(root, folder)), key=lambda entry: entry.name)
    except OSError as error:
        into.rejected.append(Rejected(_shown(os.path.join(root, folder)), f"cannot be listed ({error.strerror})"))
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue  # hidden files and macOS's `._x.jpg` companions are no pictures
        relative = f"{folder}/{entry.name}" if folder else entry.name
        if entry.is_symlink():
            reason = _list_link(entry, relative, wall=wall, into=into)
        elif entry.is_dir():
            _list_folder(root, relative, wall=wall, into=into)
            reason = "a folder with a picture's name; what is in it is read" if _promises(entry.name) else None
        else:
            reason = _list_file(entry, relative, into=into)
        if reason is not None:
            into.rejected.append(Rejected(_shown(entry.path), reason))


def _list_link(entry: os.DirEntry[str], relative: str, *, wall: str, into: _Listing) -> str | None:
    reason = _outside(entry.path, wall)
    if os.path.isdir(entry.path):
        return reason or "a link to a folder of the data set: its pictures are read at their own place"
    if reason is None or os.path.splitext(entry.name)[1].lower() == ".txt":  # a caption's link is judged at its picture
        return _list_file(entry, relative, into=into)
    return reason if _promises(entry.name) else None


def _list_file(entry: os.DirEntry[str], relative: str, *, into: _Listing) -> str | None:
    stem, suffix = os.path.splitext(relative)
    if suffix.lower() == ".txt":
        into.texts.setdefault(stem, []).append(relative)
        return None
    if not _is_picture(entry.path):
        return None
    if not stat.S_ISREG(entry.stat().st_mode):
        return "not a regular file (a pipe, socket or device)"
    if _shown(relative) != relative:
        return "the file's name is not valid UTF-8; rename it"
    into.pictures.append(relative)
    return None


def _promises(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in images.PICTURE_SUFFIXES


def _is_picture(path: str) -> bool:
    """By its name; a name that says nothing is asked for its first bytes (not TIFF: too many formats start so)."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in images.PICTURE_SUFFIXES:
        return True
    if suffix in _KNOWN_OTHERS or not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            return images.kind(file.read(256)) in {"JPEG", "PNG", "WEBP", "AVIF", "GIF"}
    except OSError:
        return False


def _outside(path: str, wall: str) -> str | None:
    """Why a link may not be followed; None when it ends inside the data set."""
    try:
        real = os.path.realpath(path, strict=True)
    except OSError as error:
        return f"a link that leads nowhere ({error.strerror})"
    if os.path.commonpath((real, wall)) != wall:
        return "a link that leaves the data set's folder; copy the file into it"
    return None


def _shown(path: str) -> str:
    """A path that any table or terminal can hold: NUL and undecodable bytes escaped."""
    return path.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def _ids(names: list[str]) -> dict[str, str]:
    """Sample ids: the name without its extension, unless another picture would get, or has, the same."""
    stems = Counter(os.path.splitext(name)[0] for name in names)
    taken = set(names)
    return {
        name: name if stems[stem] > 1 or stem in taken else stem
        for name, stem in ((name, os.path.splitext(name)[0]) for name in names)
    }


def _pair(root: str, name: str, sample_id: str, *, text: str | None, data: Data, missing: str) -> Candidate | Rejected:
    """A picture with its caption; None or a blank text means the default caption, or rejection as `missing`."""
    path = os.path.join(root, name)
    try:
        cleaned = None if text is None else captions.clean(text)
        if cleaned is None or captions.blank(cleaned):
            if data.default_caption is None:
                raise DataError(
                    missing if cleaned is None else "its caption is blank; write one or set default_caption"
                )
            cleaned = captions.clean(data.default_caption)
        return Candidate(sample_id, path, (captions.resolve(cleaned, trigger=data.trigger),))
    except DataError as error:
        return Rejected(path, str(error))


def _from_names(root: str, data: Data, listing: _Listing) -> Iterator[Candidate | Rejected | Note]:
    yield from listing.rejected
    ids = _ids(listing.pictures)
    for name in listing.pictures:
        text = PurePosixPath(name).stem.replace("_", " ") if data.caption == "filename" else data.caption
        yield _pair(root, name, ids[name], text=text, data=data, missing="no caption")


def _from_sidecars(root: str, data: Data, listing: _Listing) -> Iterator[Candidate | Rejected | Note]:
    yield from listing.rejected
    ids = _ids(listing.pictures)
    wall = os.path.realpath(root)
    sharing = Counter(os.path.splitext(name)[0] for name in listing.pictures)
    for name in listing.pictures:
        stem = os.path.splitext(name)[0]
        texts = listing.texts.get(stem, [])
        missing = f"no caption: {PurePosixPath(stem).name}.txt is missing and default_caption is not set"
        try:
            text = _sidecar(root, texts, wall=wall)
        except DataError as error:
            yield Rejected(os.path.join(root, name), str(error))
            continue
        yield _pair(root, name, ids[name], text=text, data=data, missing=missing)
        if text is not None and sharing[stem] > 1:
            yield Note(os.path.join(root, name), "its caption file also belongs to a picture of the same name")
    for stem in sorted(listing.texts.keys() - sharing.keys()):
        for text_name in listing.texts[stem]:
            yield Note(_shown(os.path.join(root, text_name)), "a text file without a picture of its name")


def _sidecar(root: str, names: list[str], *, wall: str) -> str | None:
    if not names:
        return None
    if len(names) > 1:
        raise DataError(f"{' and '.join(sorted(names))} differ only in case: keep one caption file")
    path = os.path.join(root, names[0])
    reason = _outside(path, wall)
    if reason:
        raise DataError(f"its caption file {names[0]} is {reason}")
    try:
        if not os.path.isfile(path):
            raise DataError(f"its caption file {names[0]} is not a regular file")
        if os.path.getsize(path) > captions.MAX_CAPTION_BYTES:
            raise DataError(f"its caption file {names[0]} is over {captions.MAX_CAPTION_BYTES // 2**20} MiB")
        return captions.decode(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"its caption file {names[0]} cannot be read ({error.strerror})") from error


def _metadata_file(root: str, data: Data, *, ordinal: int) -> Path | None:
    if data.caption not in ("auto", "metadata"):
        return None
    there = [Path(root, name) for name in metadata_file.NAMES if os.path.lexists(os.path.join(root, name))]
    if len(there) > 1:
        raise DataError(f"data.{ordinal}.path={data.path!r} holds both {' and '.join(metadata_file.NAMES)}: keep one")
    if there:
        reason = _outside(str(there[0]), os.path.realpath(root))
        if reason or not there[0].is_file():
            raise DataError(f"{there[0]}: {reason or 'not a regular file'}")
        return there[0]
    if data.caption == "metadata":
        raise DataError(
            f"data.{ordinal}.caption='metadata', but {root} holds neither {' nor '.join(metadata_file.NAMES)}; "
            f"add one, or choose one of {', '.join(CAPTION_SOURCES)}"
        )
    return None


def _from_metadata(
    root: str, data: Data, listing: _Listing, rows: list[metadata_file.Row]
) -> Iterator[Candidate | Rejected | Note]:
    yield from listing.rejected
    refused = {rejected.path for rejected in listing.rejected}
    named: dict[str, list[metadata_file.Row]] = {}
    for row in rows:
        if row.problem:
            yield Rejected(_shown(row.file_name or row.where), f"{row.problem} ({row.where})")
            continue
        name = os.path.normpath(row.file_name)
        path = os.path.join(root, name)
        problem = _unusable(path, os.path.realpath(root))
        if problem is None:
            named.setdefault(name, []).append(row)
        elif path not in refused:
            yield Rejected(path, f"{problem} ({row.where})")
    names = sorted({*listing.pictures, *named})
    ids = _ids(names)
    for name in names:
        yield from _captioned(root, name, ids[name], rows=named.get(name, []), data=data)


def _captioned(
    root: str, name: str, sample_id: str, *, rows: list[metadata_file.Row], data: Data
) -> Iterator[Candidate | Rejected | Note]:
    path = os.path.join(root, name)
    for row in rows:
        if row.text_problem:
            yield Rejected(path, f"{row.text_problem} ({row.where})")
            return
    texts = [row.text for row in rows]
    if any(text != texts[0] for text in texts):
        places = ", ".join(row.where for row in rows)
        yield Rejected(path, f"several rows give it different captions: keep one ({places})")
        return
    text = texts[0] if texts else None
    if text is not None and not isinstance(text, str):
        yield Rejected(path, f"its text is {type(text).__name__}, not a string ({rows[0].where})")
        return
    yield _pair(
        root, name, sample_id, text=text, data=data, missing="no caption: no row of the metadata gives it a text"
    )
    if len(rows) > 1:
        yield Note(path, "several rows name it with the same caption: it is used once")


def _unusable(path: str, wall: str) -> str | None:
    if not os.path.lexists(path):
        return "the file named in the metadata is missing"
    reason = _outside(path, wall)
    if reason is None and not os.path.isfile(path):
        return "file_name names a folder or a special file, not a picture"
    return reason
