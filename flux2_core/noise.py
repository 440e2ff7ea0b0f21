"""Noise levels: one way to turn chance into a level for each `noise.distribution`, and what may be done to it.

A level sigma runs from 0 (the picture) to 1 (pure noise); u in [0, 1] is a level's place in its distribution, the same
direction. What FLUX.2's sampler does with levels is in `flux2_core.model.flow`.

References: Stable Diffusion 3 (arXiv 2403.03206) for `logit-normal`, `mode` and the shift; BFL's `sampling.py` for the
shift by tokens; SimpleTuner's flow schedules for `beta` and `cubic`; AI Toolkit for `weighted`, `content` and `style`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flux2_core.config.objective import Noise
from flux2_core.config.routing import SAMPLER_STEPS
from flux2_core.config.sections import Config
from flux2_core.errors import choose
from flux2_core.model.flow import empirical_mu, sampling_sigmas
from flux2_core.model.latents import PIXELS_PER_TOKEN

FEW, MANY = (256, 0.5), (4096, 1.15)  # (tokens, mu) of the shift by tokens; linear between and beyond
GRID = 4097  # points of a distribution that is inverted by numbers
SHOWN = (0.05, 0.5, 0.95)
BINS = 20


@dataclass(frozen=True)
class Distribution:
    """How a natural variable becomes a level: monotone, so that what is larger has more noise."""

    normal: bool
    """Whether the variable is a standard normal; else it is uniform in [0, 1)."""
    level: Callable[[Noise], Callable[[Tensor], Tensor]]


def _mode(noise: Noise) -> Callable[[Tensor], Tensor]:
    """SD3's: 1 - u - s (cos(pi u / 2)^2 - 1 + u), of u from the noise's end."""

    (scale,) = noise.values

    def level(u: Tensor) -> Tensor:
        return u - scale * ((math.pi / 2 * (1 - u)).cos().square() - u)

    return level


def _inverse(levels: NDArray[np.float64], density: NDArray[np.float64]) -> Callable[[Tensor], Tensor]:
    """The level below which a share u of a density lies; both are given at the same ascending points."""
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(levels))])
    return lambda u: torch.from_numpy(np.asarray(np.interp(u.double().numpy(), below / below[-1], levels)))


def _beta(noise: Noise) -> Callable[[Tensor], Tensor]:
    """Inverted over sigma = sin(x)^2, where the density has no poles for exponents of 1/2 and more."""
    alpha, beta = noise.values
    x = np.linspace(0, np.pi / 2, GRID)
    density = np.sin(x) ** (2 * alpha - 1) * np.cos(x) ** (2 * beta - 1)
    by_x = _inverse(x, density)
    return lambda u: by_x(u).sin().square()


def _cubic(noise: Noise) -> Callable[[Tensor], Tensor]:
    """A density through equally spaced weights: Catmull-Rom's curve, never under 0."""
    weights = np.asarray(noise.values, dtype=np.float64)
    at = np.linspace(0, len(weights) - 1, GRID)
    place = np.minimum(at.astype(int), len(weights) - 2)
    t, slopes = at - place, np.gradient(weights)
    rise = weights[place + 1] - weights[place]
    left, right = slopes[place], slopes[place + 1]
    curve = weights[place] + t * (left + t * (3 * rise - 2 * left - right + t * (left + right - 2 * rise)))
    return _inverse(at / (len(weights) - 1), curve.clip(0))


def _levels(noise: Noise) -> Callable[[Tensor], Tensor]:
    grid = torch.tensor(noise.grid)
    return lambda u: grid[(u * len(grid)).long().clamp_max(len(grid) - 1)]


def _sigmoid(noise: Noise) -> Callable[[Tensor], Tensor]:
    mean, deviation = noise.values
    return lambda normal: torch.sigmoid(mean + deviation * normal)


def _linear(noise: Noise) -> Callable[[Tensor], Tensor]:
    return lambda u: u


DISTRIBUTIONS: dict[str, Distribution] = {
    "logit-normal": Distribution(True, _sigmoid),
    "sigmoid": Distribution(True, _sigmoid),  # its name in other trainers
    "linear": Distribution(False, _linear),
    "weighted": Distribution(False, _linear),  # and a weight in the loss
    "beta": Distribution(False, _beta),
    "mode": Distribution(False, _mode),
    "cubic": Distribution(False, _cubic),
    "levels": Distribution(False, _levels),
}


