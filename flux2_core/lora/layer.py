"""A Linear under its adapter, by peft's names for its parts; a plain LoRA, W x + factor B A x, has peft's bits in fp32.

In fp32 every operation of it is peft's, in its order. In bf16 one operator does all of it: the thin products are added
by their own GEMMs to the base's output and, backward, to the gradient of its input, where peft goes over both again and
again. Factors are rounded at use; they and their gradients stay fp32. Figures: docs/decisions/0039.
What other kinds do is in `lora.kinds`; those that multiply by two thin factors do it here too.

Legend: B samples, M tokens (all leading dimensions), K inputs, N outputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from flux2_core.model.frozen_linear import FrozenLinear, input_gradient, multiply

ADAPTER = "default"  # peft keeps several adapters of a Linear by name; there is one
Shapes = Mapping[str, tuple[int, ...]]


class AdaptedLinear(nn.Module):
    """Stands in for a Linear: `base_layer`, and the adapter's parameters where peft has those of its name."""

    def __init__(
        self, base: nn.Linear, kind: str, shapes: Shapes, run: Callable[..., Tensor], *, factor: float
    ) -> None:
        super().__init__()
        assert "bias" not in dict(base.named_parameters()), "no Linear of a FLUX.2 block has one"
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base_layer: nn.Module = base  # its place is taken by a FrozenLinear where the base has few bits
        with torch.device("meta"):
            for name, shape in shapes.items():
                leaf, _, inner = name.partition(".")
                if inner:
                    self.add_module(leaf, nn.ModuleDict({ADAPTER: nn.Linear(shape[1], shape[0], bias=False)}))
                else:
                    self.register_parameter(leaf, nn.Parameter(torch.empty(shape)))
        self.kind, self.names, self.run, self.factor, self.on = kind, tuple(shapes), run, factor, True
        self.told_B1R: Tensor | None = None
        """What each sample's thin product is multiplied with, rank by rank (`lora.told`)."""
        self.squares_N: Tensor | None = None
        """Sums of squares of the base's rows, where the kind asks for them."""

    def forward(self, x: Tensor) -> Tensor:
        """The base's output under the adapter, or the base's alone where it is switched off."""
        return self.run(self, x) if self.on else self.base_layer(x)


def few_bits(base: Any) -> tuple[Any, Any, str]:
    """Weight (or payload), scales if any and precision of a base, as the operators take them."""
    few = isinstance(base, FrozenLinear)
    return (base.payload, base.scale, base.precision) if few else (base.weight, None, "bf16")


def low_rank(layer: AdaptedLinear, x: Tensor, a_RK: Tensor, b_NR: Tensor) -> Tensor:
    """W x + factor B (told * A x)."""
    base, told = layer.base_layer, layer.told_B1R
    if (base.dtype if isinstance(base, FrozenLinear) else base.weight.dtype) == torch.bfloat16:
        return adapted(x.bfloat16(), *few_bits(base), a_RK, b_NR, layer.factor, told)[0]
    y, h = base(x), nn.functional.linear(x, a_RK)
    update = nn.functional.linear(h if told is None else h * told, b_NR)
    return y + (update if layer.factor == 1 else update * layer.factor)  # times 1 changes no bit


@torch.library.custom_op("cacheloom::adapted", mutates_args=())
def adapted(
    x: Tensor, weight: Tensor, scale: Tensor | None, precision: str, a_RK: Tensor, b_NR: Tensor, factor: float,
    told: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(..., N) and A x (..., R) in x's precision; one operator, whose sum may be written over the base's product."""
    x_MK = x.flatten(0, -2)
    y_MN = nn.functional.linear(x_MK, weight) if scale is None else multiply(x_MK, weight, scale, precision)
    h_MR = _told(x_MK @ a_RK.to(x.dtype).t(), told, x)
    y_MN.addmm_(h_MR, _scaled(b_NR, factor).to(x.dtype).t())
    return y_MN.unflatten(0, x.shape[:-1]), h_MR.unflatten(0, x.shape[:-1])


@adapted.register_fake
def _(x: Any, weight: Any, scale: Any, precision: str, a_RK: Any, b_NR: Any, factor: float, told: Any = None) -> Any:
    return x.new_empty((*x.shape[:-1], len(b_NR))), x.new_empty((*x.shape[:-1], len(a_RK)))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, scale, ctx.precision, a_RK, b_NR, ctx.factor, told = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], weight, scale, a_RK, b_NR, told)


def _backward(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
    x, h, weight, scale, a_RK, b_NR, told = ctx.saved_tensors
    dy_MN, x_MK, h_MR = (each.flatten(0, -2) for each in (dy, x, h))
    dh_MR = _told(dy_MN @ _scaled(b_NR, ctx.factor).to(dy.dtype), told, x)
    dx_MK = dy_MN @ weight if scale is None else input_gradient(dy_MN, weight, scale, ctx.precision)
    dx_MK.addmm_(dh_MR, a_RK.to(dy.dtype))
    da_RK, db_NR = (dh_MR.t() @ x_MK).float(), _scaled((dy_MN.t() @ h_MR).float(), ctx.factor)
    return dx_MK.view(x.shape), None, None, None, da_RK, db_NR, None, None


def _told(h_MR: Tensor, told_B1R: Tensor | None, x: Tensor) -> Tensor:
    return h_MR if told_B1R is None else h_MR.unflatten(0, x.shape[:-1]).mul_(told_B1R).flatten(0, -2)


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor * factor


adapted.register_autograd(_backward, setup_context=_keep)
OPERATOR = torch.ops.cacheloom.adapted.default


@register_flop_formula(torch.ops.cacheloom.adapted)
def _flop(x: Any, weight: Any, scale: Any, precision: str, a_RK: Any, b_NR: Any, *_: Any, **__: Any) -> int:
    """Of both products; those of the backward pass are not hidden in an operator."""
    return 2 * math.prod(x) * b_NR[0] + 2 * math.prod(x[:-1]) * a_RK[0] * (x[-1] + b_NR[0])
