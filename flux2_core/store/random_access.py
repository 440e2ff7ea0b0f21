"""A file or object opened for reading anywhere in it, without reading it whole."""

from __future__ import annotations

import functools
import io
from typing import IO

from flux2_core.store import objects


def version(uri: str, *, fresh: bool = False) -> tuple[int, str]:
    """`objects.stamp`; of an object of a store it is kept (30 ms a picture otherwise) until `fresh` asks anew.

    A container that is replaced meanwhile shows in its pictures' sha256.
    """
    if not objects.is_remote(uri):
        return objects.stamp(uri)
    if fresh:
        _kept_version.cache_clear()
    return _kept_version(uri)


@functools.lru_cache(maxsize=4096)
def _kept_version(uri: str) -> tuple[int, str]:
    return objects.stamp(uri)


class _Object(io.RawIOBase):
    """An object of a store; every read is one ranged request."""

    def __init__(self, uri: str) -> None:
        self._uri, self._at, self._size = uri, 0, version(uri)[0]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        data = objects.read(self._uri, span=(self._at, end))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def open_at(uri: str, *, buffer_bytes: int) -> IO[bytes]:
    """Open for reading; a store is asked for so many bytes at a time.

    Raises:
        FileNotFoundError: nothing is there.
    """
    if objects.is_remote(uri):
        return io.BufferedReader(_Object(uri), buffer_bytes)
    return open(uri, "rb")
