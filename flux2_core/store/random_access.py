"""A file or object opened for reading anywhere in it, without reading it whole, at one version of it."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import IO

from flux2_core.errors import DataError
from flux2_core.store import hashing, objects

MARK = 12  # hex digits


def version(uri: str, *, fresh: bool = False) -> tuple[int, str]:
    """`objects.stamp`; of an object of a store it is kept (30 ms a picture otherwise) until `fresh` asks anew."""
    if not objects.is_remote(uri):
        return objects.stamp(uri)
    if fresh:
        _kept_version.cache_clear()
    return _kept_version(uri)


@functools.lru_cache(maxsize=4096)
def _kept_version(uri: str) -> tuple[int, str]:
    return objects.stamp(uri)


@functools.lru_cache(maxsize=4096)
def mark(uri: str, seen: tuple[int, str]) -> str:
    """By what other machines know a file at this version, which may be copies: bytes out of all of it, or its ETag."""
    facts = list(seen) if objects.is_remote(uri) else hashing.sampled(Path(uri))
    return hashing.digest(facts)[:MARK]


def planned(uri: str, wanted: str) -> tuple[int, str]:
    """The version of a file whose mark is the wanted one.

    Raises:
        DataError: the file is another one by now.
    """
    if mark(uri, seen := version(uri)) != wanted and mark(uri, seen := version(uri, fresh=True)) != wanted:
        raise DataError(f"its container {objects.CHANGED}")
    return seen


class _Object(io.RawIOBase):
    """An object of a store; every read is one ranged request."""

    def __init__(self, uri: str, seen: tuple[int, str]) -> None:
        self._uri, self._at, self._seen = uri, 0, seen

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._seen[0]}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        end = min(self._at + len(buffer), self._seen[0])
        if end <= self._at:
            return 0
        data = objects.read(self._uri, span=(self._at, end), of=self._seen)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def open_at(uri: str, seen: tuple[int, str], *, buffer_bytes: int) -> IO[bytes]:
    """Open for reading at a `version`; a store is asked for so many bytes at a time.

    Raises:
        OSError: nothing is there, or another version; of an object, when it is read.
    """
    if objects.is_remote(uri):
        return io.BufferedReader(_Object(uri, seen), buffer_bytes)
    return objects.opened(uri, of=seen)
