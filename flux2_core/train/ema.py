"""A moving average of the adapter's weights, its decay growing with the first steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def update(average: dict[str, Tensor], weights: Mapping[str, Tensor], *, decay: float, step: int) -> None:
    """Move the average toward the weights of step `step` (from 1), in place.

    The decay of step s is min(decay, (1 + s) / (10 + s)), so that a short run is not an average with its own start
    (reference: diffusers `EMAModel.get_decay`).
    """
    share = 1 - min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.values()), [weights[name] for name in average], share)
