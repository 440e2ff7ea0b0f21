"""Pictures in plain tar files (WebDataset shards): an index of offsets, read once a process, then bytes by offset."""

from __future__ import annotations

import os
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from flux2_core.data.sources.walls import CAPTION_BYTES, refused, too_large
from flux2_core.errors import DataError
from flux2_core.store import objects
from flux2_core.store.random_access import open_at, version

TEXTS = (".txt", ".json")
BUFFER_BYTES = 4 * 2**20  # of a shard on a store: 128 requests for one of 512 MB, instead of one a member
INDEXES = 64  # kept in memory, about 2 MB each at 10,000 members

_places: dict[tuple[str, int, str], dict[str, tuple[int, int]]] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Member:
    """A member that is looked at: its normalised name, its span, why it is refused, and what a caption file holds.

    A caption file over `CAPTION_BYTES` is not read: its text is None.
    """

    name: str
    span: tuple[int, int]
    problem: str | None
    text: bytes | None


def members(uri: str) -> list[Member]:
    """All members but folders and hidden ones, in their order, as the archive is now; `read` finds them by this.

    Raises:
        DataError: it is no plain tar, or cut short; names it.
    """
    try:
        key = (uri, *version(uri, fresh=True))
        found = list(_walk(uri))
    except OSError as error:
        raise DataError(f"{uri}: cannot be read ({error.strerror or error})") from error
    while len(_places) >= INDEXES:
        del _places[next(iter(_places))]
    _places[key] = {member.name: member.span for member in found if member.problem is None}
    return found


def read(uri: str, name: str) -> bytes:
    """A member's bytes.

    Raises:
        DataError: the archive has no such member now.
    """
    key = (uri, *version(uri))
    with _lock:  # threads ask for the same shard at once
        if key not in _places:
            members(uri)
        span = _places[key].get(name)
    if span is None:
        raise DataError("the archive has no such member")
    return objects.read(uri, span=span) if span[0] < span[1] else b""


def _walk(uri: str) -> Iterator[Member]:
    try:
        with open_at(uri, buffer_bytes=BUFFER_BYTES) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep every member, 1 kB each
                name = os.path.normpath(info.name)
                if not info.isdir() and not os.path.basename(name).startswith("."):
                    yield _member(tar, info, name)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{uri}: not a whole, uncompressed tar file ({error}); copy it again, or unpack and pack it with `tar -cf`"
        ) from error


def _member(tar: tarfile.TarFile, info: tarfile.TarInfo, name: str) -> Member:
    problem = refused(info.name)
    if problem is None and (not info.isreg() or info.issparse()):
        problem = "not a regular file of the archive (a link, device or sparse file)"
    problem = problem or too_large(info.size)
    text = None
    if problem is None and os.path.splitext(name)[1].lower() in TEXTS and info.size <= CAPTION_BYTES:
        reader = tar.extractfile(info)
        text = reader.read() if reader is not None else None
    return Member(name, (info.offset_data, info.offset_data + info.size), problem, text)
