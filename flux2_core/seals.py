"""Hashes of a table's files, kept beside it: damage that no row's checksum can see.

Row checksums cover payloads and attributes. They cannot see a flipped bit in a manifest's padding, in a transaction's
bloom filter or in an older version. Lance's files never change once written, so a list of their hashes settles it:
`seal` after a stage has committed, `damaged` in `verify`. Blob files (> 99 % of the bytes) are left to the rows'
checksums; `seal` reads the small files that are new only.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator

import xxhash

from flux2_core import objects
from flux2_core.errors import DataError

FOLDER = "_seals"  # inside the table's folder; Lance's clean-up leaves unknown folders alone
SEALED = ("/data/", "/_versions/", "/_transactions/", "/_deletions/", "/_indices/")
NOT_SEALED = (".blob", "latest_version_hint.json")  # the hint is rewritten by every commit and only a hint


def seal(uri: str) -> int:
    """Record the hashes of files that have none yet; returns how many. Writers may be at work meanwhile."""
    known = _known(uri)
    fresh = {}
    for path, name in _files(uri):
        if name not in known:
            try:
                fresh[name] = xxhash.xxh3_64_hexdigest(objects.read(path))
            except FileNotFoundError:  # a clean-up or a writer's lost race removed it since the listing
                continue
    if fresh:
        body = json.dumps(fresh, sort_keys=True)
        seal_of_seal = xxhash.xxh3_64_hexdigest(body.encode())
        objects.write(objects.join(uri, FOLDER, f"{uuid.uuid4().hex}.json"), f"{seal_of_seal}\n{body}".encode())
    return len(fresh)


def damaged(uri: str) -> list[str]:
    """URIs of files whose bytes differ from their seal; a file that a clean-up removed is no damage."""
    known = _known(uri)
    wrong = []
    for path, name in _files(uri):
        expected = known.get(name)
        if expected is not None and xxhash.xxh3_64_hexdigest(objects.read(path)) != expected:
            wrong.append(path)
    return wrong


def _files(uri: str) -> Iterator[tuple[str, str]]:
    for path, _ in objects.listing(uri):
        name = path[len(uri.rstrip("/")) :]
        if name.startswith(SEALED) and not name.endswith(NOT_SEALED):
            yield path, name


def _known(uri: str) -> dict[str, str]:
    """Hash by file name, out of all seals.

    Raises:
        DataError: a seal is damaged itself.
    """
    known: dict[str, str] = {}
    for path, _ in objects.listing(objects.join(uri, FOLDER)):
        head, _, body = objects.read(path).partition(b"\n")
        if head != xxhash.xxh3_64_hexdigest(body).encode():
            raise DataError(f"{path}: this list of hashes is damaged; remove it and run `cacheloom verify` again")
        known.update(json.loads(body))
    return known
