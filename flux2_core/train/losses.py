"""Losses: one function from a prediction and its target to a number for each sample."""

from __future__ import annotations

from collections.abc import Callable

import torch


def mse_B(prediction: torch.Tensor, target: torch.Tensor, mask_BS: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared error of each sample, in fp32.

    With a mask it is the mean over tokens weighted by their share (0..1), so that a small masked region counts as much
    as a whole picture, and a token of share 0 has no gradient; a sample that is masked out wholly has loss 0.
    """
    error = (prediction.float() - target.float()).square()
    if mask_BS is None:
        return error.flatten(1).mean(1)
    return (error.mean(2) * mask_BS).sum(1) / mask_BS.sum(1).clamp_min(1e-6)


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]] = {"mse": mse_B}
