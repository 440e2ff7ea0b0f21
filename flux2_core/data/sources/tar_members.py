"""Pictures in plain tar files (WebDataset shards): walked once, by whoever plans, then read by the places found."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from flux2_core.data.sources.walls import CAPTION_BYTES, LONGEST_NAME, METADATA_BYTES, refused, too_large
from flux2_core.errors import DataError
from flux2_core.store import objects
from flux2_core.store.random_access import mark, open_at, planned, version

TEXTS = (".txt", ".json")
BUFFER_BYTES = 4 * 2**20  # of a shard on a store: 128 requests for one of 512 MB, instead of one a member
HEADER_BYTES = 2**20  # of one header: a long name, the fields of pax
# What tarfile was seen to raise on unsound headers: a chain of them is read by recursion, numbers as they come
_UNSOUND = (tarfile.TarError, EOFError, ValueError, ArithmeticError, LookupError, RecursionError)


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
        DataError: it is no plain tar, cut short, or has headers that are none; names it.
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


class _Headers:
    """What tarfile reads of an archive: its headers. A name of 64 GiB or less than no bytes is none of a sound one."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self.file.read(size)


def _walk(uri: str, seen: tuple[int, str], known: str) -> Iterator[Member]:
    held, last = 0, -1
    try:
        with open_at(uri, seen, buffer_bytes=BUFFER_BYTES) as file, _opened(file) as tar:
            for info in tar:
                if info.size < 0 or tar.offset <= last:  # it would be walked for ever
                    raise tarfile.ReadError(f"{info.name[:100]!r} has a negative size")
                last = tar.offset
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep every member, 1 kB each
                name = os.path.normpath(info.name)
                if not info.isdir() and not os.path.basename(name).startswith("."):
                    yield (member := _member(file, info, name=name, known=known))
                    held += len(member.text or b"")
                if held > METADATA_BYTES:
                    told = f"over {METADATA_BYTES // 2**20} MiB of captions"
                    raise DataError(f"{uri}: {told}: make several archives of it")
    except _UNSOUND as error:
        raise DataError(
            f"{uri}: not a whole, uncompressed tar file ({error}); copy it again, or unpack and pack it with `tar -cf`"
        ) from error


def _opened(file: IO[bytes]) -> tarfile.TarFile:
    return tarfile.open(fileobj=_Headers(file), mode="r:")  # type: ignore[call-overload]


def _member(file: IO[bytes], info: tarfile.TarInfo, *, name: str, known: str) -> Member:
    problem = refused(info.name)
    if problem is None and (not info.isreg() or info.issparse()):
        problem = "not a regular file of the archive (a link, device or sparse file)"
    problem = problem or too_large(info.size)
    text = None
    if problem is None and os.path.splitext(name)[1].lower() in TEXTS and info.size <= CAPTION_BYTES:
        file.seek(info.offset_data)
        text = file.read(info.size)
    stamp = f"{known}.{info.offset_data}.{info.offset_data + info.size}"
    return Member(name[:LONGEST_NAME], stamp, problem, text)
