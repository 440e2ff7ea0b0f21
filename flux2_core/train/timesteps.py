"""How noise levels are drawn: one function from a generator to sigma for each `train.timesteps`."""

from __future__ import annotations

import torch


def draw_sigma(kind: str, rng: torch.Generator) -> float:
    """One noise level. `linear`: uniform; `logit-normal` and `sigmoid`: sigmoid of a standard normal."""
    if kind == "linear":
        return float(torch.rand((), generator=rng))
    return float(torch.sigmoid(torch.randn((), generator=rng)))
