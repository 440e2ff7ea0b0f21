"""Small weights for the text encoder: optimum-quanto's quantisers, multiplied by torch alone (the home of optimum).

quanto picks its kernels by device and compiles some on first use (a C++ compiler or nvcc must be there), so rows would
depend on the machine. We take its numbers only: payload and scales are plain tensors, and a weight is rebuilt in the
encoder's precision for each matmul, the same way everywhere.

Legend: O outputs, I inputs, G values that share a scale.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qtypes

QTYPES = {"int8": "qint8", "int4": "qint4", "fp8": "qfloat8_e4m3fn"}
GROUPS = (128, 96, 64, 32)  # int4: values per scale and shift, the first that divides I (quanto's own rule)


class QuantizedLinear(torch.nn.Module):
    """A frozen Linear whose weight is kept in 8 or 4 bits; int8 and fp8 with a scale per output, int4 per group."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, *, kind: str) -> None:
        super().__init__()
        self.shape = weight_OI.shape
        parameter = partial(torch.nn.Parameter, requires_grad=False)
        self.bias = None if bias_O is None else parameter(bias_O)
        data, scale, shift = quantize(weight_OI, kind)
        self.data, self.scale = parameter(data), parameter(scale)
        self.shift = None if shift is None else parameter(shift)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `torch.nn.Linear`."""
        return torch.nn.functional.linear(x, dequantize(self.data, self.scale, self.shift).view(self.shape), self.bias)


def quantize(weight_OI: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Payload, scale and shift of a weight.

    Args:
        weight_OI: in the precision that it is rebuilt in.
        kind: "int8", "fp8" (payload (O, I), scale (O, 1), no shift) or "int4" (two values a byte, payload
            (O * I / G, G / 2) uint8, scale and shift (O * I / G, 1)).
    """
    qtype: Any = qtypes[QTYPES[kind]]
    if kind != "int4":
        scale = _nonzero(AbsmaxOptimizer()(weight_OI, qtype=qtype, axis=0))
        data = torch.ops.quanto.quantize_symmetric(weight_OI, dtype=qtype.dtype, axis=0, scale=scale)
        return data, scale, None
    inputs = weight_OI.shape[1]
    group = next((size for size in GROUPS if inputs % size == 0), inputs)
    scale, shift = MaxOptimizer()(weight_OI, qtype=qtype, axis=0, group_size=group)
    scale = _nonzero(scale)
    data = torch.ops.quanto.quantize_affine(weight_OI, bits=4, axis=0, group_size=group, scale=scale, shift=shift)
    return data[:, ::2] | data[:, 1::2] << 4, scale, shift


def dequantize(data: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    """The weight that `quantize` stands for, in the scale's precision; of int4 in rows of one group."""
    if shift is None:
        return data.to(scale.dtype) * scale
    pairs = torch.stack([data & 15, data >> 4], dim=-1).flatten(1)
    return pairs.to(scale.dtype) * scale - shift


def _nonzero(scale: torch.Tensor) -> torch.Tensor:
    """A row of zeros has the scale zero, and would become NaN."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)
