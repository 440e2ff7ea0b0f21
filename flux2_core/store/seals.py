"""Hashes of a table's files, kept beside it: damage that no row's checksum can see.

Row checksums cover payloads and attributes. They cannot see a flipped bit in a manifest's padding, in a transaction's
bloom filter or in an older version. Lance's files never change once written, so a list of their hashes settles it:
`seal` after a stage has committed, `damaged` in `verify`. Blob files (> 99 % of the bytes) are left to the rows'
checksums; `seal` reads the small files that are new only. Two kinds of small file name a version and do change, tags
and the hint at the newest version: of them the whole text is kept, and a later version is no damage.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Iterator

import xxhash

from flux2_core.errors import DataError
from flux2_core.store import objects

FOLDER = "_seals"  # inside the table's folder; Lance's clean-up leaves unknown folders alone
SEALED = ("/data/", "/_versions/", "/_transactions/", "/_deletions/", "/_indices/", "/_refs/")
NOT_SEALED = ".blob"
FORGOTTEN = ""  # the mark of a file that was removed for its damage
CHANGING = ("/_versions/latest_version_hint.json", "/_refs/")
MANIFEST = "/_versions/{}.manifest"
LAST_VERSION = 2**64 - 1  # manifests are named by what is left up to here


def seal(uri: str) -> int:
    """Record the hashes of files that have none yet; returns how many. Writers may be at work meanwhile.

    Raises:
        DataError: an earlier list of hashes is damaged.
    """
    known, broken = _known(uri)
    if broken:
        raise DataError(f"{broken[0]}: this list of hashes is damaged; run `cacheloom verify`, then remove it")
    files = dict(_files(uri))
    unknown = {name: path for name, path in files.items() if name.startswith(CHANGING) or not known.get(name)}
    fresh = {
        name: mark
        for name, mark in _marks(unknown)
        if mark != known.get(name) and (not name.startswith(CHANGING) or _manifest(mark) in files)
    }
    if fresh:
        _write(uri, fresh)
    return len(fresh)


def forget(uri: str, names: Iterable[str]) -> None:
    """Know nothing any more of files that were removed for their damage: a later commit may use such a name again."""
    if gone := dict.fromkeys(names, FORGOTTEN):
        _write(uri, gone)


def damaged(uri: str) -> list[str]:
    """URIs of files whose bytes differ from their seal; a file that a clean-up removed is no damage."""
    known, wrong = _known(uri)
    files = dict(_files(uri))
    for name, mark in _marks(files):
        sealed, changes = known.get(name), name.startswith(CHANGING)
        # manifests of later versions have smaller names
        later = changes and _manifest(mark) in files and (not sealed or _manifest(mark) < _manifest(sealed))
        if mark != sealed and not later and (changes or sealed):
            wrong.append(files[name])
    return wrong


def agrees(uri: str, path: str) -> bool:
    """Whether a file that is there is the one that was sealed."""
    name = path[len(uri.rstrip("/")) :]
    return _known(uri)[0].get(name) in dict(_marks({name: path})).values()


def _write(uri: str, marks: dict[str, str]) -> None:
    body = json.dumps(marks, sort_keys=True)
    name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.json"
    objects.write(objects.join(uri, FOLDER, name), f"{xxhash.xxh3_64_hexdigest(body.encode())}\n{body}".encode())


def _marks(files: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(name, mark) of each file that is there: a clean-up or a writer's lost race may remove one after the listing."""
    for name, data in zip(files, objects.read_each(list(files.values())), strict=True):
        if data is not None:
            yield name, data.decode("utf-8", "replace") if name.startswith(CHANGING) else xxhash.xxh3_64_hexdigest(data)


def _manifest(text: str) -> str:
    """Name of the manifest of the version that a hint or tag names; nothing where it is unreadable."""
    try:
        return MANIFEST.format(f"{LAST_VERSION - json.loads(text)['version']:020d}")
    except (ValueError, KeyError, TypeError):
        return ""


def _files(uri: str) -> Iterator[tuple[str, str]]:
    """(name, URI) of every file that is sealed."""
    for path, _ in objects.listing(uri):
        name = path[len(uri.rstrip("/")) :]
        if name.startswith(SEALED) and not name.endswith(NOT_SEALED):
            yield name, path


def _known(uri: str) -> tuple[dict[str, str], list[str]]:
    """Hash (or text) by file name as sealed last, and the URIs of seals that are damaged themselves."""
    known: dict[str, str] = {}
    broken = []
    paths = [path for path, _ in objects.listing(objects.join(uri, FOLDER))]  # oldest first
    for path, data in zip(paths, objects.read_each(paths), strict=True):
        head, _, body = (data or b"").partition(b"\n")
        if head == xxhash.xxh3_64_hexdigest(body).encode():
            known |= json.loads(body)
        elif data is not None:
            broken.append(path)
    return known, broken
