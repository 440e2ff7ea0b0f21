"""Tensors as the bytes that tables hold: row-major, in their own dtype, viewed again without a copy."""

from __future__ import annotations

import warnings

import torch

from flux2_core.errors import DataError

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
    return view(payload, kind).view(-1, width)


def view(payload: bytes | memoryview, dtype: torch.dtype) -> torch.Tensor:
    """A flat tensor over a buffer, without a copy."""
    if len(payload) == 0:
        return torch.empty(0, dtype=dtype)
    with warnings.catch_warnings():  # the buffer is Arrow's and immutable; nobody writes into it
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(memoryview(payload), dtype=dtype)
