"""Rows in fp8 by one kernel: the largest value, the scale, and every value over it; imported only where Triton is.

Eager it takes six operations that go over the rows, most of them in fp32: of FLUX.2 [dev] at 1024 px 0.9 TB of a step's
traffic. Here a row is read twice, the second time out of the cache. The bits are those of `frozen_linear`'s eager form:
divisions are exactly rounded (Triton's own `/` is not), and a row of zeros keeps the scale 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

AT_ONCE = tl.constexpr(4096)  # values of a row; those of FLUX.2 [dev] have 6,144 to 55,296


@triton.jit
def _round(x, columns, payload, scales, width, apart, most, WEIGHED: tl.constexpr):  # type: ignore  # noqa: ANN001, ANN202
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, AT_ONCE)
    largest = tl.zeros([AT_ONCE], tl.float32)
    for start in range(0, width, AT_ONCE):
        at = start + places
        values = tl.load(x + row * apart + at, mask=at < width, other=0.0).to(tl.float32)
        if WEIGHED:
            values = values * tl.load(columns + at, mask=at < width, other=0.0)
        largest = tl.maximum(largest, tl.abs(values))
    scale = tl.div_rn(tl.max(largest, 0), most)
    tl.store(scales + row, scale)
    divisor = tl.where(scale == 0.0, 1.0, scale)
    for start in range(0, width, AT_ONCE):
        at = start + places
        values = tl.load(x + row * apart + at, mask=at < width, other=0.0).to(tl.float32)
        if WEIGHED:
            values = values * tl.load(columns + at, mask=at < width, other=0.0)
        tl.store(payload + row * width + at, tl.div_rn(values, divisor).to(tl.float8e4nv), mask=at < width)


def fp8(x_MK: torch.Tensor, columns_K: torch.Tensor | None, most: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows times a factor for each column, if any, in fp8, and the fp32 scale (M, 1) of each row."""
    x = x_MK if x_MK.stride(-1) == 1 else x_MK.contiguous()
    rows, width = x.shape
    payload = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, 1, device=x.device)
    weighed = columns_K is not None
    _round[(rows,)](x, columns_K if weighed else scales, payload, scales, width, x.stride(0), most, weighed)
    return payload, scales
