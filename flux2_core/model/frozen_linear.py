"""A frozen Linear with few bits a weight: payload and scales are plain frozen Parameters, and autograd keeps only them.

Every weight row has its own scales, so a shard of rows is whole: FSDP2 shards and gathers the small bytes. One copy
serves both passes. `int8`, `int4`, `nf4` and `fp8` are widened to the compute precision, layer by layer, and multiplied
there. `int8-matmul` and `fp8-matmul` also round the other factor row by row and multiply in 8 bits: y = x W^T has W's
row scales on its columns; in dx = dy W they lie inside the sum, so they are folded into dy before dy is rounded.

Legend: M tokens (all leading dimensions), K inputs, N outputs, G = 64 weights of a group of four bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flux2_core import accelerator
from flux2_core.errors import UsageError

GROUP = 64  # weights of four bits per scale: 4.5 bits a weight
INT8_MOST = 127.0
FP8 = torch.float8_e4m3fn
FP8_MOST = torch.finfo(FP8).max  # 448
MATMUL = "-matmul"
NEEDS = {"fp8-matmul": (8, 9), "int8-matmul": (7, 5)}  # compute capability
FAST_ACCUMULATION = False  # of fp8 products, in fewer bits; what it gains and costs, bench/gpu_step measures
BITS = {"int8": 8, "fp8": 8, "int4": 4, "nf4": 4}
NF4 = (  # QLoRA's levels (arXiv 2305.14314): means of equal parts of a normal, between -1 and 1, with 0 among them
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class FrozenLinear(nn.Module):
    """Stands in for a frozen `nn.Linear` without bias: `payload` (N, K or K/2) and `scale` (N, 1 or K/G, fp32)."""

    def __init__(self, inputs: int, outputs: int, precision: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.precision, self.dtype = precision, dtype
        kind = precision.removesuffix(MATMUL)
        width, scales = (inputs // 2, inputs // group_size(inputs)) if BITS[kind] == 4 else (inputs, 1)
        payload = torch.empty(outputs, width, dtype=torch.int8 if kind == "int8" else torch.uint8, device="meta")
        self.payload = nn.Parameter(payload, requires_grad=False)
        self.scale = nn.Parameter(torch.empty(outputs, scales, device="meta"), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T in the compute precision."""
        return multiply(x.to(self.dtype), self.payload, self.scale, self.precision)


def swap(transformer: Any, precision: str, *, dtype: torch.dtype, device: torch.device) -> None:
    """Replace the frozen Linears of the blocks; embedders, modulations and output layers stay as they are.

    Raises:
        UsageError: the card cannot multiply in 8 bits.
    """
    if precision.removesuffix(MATMUL) not in BITS:
        return
    needs, has = NEEDS.get(precision), accelerator.capability(device)
    if needs and has and has < needs:
        raise UsageError(
            f"train.precision={precision}: needs compute capability {needs[0]}.{needs[1]}, this card has "
            f"{has[0]}.{has[1]}; use {precision.removesuffix(MATMUL)}, which only keeps the weights small"
        )
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                owner, _, leaf = name.rpartition(".")
                frozen = FrozenLinear(module.in_features, module.out_features, precision, dtype)
                setattr(block.get_submodule(owner), leaf, frozen)


def group_size(inputs: int) -> int:
    """Weights of four bits per scale: `GROUP`, or what divides the row."""
    return math.gcd(inputs, GROUP)


