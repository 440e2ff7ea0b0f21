"""Keys of cached rows: a hash of the table's fingerprint and of what one row alone depends on, never a path or name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flux2_core.data.pictures.transform import Transform
from flux2_core.store.hashing import digest

MASK = "mask"  # what sets the key of a picture's mask apart from that of its latents


def row_key(fingerprint: Mapping[str, Any], *content: str | int | bool) -> str:
    """Key of one row: the table's fingerprint and what this row alone depends on."""
    return digest([digest(dict(fingerprint)), *content])


def text_key(fingerprint: Mapping[str, Any], text: str) -> str:
    """Key of a text's row."""
    return row_key(fingerprint, text)


def picture_key(fingerprint: Mapping[str, Any], sha256: str, t: Transform) -> str:
    """Key of a picture's latents: its source bytes and what training sees of them."""
    return row_key(fingerprint, sha256, *_geometry(t))


def mask_key(fingerprint: Mapping[str, Any], sha256: str, t: Transform) -> str:
    """Key of a mask's row."""
    return row_key(fingerprint, MASK, sha256, *_geometry(t))


def _geometry(t: Transform) -> tuple[int | bool, ...]:
    return (t.bucket_height, t.bucket_width, t.resize_height, t.resize_width, t.crop_top, t.crop_left, t.flip)
