"""Losses: how far a prediction is off its target, for each sample, and how much each noise level counts.

Legend: B samples, S = h * w image tokens, c = 128 = 32 latent channels in 2 x 2 places.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from flux2_core.config.objective import Loss
from flux2_core.errors import choose
from flux2_core.noise import GRID, Levels

DRIFT = 10  # weight of ReflexFlow's direction, its paper's beta 1 as SimpleTuner tells it; beta 2 and alpha are 1
PATCH = 2  # latent places of a token, in each direction
HALVINGS = 3  # of a picture, for `wavelet`


def _squared(error: Tensor, delta_B: Tensor) -> Tensor:
    return error.square()


def _absolute(error: Tensor, delta_B: Tensor) -> Tensor:
    return error.abs()


def _huber(error: Tensor, delta_B: Tensor) -> Tensor:
    """Huber's, doubled: `mse` under delta, 2 delta |e| - delta^2 over it."""
    size = error.abs()
    return torch.where(size < delta_B, size.square(), delta_B * (2 * size - delta_B))


def _smooth_l1(error: Tensor, delta_B: Tensor) -> Tensor:
    """Huber's over delta: 2 |e| - delta over it, so that its slope does not shrink with delta."""
    return _huber(error, delta_B) / delta_B


def _pseudo_huber(error: Tensor, delta_B: Tensor) -> Tensor:
    """2 delta (sqrt(e^2 + delta^2) - delta), written so that small errors are not lost (arXiv 2403.16728)."""
    return 2 * delta_B * error.square() / ((error.square() + delta_B.square()).sqrt() + delta_B)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of each value's error
    "mse": _squared,
    "mae": _absolute,
    "huber": _huber,
    "smooth-l1": _smooth_l1,
    "pseudo-huber": _pseudo_huber,
    "wavelet": _squared,  # of the bands that `_bands` makes of the errors
}
DELTAS: dict[str, Callable[[float, Tensor], Tensor]] = {
    "constant": lambda delta, sigma_B: torch.full_like(sigma_B, delta),
    "exponential": lambda delta, sigma_B: delta**sigma_B,
    "snr": lambda delta, sigma_B: (1 - delta) * (1 - sigma_B).square() + delta,  # kohya's 1 / (1 + sigma / (1 - sigma))
}


def loss_B(
    section: Loss, prediction_BSc: Tensor, target_BSc: Tensor, *, sigma_B: Tensor, mask_Bhw: Tensor | None = None,
    height: int,
) -> Tensor:  # fmt: skip
    """Loss of each sample, in fp32.

    With a mask it is the mean over tokens weighted by their share (0..1), so that a small masked region counts as much
    as a whole picture, and a token of share 0 has no gradient; a sample that is masked out wholly has loss 0.

    Args:
        section: `[loss]`.
        prediction_BSc: velocity.
        target_BSc: velocity.
        sigma_B: noise levels, for `loss.delta_schedule`.
        mask_Bhw: share of each token that counts.
        height: in tokens.
    """
    error = prediction_BSc.float() - target_BSc.float()
    if section.kind == "wavelet":
        error = _bands(error, height=height, halvings=HALVINGS)
    delta_B = choose(DELTAS, section.delta_schedule, setting="loss.delta_schedule")(section.delta, sigma_B)
    off = choose(LOSSES, section.kind, setting="loss.kind")(error, delta_B.view(-1, 1, 1))
    if mask_Bhw is None:
        return off.flatten(1).mean(1)
    mask_BS = mask_Bhw.flatten(1)
    return (off.mean(2) * mask_BS).sum(1) / mask_BS.sum(1).clamp_min(1e-6)


