"""Small JSON objects of a cache (indexes, leases) that carry a hash of all else in them: a flipped bit is seen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flux2_core.errors import DataError
from flux2_core.store import objects
from flux2_core.store.hashing import digest

SEAL = "seal"


def encode(tree: Mapping[str, Any]) -> bytes:
    """Bytes of an object, sealed."""
    return json.dumps({**tree, SEAL: digest(dict(tree))}, indent=1, sort_keys=True).encode()


def decode(data: bytes) -> dict[str, Any] | None:
    """An object as it was written, or None where a bit of it has changed since."""
    try:
        tree = json.loads(data)
        seal = tree.pop(SEAL)
    except (ValueError, KeyError, AttributeError):
        return None
    return tree if seal == digest(tree) and encode(tree) == data else None


def read(uri: str) -> dict[str, Any]:
    """The object at a URI.

    Raises:
        FileNotFoundError: nothing is there.
        DataError: it is damaged.
    """
    if (tree := decode(objects.read(uri))) is None:
        raise DataError(f"{uri}: damaged, so what it names cannot be known; run `cacheloom cache` again, or remove it")
    return tree
