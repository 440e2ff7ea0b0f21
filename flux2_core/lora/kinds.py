"""The kinds of adapter: of each its parameters, its first values, what it does beside a frozen Linear, and the exact
difference that it makes to the weight.

    lora, rslora, t-lora   W + f B A                 peft's; t-lora (arXiv 2507.05964) leaves ranks out by noise level
    dora                   m (W + f B A) / |row|     peft's (arXiv 2402.09353): the norm carries no gradient
    loha                   W + f (C D) * (E F)       LyCORIS' and peft's; the same as a LoRA of rank R x R
    lokr                   W + f C (x) (D E)         LyCORIS' and peft's
    oft                    (1 + Q)(1 - Q)^-1 W       LyCORIS' diag-OFT, on blocks of outputs, as ComfyUI has it; peft's
                                                     turns inputs, and neither ComfyUI nor diffusers loads it

A kind that turns or stretches outputs works on the base's output, so it needs no weight of the base; dora needs the
norms of its rows once, and W A in each pass. So all of them work over few bits, shards and streamed blocks alike.

Legend: M tokens, K inputs, N outputs, R rank; "finished" weights carry their strength.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from flux2_core.errors import DataError
from flux2_core.lora.layer import ADAPTER, few_bits, low_rank
from flux2_core.lora.names import MAGNITUDE, A, B
from flux2_core.model.frozen_linear import MATMUL, multiply

FACTOR = 16  # of lokr: SimpleTuner's for FLUX; 384 x 384 are left of a Linear of 6144
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """One `lora.kind`."""

    shapes: Callable[[int, int, int, int], dict[str, tuple[int, ...]]]
    """Of its parameters, by inputs, outputs, rank and lokr's factor."""
    run: Callable[[Any, Tensor], Tensor]
    """The output of an `AdaptedLinear`."""
    difference: Callable[[Weights, Callable[[], Tensor]], Tensor]
    """What finished weights add to a weight (N, K), which is only read by kinds that must know it; fp32."""
    zero: tuple[str, ...]
    """The parameters that begin at zero, so that nothing is changed at first."""
    carries: str | None
    """The parameter that carries the strength in finished weights; None: it has no strength."""
    work: Callable[[int, int, int, int], tuple[int, int]]
    """Multiplications per token beside the base: by what meets the input, and by others; arguments as of `shapes`."""
    strength: Callable[[float, int], float] = lambda alpha, rank: alpha / rank
    """The factor, by alpha and rank."""
    pair: Callable[[Weights], tuple[Tensor, Tensor]] | None = None
    """A (R, K) and B (N, R) whose product is the whole difference; None: no such factors."""
    thin: Callable[[int, int], int] = lambda rank, factor: rank
    """Values per token between its factors, by rank and lokr's factor."""
    kept: int = 0
    """Copies of a Linear's output that the backward pass asks for beside what a plain LoRA keeps."""
    diffusers: bool = True
    """Whether diffusers loads it (0.42)."""


def _factors(weights: Weights) -> tuple[Tensor, Tensor]:
    return weights[A], weights[B]


def _hadamard(weights: Weights) -> tuple[Tensor, Tensor]:
    """Row by row products of the factors: (C D) * (E F) is a product of rank R x R."""
    c_NR, d_RK, e_NR, f_RK = (weights[f"hada_w{name}"] for name in ("1_a", "1_b", "2_a", "2_b"))
    return (d_RK[:, None] * f_RK[None]).flatten(0, 1), (c_NR[:, :, None] * e_NR[:, None]).flatten(1)


def _lora(layer: Any, x: Tensor) -> Tensor:
    return low_rank(layer, x, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)


def _loha(layer: Any, x: Tensor) -> Tensor:
    return low_rank(layer, x, *_hadamard({name: getattr(layer, name) for name in layer.names}))


def _dora(layer: Any, x: Tensor) -> Tensor:
    """y + y (m / |W + f B A| - 1): in bf16 a gain near 1 has steps of 0.4 %, what it differs by has not."""
    y = _lora(layer, x)
    with torch.no_grad():
        a_RK, b_NR, f = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.factor
        weight, scale, precision = few_bits(layer.base_layer)
        if scale is None:
            wa_RN = linear(a_RK.to(weight.dtype), weight)
        else:
            wa_RN = multiply(a_RK.to(layer.base_layer.dtype), weight, scale, precision.removesuffix(MATMUL))
        crossed_N = (b_NR * wa_RN.t().float()).sum(1)
        own_N = (linear(b_NR, (a_RK @ a_RK.t()).float()).float() * b_NR).sum(1)
        norm_N = (layer.squares_N + 2 * f * crossed_N + f**2 * own_N).clamp_min(0).sqrt()
    gain_N = layer.lora_magnitude_vector / norm_N.clamp_min(torch.finfo(torch.float32).tiny) - 1
    return torch.addcmul(y, y, gain_N.to(y.dtype))


