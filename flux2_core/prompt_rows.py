"""Prompt rows: what is stored of a prompt, and how the transformer's full (512, D) input is rebuilt from it.

Legend: L = max_length, n = real tokens, D = row width.

With left padding a prompt is [L - n pad rows | n own rows], and every pad row is one constant vector: a ragged table
stores each text's own rows, and the pad row once. A full table (klein, or `text.pads = "stored"`) stores all L rows.
The template before the caption is stored with each text: left padding puts it at other positions for another length,
and its rows then differ in their last bits (docs/decisions/0002).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from flux2_core.errors import DataError

PAD_KEY = "pad"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def to_bytes(rows: torch.Tensor) -> bytes:
    """Row-major bytes of a tensor in its own dtype."""
    return rows.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()


def from_bytes(payload: bytes | memoryview, *, dtype: str, width: int) -> torch.Tensor:
    """View stored bytes as rows (n, width), without a copy.

    Raises:
        DataError: the length is not a whole number of rows.
    """
    kind = DTYPES[dtype]
    if len(payload) % (width * kind.itemsize):
        raise DataError(f"a stored row of {len(payload)} bytes is not a multiple of {width} {dtype} values")
    if len(payload) == 0:
        return torch.empty((0, width), dtype=kind)
    with warnings.catch_warnings():  # the buffer is Arrow's and immutable; nobody writes into it
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(memoryview(payload), dtype=kind).view(-1, width)


def rebuild(own_ND: torch.Tensor, pad_1D: torch.Tensor | None, *, max_length: int) -> torch.Tensor:
    """Rebuild the full prompt embedding (max_length, D); see `rebuild_into`."""
    full_LD = own_ND.new_empty(max_length, own_ND.shape[1])
    rebuild_into(full_LD, own_ND, pad_1D)
    return full_LD


def rebuild_into(full_LD: torch.Tensor, own_ND: torch.Tensor, pad_1D: torch.Tensor | None) -> None:
    """Fill a full prompt embedding: pads first, the text's own rows at the end.

    Args:
        full_LD: what is filled.
        own_ND: the text's own rows; all of them where `pad_1D` is None.
        pad_1D: the pad row of a ragged table.

    Raises:
        DataError: there are more rows than L, or too few in a full table.
    """
    pads = full_LD.shape[0] - own_ND.shape[0]
    if pads < 0 or (pads and pad_1D is None):
        raise DataError(f"a stored prompt has {own_ND.shape[0]} rows, text.max_length={full_LD.shape[0]}")
    if pad_1D is not None:
        full_LD[:pads] = pad_1D
    full_LD[pads:] = own_ND


def width(fingerprint: Mapping[str, Any]) -> int:
    """Row width that a text table's fingerprint states."""
    return int(fingerprint["width"])
