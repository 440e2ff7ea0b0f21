"""A Linear under its adapter: W x + factor B A x, with peft's names for its parts and, in fp32, with peft's bits.

In fp32 every operation is peft's, in its order. In bf16 one operator does all of it: the thin products are added by
their own GEMMs to the base's output and, backward, to the gradient of its input, where peft goes over both again and
again. Factors are rounded at use; they and their gradients stay fp32. Figures: docs/decisions/0039.

Legend: M tokens (all leading dimensions), K inputs, N outputs, R rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from flux2_core.model.frozen_linear import FrozenLinear, input_gradient, multiply

ADAPTER = "default"  # peft keeps several adapters of a Linear by name; there is one


class LoraLinear(nn.Module):
    """Stands in for a Linear: `base_layer`, `lora_A.default` (R, K) and `lora_B.default` (N, R)."""

    def __init__(self, base: nn.Linear, *, rank: int, factor: float) -> None:
        super().__init__()
        assert "bias" not in dict(base.named_parameters()), "no Linear of a FLUX.2 block has one"
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base_layer: nn.Module = base  # its place is taken by a FrozenLinear where the base has few bits
        with torch.device("meta"):
            self.lora_A = nn.ModuleDict({ADAPTER: nn.Linear(base.in_features, rank, bias=False)})
            self.lora_B = nn.ModuleDict({ADAPTER: nn.Linear(rank, base.out_features, bias=False)})
        self.factor, self.on = factor, True

    def forward(self, x: Tensor) -> Tensor:
        """The base's output and the adapter's, or the base's alone where it is switched off."""
        base = self.base_layer
        if not self.on:
            return base(x)
        a, b = self.lora_A[ADAPTER], self.lora_B[ADAPTER]
        few = isinstance(base, FrozenLinear)
        if (base.dtype if few else base.weight.dtype) == torch.bfloat16:
            weights = (base.payload, base.scale, base.precision) if few else (base.weight, None, "bf16")
            return adapted(x.bfloat16(), *weights, a.weight, b.weight, self.factor)[0]
        y, update = base(x), b(a(x))
        return y + (update if self.factor == 1 else update * self.factor)  # times 1 changes no bit


@torch.library.custom_op("cacheloom::adapted", mutates_args=())
def adapted(
    x: Tensor, weight: Tensor, scale: Tensor | None, precision: str, a_RK: Tensor, b_NR: Tensor, factor: float
) -> tuple[Tensor, Tensor]:
    """(..., N) and A x (..., R) in x's precision; one operator, whose sum may be written over the base's product."""
    x_MK = x.flatten(0, -2)
    y_MN = nn.functional.linear(x_MK, weight) if scale is None else multiply(x_MK, weight, scale, precision)
    h_MR = x_MK @ a_RK.to(x.dtype).t()
    y_MN.addmm_(h_MR, _scaled(b_NR, factor).to(x.dtype).t())
    return y_MN.unflatten(0, x.shape[:-1]), h_MR.unflatten(0, x.shape[:-1])


@adapted.register_fake
def _(x: Any, weight: Any, scale: Any, precision: str, a_RK: Any, b_NR: Any, factor: float) -> Any:
    return x.new_empty((*x.shape[:-1], len(b_NR))), x.new_empty((*x.shape[:-1], len(a_RK)))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, scale, ctx.precision, a_RK, b_NR, ctx.factor = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], weight, scale, a_RK, b_NR)


def _backward(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
    x, h, weight, scale, a_RK, b_NR = ctx.saved_tensors
    dy_MN, x_MK, h_MR = (each.flatten(0, -2) for each in (dy, x, h))
    dh_MR = dy_MN @ _scaled(b_NR, ctx.factor).to(dy.dtype)
    dx_MK = dy_MN @ weight if scale is None else input_gradient(dy_MN, weight, scale, ctx.precision)
    dx_MK.addmm_(dh_MR, a_RK.to(dy.dtype))
    da_RK, db_NR = (dh_MR.t() @ x_MK).float(), _scaled((dy_MN.t() @ h_MR).float(), ctx.factor)
    return dx_MK.view(x.shape), None, None, None, da_RK, db_NR, None


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor * factor


adapted.register_autograd(_backward, setup_context=_keep)
OPERATOR = torch.ops.cacheloom.adapted.default


@register_flop_formula(torch.ops.cacheloom.adapted)
def _flop(x: Any, weight: Any, scale: Any, precision: str, a_RK: Any, b_NR: Any, *_: Any, **__: Any) -> int:
    """Of both products; those of the backward pass are not hidden in an operator."""
    return 2 * math.prod(x) * b_NR[0] + 2 * math.prod(x[:-1]) * a_RK[0] * (x[-1] + b_NR[0])