def _stretched(weights: Weights, base: Callable[[], Tensor]) -> Tensor:
    weight_NK = base()
    moved_NK = weight_NK + weights[B] @ weights[A]
    gain_N1 = weights[MAGNITUDE] / moved_NK.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return moved_NK * gain_N1[:, None] - weight_NK


def _lokr(layer: Any, x: Tensor) -> Tensor:
    """The right factor on groups of inputs, then the left one over the groups."""
    y, left, whole = layer.base_layer(x), layer.lokr_w1, "lokr_w2" in layer.names
    inner = linear(x.unflatten(-1, (left.shape[1], -1)), layer.lokr_w2 if whole else layer.lokr_w2_b)
    outer = linear(inner.transpose(-1, -2), left).transpose(-1, -2)
    update = (outer if whole else linear(outer, layer.lokr_w2_a)).flatten(-2)
    return y + (update if layer.factor == 1 else update * layer.factor)


def _kronecker(weights: Weights, base: Callable[[], Tensor]) -> Tensor:
    right = weights["lokr_w2"] if "lokr_w2" in weights else weights["lokr_w2_a"] @ weights["lokr_w2_b"]
    return torch.kron(weights["lokr_w1"].contiguous(), right)


def _lokr_shapes(inputs: int, outputs: int, rank: int, factor: int) -> dict[str, tuple[int, ...]]:
    (a, c), (b, d) = sides(outputs, factor), sides(inputs, factor)
    if rank >= max(c, d) / 2:  # peft's rule: two factors would be no smaller
        return {"lokr_w1": (a, b), "lokr_w2": (c, d)}
    return {"lokr_w1": (a, b), "lokr_w2_a": (c, rank), "lokr_w2_b": (rank, d)}


