"""The bytes of a picture, wherever it lies: a file, an object, or a member of a tar, Parquet or Lance container.

A picture's URI is a local path, `s3://bucket/key`, `FILE.tar#member`, `FILE.parquet#row` or `TABLE.lance#row`.
"""

from __future__ import annotations

import os
import re

from flux2_core.data.sources import lance_rows, parquet_rows, tar_members
from flux2_core.data.sources.walls import too_large
from flux2_core.errors import DataError
from flux2_core.store import objects

_MEMBER = re.compile(r"(?i)\.(tar|parquet|lance)#")


def split(uri: str) -> tuple[str, str | None]:
    """(container, member) of a URI; member is None for a file or object of its own.

    A `#` counts only behind a container's suffix, and never in the name of a local file that exists.
    """
    for match in _MEMBER.finditer(uri):
        container = uri[: match.end() - 1]
        if objects.is_remote(uri) or (os.path.exists(container) and not os.path.lexists(uri)):
            return container, uri[match.end() :]
    return uri, None


def is_container(name: str) -> bool:
    """Whether a name is that of a tar, Parquet or Lance container."""
    return name.lower().endswith((".tar", ".parquet", ".lance"))


def read(uri: str) -> bytes:
    """The bytes of one picture.

    Raises:
        DataError: there is none, it cannot be read or is too large: the reason, without the picture's URI.
        SetupError: the object store did not answer.
    """
    container, member = split(uri)
    try:
        data = _whole(uri) if member is None else _member(container, member)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})") from error
    if data is None:
        raise DataError("the row holds no picture bytes")
    return data


def _whole(uri: str) -> bytes:
    if not objects.is_remote(uri) and (problem := too_large(os.stat(uri).st_size)):  # on a store: while listing
        raise DataError(problem)
    return objects.read(uri)


def _member(container: str, member: str) -> bytes | None:
    kind = container.lower()
    if kind.endswith(".tar"):
        return tar_members.read(container, member)
    if not member.isdecimal():
        raise DataError(f"{member!r} is no number of a row")
    return (parquet_rows if kind.endswith(".parquet") else lance_rows).read(container, int(member))
