"""What lies below a data set's root, a folder or an S3 prefix: pictures, caption files, containers; by name, unread."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from flux2_core.data.pictures import load
from flux2_core.data.sources.containers import CONTAINERS, is_folder, suffix_of
from flux2_core.data.sources.walls import (
    CAPTION_BYTES,
    CAPTION_TOO_LARGE,
    NOT_REGULAR,
    outside,
    refused,
    shown,
    too_large,
)
from flux2_core.errors import DataError
from flux2_core.store import objects

_KNOWN_OTHERS = frozenset({
    ".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".toml", ".yaml", ".yml", ".npz", ".npy", ".safetensors", ".log",
    ".html", ".xml", ".py", ".lock", ".ini", ".db", ".zip", ".gz", ".tgz", ".zst",
})  # fmt: skip
DEEPEST = 100  # folders inside of each other
_ARCHIVES = (".zip", ".tgz", ".tar.gz", ".tar.zst", ".tar.bz2", ".tar.xz")


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


@dataclass
class Listing:
    """Names relative to the root, `/` between parts; `pictures` and `containers` are sorted."""

    root: str
    pictures: list[str] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)
    """Caption files by their name without suffix."""
    containers: list[str] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    """What promises a picture and is none."""
    notes: list[Note] = field(default_factory=list)
    keys: Mapping[str, int] | None = None
    """Every name below an S3 prefix, with its bytes; None for a folder, which is asked instead."""

    @functools.cached_property
    def wall(self) -> str:
        """The folder that no link may leave."""
        return os.path.realpath(self.root)

    def uri(self, name: str) -> str:
        """Where a name lies."""
        return objects.join(self.root, name)

    def has(self, name: str) -> bool:
        """Whether anything is there under this name."""
        return os.path.lexists(self.uri(name)) if self.keys is None else name in self.keys

    def unusable(self, name: str) -> str | None:
        """Why a name out of metadata leads to no file of the data set; None when it does."""
        if not self.has(name):
            return "the file is missing"
        if self.keys is not None:
            return None
        reason = outside(self.uri(name), self.wall)
        if reason is None and not os.path.isfile(self.uri(name)):
            return "a folder or a special file has this name"
        return reason

    def read(self, name: str, *, most: int = CAPTION_BYTES) -> bytes | None:
        """Bytes of a caption or metadata file; None where there are more than `most`.

        Raises:
            DataError: it leaves the folder, is no regular file, or cannot be read: "cannot be read (reason)".
        """
        if reason := self.unusable(name):
            raise DataError(f"cannot be read ({reason})")
        try:
            size = os.path.getsize(self.uri(name)) if self.keys is None else self.keys[name]
            return None if size > most else objects.read(self.uri(name))
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror})") from error


def list_below(path: str, *, named: str, apart: Collection[str] = ()) -> Listing:
    """List a data set; `path` may also be one container.

    Args:
        path: Folder, prefix or container.
        named: What it is called in messages.
        apart: Places below it that hold no samples (masks, references).

    Raises:
        DataError: nothing is there.
    """
    path = path.rstrip("/") if objects.is_remote(path) else os.path.abspath(path)
    there = os.path.isdir if is_folder(path) else os.path.isfile
    if suffix_of(path) and (objects.is_remote(path) or there(path)):
        root, name = path.rsplit("/", 1)
        return Listing(root, containers=[name], keys={name: 0} if objects.is_remote(path) else None)
    if objects.is_remote(path):
        listing = _prefix(path, apart)
    elif os.path.isdir(path):
        listing = Listing(path)
        _folder(listing, "", apart)
    elif os.path.exists(path):
        files = " or ".join(suffix for suffix, kind in CONTAINERS.items() if not kind.is_folder)
        raise DataError(f"{named}: is a file, but no {files}; name the folder that holds the pictures")
    else:
        raise DataError(f"{named}: no such folder; a local folder or s3://bucket/prefix is needed")
    listing.pictures.sort()
    listing.containers.sort()
    return listing


def _prefix(root: str, apart: Collection[str]) -> Listing:
    listing, tables, sizes = Listing(root), set(), dict[str, int]()
    for uri, size in objects.listing(root):
        name = uri.removeprefix(f"{root}/")
        parts = name.split("/")
        if not parts[-1] or any(part.startswith(".") for part in parts):
            continue
        sizes[name] = size
        table = next((at for at, part in enumerate(parts[:-1]) if is_folder(part)), None)
        if table is not None:
            tables.add("/".join(parts[: table + 1]))
        elif not any(uri.startswith(f"{place}/") for place in apart):
            _object(listing, name, size)
    listing.containers += tables
    listing.keys = sizes
    return listing


def _object(listing: Listing, name: str, size: int) -> None:
    suffix = os.path.splitext(name)[1].lower()
    uri = listing.uri(name)
    if suffix == ".txt" and size > CAPTION_BYTES:
        listing.rejected.append(Rejected(uri, CAPTION_TOO_LARGE))
    elif _filed(listing, name) or suffix in _KNOWN_OTHERS:
        return
    elif suffix not in load.PICTURE_SUFFIXES:
        listing.notes.append(Note(uri, "its name does not say whether it is a picture: left out"))
    elif reason := refused(name) or too_large(size):
        listing.rejected.append(Rejected(uri, reason))
    else:
        listing.pictures.append(name)


def _filed(listing: Listing, name: str) -> bool:
    """Whether the name is that of a caption file, container or archive, and then put there."""
    stem, suffix = os.path.splitext(name)
    if suffix.lower() == ".txt":
        listing.texts.setdefault(stem, []).append(name)
    elif suffix_of(name):
        listing.containers.append(name)
    elif name.lower().endswith(_ARCHIVES):
        told = "a compressed archive is not read: unpack it, to plain .tar at least"
        listing.notes.append(Note(listing.uri(name), told))
    else:
        return False
    return True


def _folder(listing: Listing, folder: str, apart: Collection[str]) -> None:
    place = os.path.join(listing.root, folder)
    if folder.count("/") >= DEEPEST:
        listing.rejected.append(Rejected(shown(place), f"over {DEEPEST} folders inside of each other: not looked into"))
        return
    try:
        with os.scandir(place) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        listing.rejected.append(Rejected(shown(place), f"cannot be listed ({error.strerror})"))
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.path in apart:
            continue  # hidden files and macOS's `._x.jpg` companions are no pictures
        name = f"{folder}/{entry.name}" if folder else entry.name
        if entry.is_symlink():
            reason = _link(listing, entry, name)
        elif entry.is_dir():
            reason = None
            if is_folder(entry.name):
                listing.containers.append(name)
            else:
                _folder(listing, name, apart)
                reason = "a folder with a picture's name; what is in it is read" if _promises(name) else None
        else:
            reason = _file(listing, entry, name)
        if reason is not None:
            listing.rejected.append(Rejected(shown(entry.path), reason))


def _link(listing: Listing, entry: os.DirEntry[str], name: str) -> str | None:
    reason = outside(entry.path, listing.wall)
    if os.path.isdir(entry.path):
        return reason or "a link to a folder of the data set: its pictures are read at their own place"
    if reason is None or name.lower().endswith(".txt"):  # a caption's link is judged at its picture
        return _file(listing, entry, name)
    return reason if _promises(name) or suffix_of(name) else None


def _file(listing: Listing, entry: os.DirEntry[str], name: str) -> str | None:
    if suffix_of(name) and not entry.is_file():
        return NOT_REGULAR
    if _filed(listing, name) or not _is_picture(entry.path):
        return None
    if not entry.is_file():
        return NOT_REGULAR
    if shown(name) != name:
        return "the file's name is not valid UTF-8; rename it"
    listing.pictures.append(name)
    return None


def _promises(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in load.PICTURE_SUFFIXES


def _is_picture(path: str) -> bool:
    """By its name; a name that says nothing is asked for its first bytes (not TIFF: too many formats start so)."""
    if _promises(path):
        return True
    if os.path.splitext(path)[1].lower() in _KNOWN_OTHERS or not os.path.isfile(path):
        return False
    try:
        return load.kind(objects.read(path, span=(0, 256))) in {"JPEG", "PNG", "WEBP", "AVIF", "GIF"}
    except OSError:
        return False
