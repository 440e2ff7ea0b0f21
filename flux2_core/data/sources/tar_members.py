"""Pictures in plain tar files (WebDataset shards): walked once, by whoever plans, then read by the places found."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from flux2_core.data.sources.walls import CAPTION_BYTES, refused, too_large
from flux2_core.errors import DataError
from flux2_core.store import objects
from flux2_core.store.random_access import mark, open_at, planned, version

TEXTS = (".txt", ".json")
BUFFER_BYTES = 4 * 2**20  # of a shard on a store: 128 requests for one of 512 MB, instead of one a member


@dataclass(frozen=True, slots=True)
class Member:
    """A member that is looked at: its normalised name, its stamp, why it is refused, and what a caption file holds.

    A caption file over `CAPTION_BYTES` is not read: its text is None.
    """

    name: str
    stamp: str
    problem: str | None
    text: bytes | None


def members(uri: str) -> list[Member]:
    """All members but folders and hidden ones, in their order, as the archive is now.

    Raises:
        DataError: it is no plain tar, or cut short; names it.
    """
    try:
        seen = version(uri, fresh=True)
        return list(_walk(uri, seen, mark(uri, seen)))
    except OSError as error:
        raise DataError(f"{uri}: cannot be read ({error.strerror or error})") from error


def read(uri: str, stamp: str, _name: str) -> bytes:
    """A member's bytes.

    Args:
        uri: The archive.
        stamp: The mark that it must have, and the span of the member.

    Raises:
        DataError: it is another archive by now.
    """
    known, start, end = stamp.split(".")
    seen, span = planned(uri, known), (int(start), int(end))
    return objects.read(uri, span=span, of=seen) if span[0] < span[1] else b""


def _walk(uri: str, seen: tuple[int, str], known: str) -> Iterator[Member]:
    try:
        with open_at(uri, seen, buffer_bytes=BUFFER_BYTES) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep every member, 1 kB each
                name = os.path.normpath(info.name)
                if not info.isdir() and not os.path.basename(name).startswith("."):
                    stamp = f"{known}.{info.offset_data}.{info.offset_data + info.size}"
                    yield _member(tar, info, name=name, stamp=stamp)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{uri}: not a whole, uncompressed tar file ({error}); copy it again, or unpack and pack it with `tar -cf`"
        ) from error


def _member(tar: tarfile.TarFile, info: tarfile.TarInfo, *, name: str, stamp: str) -> Member:
    problem = refused(info.name)
    if problem is None and (not info.isreg() or info.issparse()):
        problem = "not a regular file of the archive (a link, device or sparse file)"
    problem = problem or too_large(info.size)
    text = None
    if problem is None and os.path.splitext(name)[1].lower() in TEXTS and info.size <= CAPTION_BYTES:
        reader = tar.extractfile(info)
        text = reader.read() if reader is not None else None
    return Member(name, stamp, problem, text)