def factor(shift: float | str, tokens: int) -> float:
    """What sigma / (1 - sigma) of a picture of so many tokens is multiplied by, for a `noise.shift`."""
    if shift == "tokens":
        (few, low), (many, high) = FEW, MANY
        return math.exp(low + (high - low) * (tokens - few) / (many - few))
    if shift == "flux2":
        return math.exp(empirical_mu(tokens, SAMPLER_STEPS))
    return 1.0 if shift == "none" else float(shift)


class Levels:
    """The levels of one `[noise]`."""

    def __init__(self, noise: Noise) -> None:
        distribution = choose(DISTRIBUTIONS, noise.distribution, setting="noise.distribution")
        self.noise, self.normal = noise, distribution.normal
        self.level = distribution.level(noise)
        self.whole = noise.bias == "none" and noise.range == (0.0, 1.0)
        self.ends = lru_cache(maxsize=64)(self._ends)  # for each number of tokens

    def draw(self, rng: torch.Generator, *, tokens: int, part: tuple[int, int] = (0, 1)) -> float:
        """One level for a picture of so many tokens; of `part` (n, of) only the n-th of equal parts is drawn from.

        It takes one number from the generator, whatever the settings are.
        """
        natural = (torch.randn if self.normal else torch.rand)((), generator=rng)
        if self.whole and part == (0, 1):
            return float(self._shifted(self.level(natural), tokens))
        u = torch.special.ndtr(natural.double()) if self.normal else natural.double()
        return float(self._level(self._ranged((part[0] + u) / part[1], tokens), tokens))

    def at(self, places: Sequence[float] | NDArray[np.float64], *, tokens: int) -> NDArray[np.float64]:
        """Levels at these places (0..1) of the distribution, as it is drawn for a picture of so many tokens."""
        u = torch.as_tensor(np.asarray(places, dtype=np.float64))
        return np.asarray(self._level(self._ranged(u, tokens), tokens).double().numpy())

    def _ranged(self, u: Tensor, tokens: int) -> Tensor:
        if self.noise.range == (0.0, 1.0):
            return u
        low, high = self.ends(tokens)
        return low + (high - low) * u

    def _level(self, u: Tensor, tokens: int) -> Tensor:
        """AI Toolkit draws u^3 from the noise's end for content, and from the other one for style."""
        u = {"none": u, "content": 1 - (1 - u) ** 3, "style": u**3}[self.noise.bias]
        return self._shifted(self.level(torch.special.ndtri(u) if self.normal else u), tokens)

    def _shifted(self, sigma: Tensor, tokens: int) -> Tensor:
        by = factor(self.noise.shift, tokens)
        return sigma if by == 1 else by * sigma / (1 + (by - 1) * sigma)

    def _ends(self, tokens: int) -> tuple[float, float]:
        """Places between which the levels of `noise.range` lie."""
        low, high = self.noise.range
        return self._first(lambda sigma: sigma >= low, tokens), self._first(lambda sigma: sigma > high, tokens)

    def _first(self, true: Callable[[float], bool], tokens: int) -> float:
        """The first place whose level is such: found by halving, since levels rise with their places."""
        before, there = 0.0, 1.0
        for _ in range(50):
            middle = (before + there) / 2
            level = float(self._level(torch.tensor(middle, dtype=torch.float64), tokens))
            before, there = (before, middle) if true(level) else (middle, there)
        return there


def summaries(config: Config) -> list[dict[str, Any]]:
    """What each `[noise]` draws for pictures of the first resolution, beside the levels of the previews' sampler."""
    tokens, steps = (config.data[0].resolutions[0] // PIXELS_PER_TOKEN) ** 2, config.validation.steps
    sampler = sampling_sigmas(tokens, steps)[:-1]
    smooth = Levels(Noise(distribution="linear", shift=math.exp(empirical_mu(tokens, steps))))
    return [
        {
            "distribution": each.distribution,
            "quantiles": [round(float(level), 3) for level in levels.at(SHOWN, tokens=tokens)],
            "density": [round(float(share), 4) for share in density(levels, tokens=tokens)],
            "sampler": [round(float(level), 3) for level in np.quantile(sampler, SHOWN)],
            "sampler_density": [round(float(share), 4) for share in density(smooth, tokens=tokens)],
        }
        for each in dict.fromkeys(config.noises)
        for levels in [Levels(each)]
    ]


def density(levels: Levels, *, tokens: int, bins: int = BINS) -> NDArray[np.float64]:
    """Share of the draws in each of equal parts of 0..1, the pictures' end first."""
    drawn = levels.at((np.arange(GRID) + 0.5) / GRID, tokens=tokens)
    return np.histogram(drawn, bins=bins, range=(0.0, 1.0))[0] / len(drawn)