def _lokr_work(inputs: int, outputs: int, rank: int, factor: int) -> tuple[int, int]:
    shapes = _lokr_shapes(inputs, outputs, rank, factor)
    a, b = shapes["lokr_w1"]
    if "lokr_w2" in shapes:
        return inputs * (outputs // a), outputs * b
    return inputs * rank, (a * b + outputs) * rank


def sides(width: int, factor: int) -> tuple[int, int]:
    """A width as a product, its first number the factor or a divisor below it (peft's `factorization`)."""
    if width % factor == 0:
        return factor, width // factor
    found = max(side for side in range(1, min(factor, math.isqrt(width)) + 1) if width % side == 0)
    return found, width // found


def _turn(blocks_bss: Tensor) -> Tensor:
    """R - 1 of each block, where R = (1 + Q)(1 - Q)^-1 is orthogonal; 1 - Q is never singular, unchecked."""
    skew = blocks_bss - blocks_bss.transpose(1, 2)
    one = torch.eye(skew.shape[1], device=skew.device, dtype=skew.dtype)
    return torch.linalg.solve_ex(one - skew, 2 * skew)[0]


def _oft(layer: Any, x: Tensor) -> Tensor:
    """y + (R - 1) y, so that a turn of less than bf16's 0.4 % is not lost."""
    y, turn = layer.base_layer(x), _turn(layer.oft_blocks)
    blocks = y.unflatten(-1, turn.shape[:2])
    return y + torch.einsum("...bn,bnm->...bm", blocks, turn.to(y.dtype)).flatten(-2)


def _turned(weights: Weights, base: Callable[[], Tensor]) -> Tensor:
    turn = _turn(weights["oft_blocks"])
    return torch.einsum("bnk,bnm->bmk", base().unflatten(0, turn.shape[:2]), turn).flatten(0, 1)


def _oft_shapes(inputs: int, outputs: int, rank: int, factor: int) -> dict[str, tuple[int, ...]]:
    side = _side(outputs, rank)
    return {"oft_blocks": (outputs // side, side, side)}


def _side(outputs: int, rank: int) -> int:
    return max(side for side in range(1, min(rank, outputs) + 1) if outputs % side == 0)


def _lora_shapes(inputs: int, outputs: int, rank: int, factor: int) -> dict[str, tuple[int, ...]]:
    return {A: (rank, inputs), B: (outputs, rank)}


def _loha_shapes(inputs: int, outputs: int, rank: int, factor: int) -> dict[str, tuple[int, ...]]:
    down, up = (rank, inputs), (outputs, rank)
    return {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": up, "hada_w2_b": down}


def _plain(**others: Any) -> Kind:
    plain: dict[str, Any] = {"shapes": _lora_shapes, "run": _lora, "zero": (B,), "carries": B, "pair": _factors}
    plain |= {"difference": lambda weights, _: weights[B] @ weights[A]}
    plain |= {"work": lambda inputs, outputs, rank, _: (inputs * rank, outputs * rank)}
    return Kind(**plain | others)


KINDS: dict[str, Kind] = {
    "lora": _plain(),
    "rslora": _plain(strength=lambda alpha, rank: alpha / math.sqrt(rank)),
    "t-lora": _plain(),
    "dora": _plain(
        shapes=lambda inputs, outputs, rank, factor: (
            _lora_shapes(inputs, outputs, rank, factor) | {MAGNITUDE: (outputs,)}
        ),
        run=_dora, difference=_stretched, pair=None, kept=1,
    ),
    "loha": _plain(
        shapes=_loha_shapes, run=_loha, pair=_hadamard, zero=("hada_w2_b",), carries="hada_w1_a", diffusers=False,
        difference=lambda weights, _: (weights["hada_w1_a"] @ weights["hada_w1_b"])
        * (weights["hada_w2_a"] @ weights["hada_w2_b"]),
        work=lambda inputs, outputs, rank, _: (inputs * rank**2, outputs * rank**2), thin=lambda rank, _: rank**2,
    ),
    "lokr": Kind(
        _lokr_shapes, _lokr, _kronecker, zero=("lokr_w2_b", "lokr_w2"), carries="lokr_w1", work=_lokr_work,
        thin=lambda rank, factor: rank * factor,
    ),
    "oft": Kind(
        _oft_shapes, _oft, _turned, zero=("oft_blocks",), carries=None, kept=1, diffusers=False,
        work=lambda _, outputs, rank, __: (0, outputs * _side(outputs, rank)),
    ),
}  # fmt: skip


def kind_of(leaves: Mapping[str, Any]) -> str:
    """The kind that a module's parameters are of; all that are stored alike are `lora`.

    Raises:
        DataError: they are those of no kind.
    """
    given = set(leaves)
    wanted = {"lora": [{A, B}], "dora": [{A, B, MAGNITUDE}], "oft": [{"oft_blocks"}]}
    wanted |= {"loha": [set(_loha_shapes(1, 1, 1, 1))]}
    wanted |= {"lokr": [{"lokr_w1", "lokr_w2"}, {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}]}
    found = next((kind for kind, sets in wanted.items() if given in sets), None)
    if found is None:
        raise DataError(f"{', '.join(sorted(given))} together are the weights of no kind of adapter that is read")
    return found


def widths(weights: Mapping[str, Tensor]) -> tuple[int | None, int]:
    """Inputs (None: any) and outputs of the Linear that a module's weights are for.

    Raises:
        DataError: they do not fit each other.
    """
    kind, size = kind_of(weights), {name: tuple(each.shape) for name, each in weights.items()}
    found: tuple[int | None, int]
    try:
        if kind == "oft":
            blocks, side, other = size["oft_blocks"]
            found, fits = (None, blocks * side), side == other
        elif kind == "loha":
            (outputs, r), (s, inputs) = size["hada_w1_a"], size["hada_w1_b"]
            found, fits = (inputs, outputs), size == _loha_shapes(inputs, outputs, r, 1) and r == s
        elif kind == "lokr":
            (a, b), right = size["lokr_w1"], size.get("lokr_w2")
            (c, r), (s, d) = ((right[0], 0), (0, right[1])) if right else (size["lokr_w2_a"], size["lokr_w2_b"])
            found, fits = (b * d, a * c), r == s
        else:
            (r, inputs), (outputs, s) = size[A], size[B]
            found, fits = (inputs, outputs), r == s and size.get(MAGNITUDE, (outputs,)) == (outputs,)
    except (ValueError, IndexError):
        fits = False
    if not fits:
        raise DataError(f"its weights do not fit each other: {size}")
    return found
