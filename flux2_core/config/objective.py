"""Sections of what a step minimises: which noise levels are drawn, and how far a prediction is off."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from flux2_core.config.section import Section

LOG = logging.getLogger(__name__)
Level = Annotated[float, Field(gt=0, le=1)]
Scale = Annotated[float, Field(ge=1)]
# Keys of [noise] that one distribution has, with it
ONLY = {"mean": ("logit-normal", "sigmoid"), "std": ("logit-normal", "sigmoid"), "scale": ("mode",)}
ONLY |= {"alpha": ("beta",), "beta": ("beta",), "weights": ("cubic",), "levels": ("levels",)}


PREFERENCE = "preference"  # the method of pairs
SINGLE = "flow", "for single pictures, and none is trained on here: leave it out"
OF_METHODS = {  # keys of [loss] that one method has
    "preference_beta": (PREFERENCE, "for pairs of pictures, and no data set has any: set data.0.rejected"),
    "contrastive_guidance": SINGLE,
    "differential_guidance": SINGLE,
}


class Noise(Section):
    """`[noise]`: which noise levels are trained (sigma: 1 is pure noise, 0 the picture); docs/methods.md compares."""

    distribution: Literal["logit-normal", "sigmoid", "linear", "weighted", "beta", "mode", "cubic", "levels"] = (
        "logit-normal"
    )
    """`linear`: all alike. `logit-normal` (or `sigmoid`): around the middle, by `mean` and `std`. `weighted`: all
    alike, weighted in the loss by AI Toolkit's table. `beta`: by `alpha` and `beta`. `mode`: SD3's, by `scale`.
    `cubic`: a smooth curve through `weights`. `levels`: only those of `levels`."""
    mean: float = 0.0
    """Of the normal whose sigmoid `logit-normal` is; above 0 more noise."""
    std: Annotated[float, Field(gt=0)] = 1.0
    """Its deviation: under 1 nearer to the middle. AI Toolkit's and SimpleTuner's sigmoid scale."""
    alpha: Annotated[float, Field(ge=0.5)] = 2.0
    """Of `beta`: more of it, more noise."""
    beta: Annotated[float, Field(ge=0.5)] = 2.0
    """Of `beta`: more of it, less noise."""
    scale: Annotated[float, Field(ge=-1, le=1.29)] = 1.29
    """Of `mode`: above 0 more in the middle, under 0 more at both ends (diffusers' `mode_scale`)."""
    weights: tuple[Annotated[float, Field(ge=0)], ...] = (0.0, 1.0, 0.0)
    """Of `cubic`: how often each of as many equally spaced levels is drawn, from sigma 0 to 1."""
    levels: Annotated[int, Field(ge=1, le=1000)] | Annotated[tuple[Level, ...], Field(min_length=1)] = 4
    """Of `levels`: those of a sampler of so many steps before its shift (4: 1, 0.75, 0.5, 0.25), or a list."""
    shift: Literal["none", "tokens", "flux2"] | Annotated[float, Field(gt=0)] = "none"
    """Move levels toward noise by a factor on sigma / (1 - sigma) (3 is usual), by `tokens` of the picture (1.6 at 256
    to 3.2 at 4,096), or as FLUX.2's sampler of 50 steps does (`flux2`: 7.6 at 4,096)."""
    bias: Literal["none", "content", "style"] = "none"
    """Draw more of the noisy levels, where a picture's content is decided, or of the others, where its style is."""
    range: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)
    """Lowest and highest level that are drawn; between them the distribution keeps its shape."""
    stratified: bool = False
    """Deal the levels of a batch over equal parts of the distribution, so that none is left out by chance."""

    @field_validator("range")
    @classmethod
    def _wide(cls, ends: tuple[float, float]) -> tuple[float, float]:
        if ends[0] >= ends[1]:
            raise ValueError(f"{list(ends)} holds no level: the lowest comes first, between 0 and 1")
        return ends

    @field_validator("weights")
    @classmethod
    def _curve(cls, weights: tuple[float, ...]) -> tuple[float, ...]:
        if len(weights) < 2 or not any(weights):
            raise ValueError(f"{list(weights)} is no curve: two weights or more, one of them above 0")
        return weights

    @model_validator(mode="after")
    def _fitting(self) -> Noise:
        for key, takers in ONLY.items():
            changed = getattr(self, key) != type(self).model_fields[key].default
            if changed and self.distribution not in takers:
                raise ValueError(f'{key} is for distribution="{takers[0]}"; this one is "{self.distribution}"')
        if self.distribution == "levels" and not any(self.range[0] <= level <= self.range[1] for level in self.grid):
            raise ValueError(f"none of levels={self.levels} is in range={list(self.range)}")
        return self

    @property
    def grid(self) -> tuple[float, ...]:
        """The levels of `levels`, ascending, before any shift."""
        if isinstance(self.levels, int):
            return tuple((place + 1) / self.levels for place in range(self.levels))
        return tuple(sorted(self.levels))