def mse_B(prediction: Tensor, target: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample, which is compared between runs whatever they are trained by."""
    return loss_B(Loss(), prediction, target, sigma_B=prediction.new_ones(len(prediction)), mask_Bhw=mask_BS, height=1)


def reflexflow(
    predicted_BSc: Tensor, target_BSc: Tensor, exact_BSc: Tensor, mask_Bhw: Tensor | None
) -> tuple[Tensor, Tensor]:
    """ReflexFlow's two parts (arXiv 2512.04904): shares of tokens (B, S), and how far each sample's direction is off.

    Shares grow with the exposure bias, which is how far the prediction strays from that at the exact point: 1 of a
    token without any, 2 of the mean. The direction is off by 10 |p / |p| - t / |t||^2, of what the mask leaves.
    """
    shares_BS = torch.ones_like(exact_BSc[..., 0]) if mask_Bhw is None else mask_Bhw.flatten(1)
    bias_BS = (predicted_BSc.detach() - exact_BSc).norm(dim=2)
    mean_B1 = bias_BS.mean(1, keepdim=True).clamp_min(1e-6)
    p, t = (F.normalize((shares_BS.unsqueeze(2) * one.float()).flatten(1)) for one in (predicted_BSc, target_BSc))
    return shares_BS * (1 + bias_BS / mean_B1), DRIFT * (p - t).square().sum(1)


def _bands(error_BSc: Tensor, *, height: int, halvings: int) -> Tensor:
    """The orthonormal Haar transform of errors (B, S, c), each band scaled to have the same share of the mean.

    Coarse coefficients are given to all tokens that they are of, so that masks and means go on over tokens. Scaled by
    its share instead, each band would count by its values and, the transform being orthonormal, the sum be `mse`.
    """
    B, S, c = error_BSc.shape
    places = error_BSc.view(B, height, S // height, c // PATCH**2, PATCH, PATCH)
    low = places.permute(0, 3, 1, 4, 2, 5).reshape(B, c // PATCH**2, height * PATCH, S // height * PATCH)
    found: list[Tensor] = []
    for halving in range(halvings):
        low = F.pad(low, (0, low.shape[3] % 2, 0, low.shape[2] % 2), mode="replicate")
        a, b, d, e = (low[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1))
        low = (a + b + d + e) / 2
        bands = [(a - b + d - e) / 2, (a + b - d - e) / 2, (a - b - d + e) / 2]
        bands += [low] if halving == halvings - 1 else []
        spread = torch.cat(bands, dim=1).repeat_interleave(2**halving, 2).repeat_interleave(2**halving, 3)
        found.append(spread[:, :, :height, : S // height])
    return torch.cat(found, dim=1).flatten(2).transpose(1, 2)


def _bell(sigma: Tensor, gamma: float) -> Tensor:
    """DiffSynth's: a Gaussian around the middle, down to 0 at both ends; to be scaled to a mean of 1."""
    return torch.exp(-2 * (sigma - 0.5).square()) - math.exp(-0.5)


def _min_snr(sigma: Tensor, gamma: float) -> Tensor:
    """Min-SNR (arXiv 2303.09556) for velocities: min(SNR, gamma) on the picture's error, which is sigma times ours."""
    return torch.minimum((1 - sigma).square(), gamma * sigma.square())


# AI Toolkit's default weights of 1,000 levels, measured there on another model (`toolkit/timestep_weighing`), as (place
# from pure noise, weight): straight lines between these are within 1 % of the rest
TABLE = (
    (0, 0.9057), (6, 0.9692), (10, 1.0429), (15, 1.1209), (20, 1.1761), (25, 1.2201), (30, 1.2562), (40, 1.3295),
    (50, 1.3748), (60, 1.4132), (70, 1.4601), (80, 1.476), (90, 1.4951), (100, 1.5068), (112, 1.5156), (124, 1.5227),
    (136, 1.5193), (150, 1.5069), (160, 1.498), (180, 1.4733), (200, 1.4413), (225, 1.4004), (250, 1.3549),
    (300, 1.264), (400, 1.083), (450, 1.0004), (500, 0.925), (550, 0.8615), (600, 0.805), (650, 0.7645), (700, 0.731),
    (720, 0.7228), (740, 0.7171), (760, 0.7141), (780, 0.7138), (800, 0.716), (830, 0.7238), (860, 0.732),
    (880, 0.7311), (890, 0.7258), (900, 0.7162), (910, 0.7008), (920, 0.6791), (930, 0.6515), (940, 0.6189),
    (950, 0.5822), (960, 0.5446), (970, 0.5098), (980, 0.4755), (986, 0.4576), (990, 0.4521), (996, 0.4458),
    (999, 0.4473),
)  # fmt: skip


def _table(sigma: Tensor, gamma: float) -> Tensor:
    places, weights = zip(*TABLE, strict=True)
    return torch.from_numpy(np.asarray(np.interp(1000 * (1 - sigma.double().numpy()), places, weights)))


WEIGHTINGS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": lambda sigma, gamma: torch.ones_like(sigma),
    "bell": _bell,
    "min-snr": _min_snr,
    "sigma-sqrt": lambda sigma, gamma: sigma**-2,
    "cosmap": lambda sigma, gamma: 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square())),
    "weighted": _table,
}


class Weights:
    """How much each noise level counts: a number for each sigma."""

    def __init__(self, section: Loss, levels: Levels) -> None:
        name = "weighted" if levels.noise.distribution == "weighted" else section.weighting
        self.of = choose(WEIGHTINGS, name, setting="loss.weighting")
        self.gamma, self.levels, self.scaled = section.gamma, levels, name == "bell"
        self.mean = lru_cache(maxsize=64)(self._mean)

    def weight(self, sigma: float, *, tokens: int) -> float:
        """Of one level of a picture of so many tokens."""
        weight = float(self.of(torch.tensor(sigma, dtype=torch.float64), self.gamma))
        return weight / self.mean(tokens) if self.scaled else weight

    def _mean(self, tokens: int) -> float:
        """Over what is drawn."""
        drawn = self.levels.at((np.arange(GRID) + 0.5) / GRID, tokens=tokens)
        return float(self.of(torch.from_numpy(drawn), self.gamma).mean())
