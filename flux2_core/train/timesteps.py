"""How noise levels are drawn: one function from a generator to sigma for each `train.timesteps`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flux2_core.errors import choose


def _linear(rng: torch.Generator) -> float:
    return float(torch.rand((), generator=rng))


def _sigmoid(rng: torch.Generator) -> float:
    """Sigmoid of a standard normal."""
    return float(torch.sigmoid(torch.randn((), generator=rng)))


TIMESTEPS: dict[str, Callable[[torch.Generator], float]] = {
    "logit-normal": _sigmoid,  # the same distribution under its two names, as long as neither has a parameter
    "sigmoid": _sigmoid,
    "linear": _linear,
}


def draw_sigma(kind: str, rng: torch.Generator) -> float:
    """One noise level (sigma, 1 = pure noise) of a `train.timesteps`."""
    return choose(TIMESTEPS, kind, setting="train.timesteps")(rng)
