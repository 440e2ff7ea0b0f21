"""Prompt rows: how a prompt is stored, and how the transformer's full (512, D) input is rebuilt from it.

Legend: B prompts, L = max_length, n = rows of one prompt, D = row width.

With left padding a prompt is [L - n pad rows | n own rows], and every pad row is one constant vector: a ragged table
stores each text's own rows, and the pad row once. A full table (klein, or `text.pads = "stored"`) stores all L rows.
The template before the caption is stored with each text: left padding puts it at other positions for another length,
and its rows then differ in their last bits (docs/decisions/0002).

Payload of a row: n * D values of the table's dtype; with `text.int8_rows` n scales (fp32, little-endian) and then
n * D bytes, a value being its byte (-127..127) times its row's scale, rounded to the table's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flux2_core.errors import DataError
from flux2_core.model.families import FAMILIES
from flux2_core.model.tensor_bytes import DTYPES, from_bytes, to_bytes, view
from flux2_core.store import schemas
from flux2_core.store.reader import Reader

PAD_KEY = "pad"
INT8_MOST = 127


def encode(rows_ND: torch.Tensor, fingerprint: Mapping[str, Any]) -> bytes:
    """Payload of a prompt's rows in a table of this fingerprint."""
    if not fingerprint.get("int8_rows"):
        return to_bytes(rows_ND)
    values = rows_ND.float()
    scale_N1 = values.abs().amax(1, keepdim=True) / INT8_MOST
    steps = (values / scale_N1.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
    return to_bytes(scale_N1) + to_bytes(steps)


def decode(payload: bytes | memoryview, fingerprint: Mapping[str, Any]) -> torch.Tensor:
    """Rows (n, D) of a payload in the table's dtype; without a copy where they are not in 8 bits.

    Raises:
        DataError: the length is not a whole number of rows.
    """
    if not fingerprint.get("int8_rows"):
        return from_bytes(payload, dtype=fingerprint["dtype"], width=width(fingerprint))
    count, odd = divmod(len(payload), row_bytes(fingerprint))
    if odd:
        raise DataError(f"{len(payload)} stored bytes are not rows of {width(fingerprint)} int8 values and a scale")
    buffer, scales = memoryview(payload), count * torch.float32.itemsize
    steps_ND = view(buffer[scales:], torch.int8).view(count, width(fingerprint))
    return (steps_ND * view(buffer[:scales], torch.float32).view(-1, 1)).to(DTYPES[fingerprint["dtype"]])


def size_bytes(tokens: int, fingerprint: Mapping[str, Any]) -> int:
    """Bytes of the payload of a prompt of so many tokens, cut to L."""
    length = int(fingerprint["max_length"])
    return row_bytes(fingerprint) * (min(tokens, length) if ragged(fingerprint) else length)


def row_bytes(fingerprint: Mapping[str, Any]) -> int:
    """Bytes of one row of a prompt, its scale included."""
    if fingerprint.get("int8_rows"):
        return width(fingerprint) + torch.float32.itemsize
    return width(fingerprint) * DTYPES[fingerprint["dtype"]].itemsize


def pad_row(reader: Reader, fingerprint: Mapping[str, Any], *, pad_rows: str) -> torch.Tensor | None:
    """What `full` puts in the place of pads, (1, D): the table's pad row, zeros, or None (pads are stored as they are).

    Args:
        reader: of the text table; must know `PAD_KEY` where the table is ragged.
        fingerprint: of the table.
        pad_rows: "reference" or "zeros" (`train.pad_rows`); the projection has no bias, so its zeros are zeros.
    """
    if pad_rows == "zeros":
        return torch.zeros(1, width(fingerprint), dtype=DTYPES[fingerprint["dtype"]])
    return decode(reader.fetch([PAD_KEY])[0].payload, fingerprint) if ragged(fingerprint) else None


def full(
    reader: Reader, keys: Sequence[str], fingerprint: Mapping[str, Any], *, pad_1D: torch.Tensor | None
) -> torch.Tensor:
    """The transformer's input (B, L, D) for cached texts; rows in their own precision are read straight into it.

    Raises:
        DataError: a row is missing, corrupt, or does not fit the fingerprint.
    """
    length = fingerprint["max_length"]
    out_BLD = torch.empty(len(keys), length, width(fingerprint), dtype=DTYPES[fingerprint["dtype"]])
    tails = [
        rows_LD[length - _count(reader.size(key), fingerprint) :] for rows_LD, key in zip(out_BLD, keys, strict=True)
    ]
    if fingerprint.get("int8_rows"):
        rows = reader.fetch(keys)
        for tail_ND, row in zip(tails, rows, strict=True):
            tail_ND.copy_(decode(row.payload, fingerprint))
    else:
        rows = reader.fetch_into(keys, [memoryview(tail.view(-1).view(torch.uint8).numpy()) for tail in tails])
    if pad_1D is not None:
        left = FAMILIES[fingerprint["family"]].padding_side == "left"
        for rows_LD, row in zip(out_BLD, rows, strict=True):
            tokens = int(row.attributes[schemas.TOKENS])
            rows_LD[slice(length - tokens) if left else slice(tokens, None)] = pad_1D
    return out_BLD


def width(fingerprint: Mapping[str, Any]) -> int:
    """Row width that a text table's fingerprint states."""
    return int(fingerprint["width"])


def ragged(fingerprint: Mapping[str, Any]) -> bool:
    """Whether a table stores each text's own rows and the pad row once."""
    return bool(fingerprint["pads"] != "stored")


def _count(size: int, fingerprint: Mapping[str, Any]) -> int:
    """Rows in a payload of so many bytes."""
    length = fingerprint["max_length"]
    count, odd = divmod(size, row_bytes(fingerprint))
    if odd or count > length or (count < length and not ragged(fingerprint)):
        raise DataError(
            f"a stored prompt has {size} bytes, which are not the rows of width {width(fingerprint)} that "
            f"text.max_length={length} asks for: run `cacheloom verify`"
        )
    return count