class Loss(Section):
    """`[loss]`: how far a prediction is off; docs/methods.md has the formulas."""

    kind: Literal["mse", "mae", "smooth-l1", "huber", "pseudo-huber", "wavelet"] = "mse"
    """Of each value's error; `wavelet`: of each band of the error's Haar transform alike, so that coarse structure,
    which is a small part of all values, counts as much as fine."""
    delta: Annotated[float, Field(gt=0)] = 0.1
    """Of the Hubers and `smooth-l1`: errors above it count linearly."""
    delta_schedule: Literal["constant", "exponential", "snr"] = "constant"
    """`exponential`: delta to the power of sigma; `snr`: from 1 without noise to delta in pure noise."""
    bands: Annotated[int, Field(ge=1, le=5)] = 3
    """Of `wavelet`: how often the picture is halved."""
    weighting: Literal["none", "bell", "min-snr", "sigma-sqrt", "cosmap", "weighted"] = "none"
    """Weight of a noise level. `bell`: DiffSynth's, most in the middle. `min-snr`: by `gamma`. `sigma-sqrt`, `cosmap`:
    diffusers'. `weighted`: AI Toolkit's table."""
    gamma: Annotated[float, Field(gt=0)] = 5.0
    """Of `min-snr`: the signal-to-noise ratio above which a level counts no more."""
    contrastive_guidance: Scale | tuple[Scale, Scale] = 1.0
    """Move the target away from what the base model predicts for the empty caption, by this factor (3 is usual) or one
    drawn for each sample between two; 1 leaves it. One more pass without the adapter a step."""
    contrastive_schedule: Literal["constant", "sigma"] = "constant"
    """`sigma`: the factor grows from 1 without noise to its whole in pure noise."""
    contrastive_zero_star: bool = False
    """Scale the empty caption's prediction to the target first (CFG-Zero*)."""
    differential_guidance: Scale = 1.0
    """Move the target beyond itself, away from the prediction, by this factor (3 is usual); 1 leaves it. With `mse` it
    is the gradient times this factor, and nothing else."""
    masked_prior: Annotated[float, Field(ge=0)] = 0.0
    """Weight of keeping, where masks are black, what the base model predicts. One more pass without the adapter."""
    preference_beta: Annotated[float, Field(ge=0)] = 2000.0
    """Of pairs (`data[].rejected`): how much more a pair counts that the model still gets wrong, and so how near it
    stays to the base; 500 to 5,000 is usual. 0 learns nothing."""

    @field_validator("contrastive_guidance")
    @classmethod
    def _ascending(cls, scale: float | tuple[float, float]) -> float | tuple[float, float]:
        if isinstance(scale, tuple) and scale[0] >= scale[1]:
            raise ValueError(f"{list(scale)}: the lower end comes first")
        return scale


def unused(loss: Loss, methods: Sequence[str]) -> str | None:
    """Which key of `[loss]` is set and has nothing to do with what is trained, in a sentence; None where none is."""
    for key, (method, why) in OF_METHODS.items():
        if method not in methods and getattr(loss, key) != Loss.model_fields[key].default:
            return f"loss.{key} is {why}"
    return None


def in_place(tree: dict[str, Any]) -> dict[str, Any]:
    """The same configuration with what has moved in its place, and each data set's `noise` over `[noise]`."""
    train, noise = tree.get("train"), tree.get("noise")
    if isinstance(train, dict) and "timesteps" in train:
        LOG.warning("train.timesteps is now noise.distribution; its former name is taken for one release more")
        noise = {"distribution": train["timesteps"]} | (noise or {})
        tree = tree | {"train": {key: train[key] for key in train if key != "timesteps"}, "noise": noise}
    if isinstance(noise, dict) and isinstance(tree.get("data"), list | tuple):
        tree = tree | {"data": [_with(noise, one) if isinstance(one, dict) else one for one in tree["data"]]}
    return tree


def _with(noise: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    own = data.get("noise")
    if not isinstance(own, dict):
        return data
    same = own.get("distribution", noise.get("distribution")) == noise.get("distribution")
    return data | {"noise": {key: noise[key] for key in noise if same or key not in ONLY} | own}
