"""A file on the disk whole or not at all: written beside its name, made durable, and only then given the name.

What a kill, a full disk or a power cut leaves is the file of before. A killed process may leave its half-written file;
its name says so by how it begins, and nothing counts or copies it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from flux2_core.errors import SetupError

TEMPORARY = ".tmp-"  # begins the names of half-written files
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def write(path: Path, data: bytes | memoryview) -> None:
    """Put bytes into a file; its folder is made if missing.

    Raises:
        SetupError: the disk is full.
    """
    with writing(path) as stream:
        stream.write(data)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Open what becomes the file when the block ends without an error; its folder is made if missing.

    Raises:
        SetupError: the disk is full.
    """
    temporary = path.parent / f"{TEMPORARY}{path.name}-{uuid.uuid4().hex}"
    try:
        with enough_room(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with synced(temporary) as stream:
                yield stream
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def synced(path: Path) -> Iterator[BinaryIO]:
    """Open a new file whose bytes are on disk when the block ends; what it holds until then is anything."""
    with path.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk: a file that was renamed into it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def enough_room(place: str | Path) -> Iterator[None]:
    """Say in words when a disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise SetupError(
                f"{place}: the disk is full or a quota is reached ({error}); free space and run again"
            ) from error
        raise