def quantise(weight_NK: torch.Tensor, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Payload and fp32 scales of a weight, or of some of its rows: a row gives the same bytes anywhere."""
    weight = weight_NK.float()
    kind = precision.removesuffix(MATMUL)
    if BITS[kind] == 4:
        groups = weight.unflatten(1, (-1, group_size(weight.shape[1])))
        levels, scale = _nearest(groups) if kind == "nf4" else _even(groups)
        low, high = levels.flatten(1).to(torch.uint8).unflatten(1, (-1, 2)).unbind(2)
        return low | high << 4, scale.squeeze(2)
    payload, scale = _round_rows(weight, None, fp8=kind == "fp8")
    return payload.view(torch.uint8) if kind == "fp8" else payload, scale


def _even(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels 0 to 15 of groups, evenly apart, and their scales."""
    # The value that is largest by size becomes -8, so that all 16 levels are used (the rule of llama.cpp's q4_0).
    most = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    scale = most / -8
    return (groups / _divisor(scale)).round().clamp(-8, 7) + 8, scale


def _nearest(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels 0 to 15 of groups, those of `NF4` that are nearest, and their scales: bitsandbytes' own bytes."""
    scale = groups.abs().amax(2, keepdim=True)
    levels = torch.tensor(NF4).to(groups.device)
    return torch.bucketize(groups / _divisor(scale), (levels[1:] + levels[:-1]) / 2), scale


def widen(payload: torch.Tensor, scale: torch.Tensor, precision: str, dtype: torch.dtype) -> torch.Tensor:
    """The weight (N, K) that a payload stands for, in `dtype`."""
    kind = precision.removesuffix(MATMUL)
    if BITS[kind] == 4:
        if kind == "nf4":
            each = torch.tensor(NF4, dtype=dtype).to(payload.device)
            levels = torch.stack((each.repeat(16), each.repeat_interleave(16)), 1)[payload.int()].flatten(1)
        else:
            levels = torch.stack((payload & 15, payload >> 4), 2).flatten(1).to(dtype) - 8
        return levels.unflatten(1, (scale.shape[1], -1)).mul_(scale.unsqueeze(2)).flatten(1)
    return (payload.view(FP8) if kind == "fp8" else payload).to(dtype).mul_(scale)


@torch.library.custom_op("cacheloom::frozen_linear", mutates_args=())
def multiply(x: torch.Tensor, payload: torch.Tensor, scale: torch.Tensor, precision: str) -> torch.Tensor:
    """x W^T (..., N) in x's precision; one operator, so that recompute policies and the compiler see one matmul."""
    if not precision.endswith(MATMUL):
        return nn.functional.linear(x, widen(payload, scale, precision, x.dtype))
    return _eight_bits(x, None, payload.t(), scale.t(), precision)


@torch.library.custom_op("cacheloom::frozen_linear_gradient", mutates_args=())
def input_gradient(dy: torch.Tensor, payload: torch.Tensor, scale: torch.Tensor, precision: str) -> torch.Tensor:
    """dy W (..., K) in dy's precision."""
    if not precision.endswith(MATMUL):
        return dy @ widen(payload, scale, precision, dy.dtype)
    ones = torch.ones(1, payload.shape[1], device=payload.device)
    return _eight_bits(dy, scale.view(-1), payload, ones, precision)


@multiply.register_fake
def _(x: torch.Tensor, payload: torch.Tensor, scale: torch.Tensor, precision: str) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], payload.shape[0]))


@input_gradient.register_fake
def _(dy: torch.Tensor, payload: torch.Tensor, scale: torch.Tensor, precision: str) -> torch.Tensor:
    columns = payload.shape[1] * 8 // BITS[precision.removesuffix(MATMUL)]
    return dy.new_empty((*dy.shape[:-1], columns))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, payload, scale, ctx.precision = inputs
    ctx.save_for_backward(payload, scale)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    return input_gradient(dy, *ctx.saved_tensors, ctx.precision), None, None, None


multiply.register_autograd(_backward, setup_context=_keep)
OPERATOR = torch.ops.cacheloom.frozen_linear.default


def _round_rows(x: torch.Tensor, columns_K: torch.Tensor | None, *, fp8: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows, times a factor for each column if any, in 8 bits, and the fp32 scale (..., 1) of each."""
    if fp8 and (kernel := _kernel(x.device)):
        return kernel(x, columns_K, FP8_MOST)
    weighed = x if columns_K is None else x * columns_K
    scale = weighed.abs().amax(-1, keepdim=True).float()
    scale = scale / scale.new_full((), FP8_MOST if fp8 else INT8_MOST)  # GPUs multiply by 1 / number, rounded
    scaled = weighed.float() / _divisor(scale)
    return (scaled.to(FP8) if fp8 else scaled.round().to(torch.int8)), scale


@functools.cache
def _kernel(device: torch.device) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    if not accelerator.has_triton(device):
        return None
    from flux2_core.model import round_rows

    return round_rows.fp8


def _divisor(scale: torch.Tensor) -> torch.Tensor:
    """What to divide by. A row of zeros keeps the scale 0: another one would weigh in gradients it has no part in."""
    return torch.where(scale == 0, 1.0, scale)


def _eight_bits(
    x: torch.Tensor, weights_K: torch.Tensor | None, right: torch.Tensor, columns: torch.Tensor, precision: str
) -> torch.Tensor:
    """Rows of x, weighed column by column, in 8 bits, times the 8-bit matrix `right`, times a scale per column."""
    fp8 = precision == "fp8-matmul"
    left, rows = _round_rows(x.flatten(0, -2), weights_K, fp8=fp8)
    on_gpu = accelerator.is_gpu(x.device)
    if on_gpu:  # it wants the right factor column by column; for the gradient that is a passing copy of one layer
        right = right.t().contiguous().t()
    if not fp8:
        product = torch._int_mm(left, right) * rows * columns
    elif on_gpu:
        product = torch._scaled_mm(
            left, right.view(FP8), scale_a=rows, scale_b=columns.contiguous(),
            out_dtype=torch.bfloat16, use_fast_accum=FAST_ACCUMULATION,
        )  # fmt: skip
    else:  # the same mathematics where no fp8 multiplier is: 8-bit factors, sums in fp32
        product = left.float() @ right.view(FP8).float() * rows * columns
    return product.to(x.dtype).unflatten(0, x.shape[:-1])
