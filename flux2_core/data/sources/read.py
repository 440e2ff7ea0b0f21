"""The bytes of a picture, wherever it lies: a file, an object, or a member of a container.

A picture's URI is a local path, `s3://bucket/key`, `FILE.tar@STAMP#member`, `FILE.parquet@STAMP#row` or
`TABLE.lance@STAMP#row` (`#row:column` where the data set names one). The stamp says which file or version was planned,
and where in it the picture lies: from another one nothing is read, or captions would go to the pictures that stand in
their rows now.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

from flux2_core.data.sources.containers import CONTAINERS
from flux2_core.data.sources.walls import too_large
from flux2_core.errors import DataError
from flux2_core.store import objects

_STAMP = "@[0-9a-f.]+"
Item = TypeVar("Item")


class Inside(NamedTuple):
    """Where in a container a picture lies; `suffix` is that in `CONTAINERS`."""

    container: str
    suffix: str
    stamp: str
    address: str


def split(uri: str) -> Inside | None:
    """The parts of a URI that leads into a container; None for a file or object of its own.

    A `#` counts only behind a container's suffix, and never in the name of a local file that exists.
    """
    for match in re.finditer(f"(?i)({_suffixes()})({_STAMP})?#", uri):
        container = uri[: match.end(1)]
        if objects.is_remote(uri) or (os.path.exists(container) and not os.path.lexists(uri)):
            return Inside(container, match[1].lower(), (match[2] or "@")[1:], uri[match.end() :])
    return None


def plain(uri: str) -> str:
    """A URI as a person knows it: without its stamp."""
    return re.sub(f"(?i)({_suffixes()}){_STAMP}#", r"\1#", uri, count=1)


def group(uri: str) -> str | None:
    """What is read as a whole to get at a picture, a row group; None where it is the picture alone."""
    found = re.search(f"(?i)({_suffixes()}){_STAMP}#", uri)
    return uri[: found.end()] if found and CONTAINERS[found[1].lower()].in_groups else None


def together(items: Iterable[Item], *, uri: Callable[[Item], str], least: int, most: int) -> Iterator[list[Item]]:
    """Items in lists of at least `least`, each going on to the end of the row group that it is in, up to `most`."""
    part: list[Item] = []
    last = None
    for item in items:
        here = group(uri(item))
        if len(part) >= (least if here is None or here != last else most):
            yield part
            part = []
        part.append(item)
        last = here
    if part:
        yield part


def read(uri: str) -> bytes:
    """The bytes of one picture.

    Raises:
        DataError: there is none, it cannot be read or is too large: the reason, without the picture's URI.
        SetupError: the object store did not answer.
    """
    try:
        if (inside := split(uri)) is None:
            return _whole(uri)
        if not inside.stamp:
            raise DataError("its address is that of an older cacheloom: run `cacheloom cache` again")
        data = CONTAINERS[inside.suffix].read(inside.container, inside.stamp, inside.address)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})") from error
    if data is None:
        raise DataError("the row holds no picture bytes")
    if problem := too_large(len(data)):
        raise DataError(problem)
    return data


def _suffixes() -> str:
    return "|".join(map(re.escape, CONTAINERS))


def _whole(uri: str) -> bytes:
    if not objects.is_remote(uri) and (problem := too_large(os.stat(uri).st_size)):  # on a store: while listing
        raise DataError(problem)
    return objects.read(uri)
