"""One cached row, and the checksum that vouches for all of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import xxhash

from flux2_core.store import hashing, schemas

SCHEMAS: dict[str, Callable[[], pa.Schema]] = {
    schemas.KIND_TEXT: schemas.text_schema,
    schemas.KIND_LATENTS: schemas.latents_schema,
}


@dataclass(frozen=True, slots=True)
class Row:
    """One cached row. `attributes` holds the table's columns beside key, checksum and payload."""

    key: str
    payload: bytes | memoryview
    attributes: dict[str, str | int]


def attribute_names(kind: str) -> list[str]:
    """Columns of a kind of table ("text", "latents") beside key, checksum and payload."""
    return [name for name in SCHEMAS[kind]().names if name not in (schemas.KEY, schemas.CHECKSUM, schemas.PAYLOAD)]


def checksum(row: Row) -> int:
    """xxh3_64 over key, attributes and payload: a flipped bit in any column is seen, and so is a swap of two rows."""
    hasher = xxhash.xxh3_64(head(row.key, row.attributes))
    hasher.update(row.payload)
    return hasher.intdigest()


def head(key: str, attributes: dict[str, str | int]) -> bytes:
    """What the checksum covers before the payload."""
    return hashing.canonical([key, attributes]).encode()
