"""What an adapter adds to each weight, exactly; the plain LoRA that comes nearest to it; and ComfyUI's dora.

Only what turns or stretches a weight (`oft`, `dora`) has to know it: `base` reads one, by its module, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from flux2_core.lora.kinds import KINDS, kind_of
from flux2_core.lora.names import MAGNITUDE, A, Adapter, B, modules

Base = Callable[[str], Tensor]
MORE, TURNS = 8, 4  # directions beside those that are kept, and passes, of the subspace that finds them


def difference(weights: Mapping[str, Tensor], base: Callable[[], Tensor]) -> Tensor:
    """What a module's finished weights add to its weight (N, K)."""
    return KINDS[kind_of(weights)].difference(weights, base)


def plain(adapter: Mapping[str, Tensor], rank: int, base: Base) -> tuple[Adapter, float]:
    """The plain LoRA of a rank that is nearest to a finished adapter, and what it leaves out.

    Returns:
        The LoRA, and the Frobenius norm of all that is left out over that of all that the adapter adds.
    """
    found: Adapter = {}
    left = whole = 0.0
    for module, weights in modules(adapter).items():
        exact_NK = difference(weights, partial(base, module))
        a_RK, b_NR = nearest(exact_NK, rank)
        whole += float(exact_NK.square().sum(dtype=torch.float64))
        left += float((exact_NK - b_NR @ a_RK).square().sum(dtype=torch.float64))
        found[f"{module}.{A}"], found[f"{module}.{B}"] = a_RK, b_NR
    return found, (left / whole) ** 0.5 if whole else 0.0


def nearest(exact_NK: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (R, K) and B (N, R) whose product is nearest to a matrix, each with the roots of its singular values."""
    most = min(exact_NK.shape)
    with torch.random.fork_rng(devices=[]):  # equal runs give equal files
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(exact_NK, q=min(rank + MORE, most), niter=TURNS)
    roots = s[: min(rank, most)].sqrt()
    return (v[:, : len(roots)] * roots).t().contiguous(), u[:, : len(roots)] * roots


def for_comfyui(adapter: Mapping[str, Tensor], base: Base) -> Adapter:
    """The adapter as it has to be written for ComfyUI, which divides a magnitude by |W| where dora has |W + B A|."""
    found = dict(adapter)
    for module, weights in modules(adapter).items():
        if MAGNITUDE in weights:
            weight_NK = base(module)
            gain_N = weight_NK.norm(dim=1) / (weight_NK + weights[B] @ weights[A]).norm(dim=1)
            found[f"{module}.{MAGNITUDE}"] = weights[MAGNITUDE] * gain_N
    return found
