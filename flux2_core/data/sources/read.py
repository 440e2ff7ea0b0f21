"""The bytes of a picture, wherever it lies: a file, an object, or a member of a container.

A picture's URI is a local path, `s3://bucket/key`, `FILE.tar#member`, `FILE.parquet#row` or `TABLE.lance#row`.
"""

from __future__ import annotations

import os
import re

from flux2_core.data.sources.containers import CONTAINERS
from flux2_core.data.sources.walls import too_large
from flux2_core.errors import DataError
from flux2_core.store import objects


def split(uri: str) -> tuple[str, str, str] | None:
    """(container, its suffix in `CONTAINERS`, address in it) of a URI; None for a file or object of its own.

    A `#` counts only behind a container's suffix, and never in the name of a local file that exists.
    """
    for match in re.finditer(f"(?i)({'|'.join(map(re.escape, CONTAINERS))})#", uri):
        container = uri[: match.end() - 1]
        if objects.is_remote(uri) or (os.path.exists(container) and not os.path.lexists(uri)):
            return container, match[1].lower(), uri[match.end() :]
    return None


def read(uri: str) -> bytes:
    """The bytes of one picture.

    Raises:
        DataError: there is none, it cannot be read or is too large: the reason, without the picture's URI.
        SetupError: the object store did not answer.
    """
    try:
        if (inside := split(uri)) is None:
            return _whole(uri)
        container, suffix, address = inside
        data = CONTAINERS[suffix].read(container, address)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})") from error
    if data is None:
        raise DataError("the row holds no picture bytes")
    return data


def _whole(uri: str) -> bytes:
    if not objects.is_remote(uri) and (problem := too_large(os.stat(uri).st_size)):  # on a store: while listing
        raise DataError(problem)
    return objects.read(uri)
