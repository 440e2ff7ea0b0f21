"""Sections of what a step minimises: which noise levels are drawn, and how far a prediction is off."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from flux2_core.config.section import Section

LOG = logging.getLogger(__name__)
Scale = Annotated[float, Field(ge=1)]
PARAMETERS: dict[str, tuple[int, int, float, float, tuple[float, ...]]] = {
    "logit-normal": (2, 2, -10, 10, (0.0, 1.0)),
    "sigmoid": (2, 2, -10, 10, (0.0, 1.0)),
    "beta": (2, 2, 0.5, 100, (2.0, 2.0)),
    "mode": (1, 1, -1, 1.29, (1.29,)),
    "cubic": (2, 100, 0, 1e6, (0.0, 1.0, 0.0)),
    "levels": (1, 1000, 0, 1000, (4.0,)),
}
"""Of distributions: fewest and most parameters, lowest and highest, and what they are when nothing is said."""

ONLY = {  # keys of [loss] that mean something with some values of another one alone
    **dict.fromkeys(("delta", "delta_schedule"), ("kind", ("huber", "pseudo-huber", "smooth-l1"))),
    "gamma": ("weighting", ("min-snr",)),
}


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
    """`linear`: all alike. `logit-normal` (or `sigmoid`): around the middle. `weighted`: all alike, and in the loss by
    AI Toolkit's table. `beta`. `mode`: SD3's. `cubic`: by a smooth curve. `levels`: a few only."""
    parameters: tuple[float, ...] = ()
    """Of the distribution; none: the usual ones. `logit-normal`: mean and deviation of the normal whose sigmoid it is
    ([0, 1]; a higher mean is more noise). `beta`: alpha, beta ([2, 2]; more alpha is more noise). `mode`: diffusers'
    `mode_scale` ([1.29]). `cubic`: how often equally spaced levels are drawn, from sigma 0 to 1 ([0, 1, 0]). `levels`:
    those of a sampler of so many steps before its shift ([4]: 1, 0.75, 0.5, 0.25), or the levels themselves."""
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

    @model_validator(mode="after")
    def _fitting(self) -> Noise:
        if self.parameters:
            self._possible()
        if self.distribution == "levels" and not any(self.range[0] <= level <= self.range[1] for level in self.grid):
            raise ValueError(f"none of the levels {list(self.grid)} is in range={list(self.range)}")
        return self

    def _possible(self) -> None:
        given, kind = list(self.parameters), self.distribution
        if kind not in PARAMETERS:
            raise ValueError(f'distribution="{kind}" has no parameters (given: {given}); {", ".join(PARAMETERS)} have')
        fewest, most, low, high, usual = PARAMETERS[kind]
        count = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        if not fewest <= len(given) <= most or not all(low <= one <= high for one in given):
            raise ValueError(
                f"{given}: {kind} takes {count} parameters from {low:g} to {high:g}, usually {list(usual)}"
            )
        if kind in ("logit-normal", "sigmoid") and given[1] <= 0:
            raise ValueError(f"{given}: the second one is a deviation, above 0")
        if kind == "cubic" and not any(given):
            raise ValueError(f"{given} is no curve: one of the weights must be above 0")
        steps = len(given) == 1 and given[0] >= 1 and given[0].is_integer()
        if kind == "levels" and not steps and not all(0 < one <= 1 for one in given):
            raise ValueError(f"{given}: a number of sampler steps, or levels above 0 and up to 1")

    @property
    def values(self) -> tuple[float, ...]:
        """The distribution's parameters, the usual ones where none are said."""
        return self.parameters or PARAMETERS[self.distribution][-1]

    @property
    def grid(self) -> tuple[float, ...]:
        """The levels of `levels`, ascending, before any shift."""
        if len(self.values) == 1 and self.values[0] >= 1:
            return tuple((place + 1) / int(self.values[0]) for place in range(int(self.values[0])))
        return tuple(sorted(self.values))


class Loss(Section):
    """`[loss]`: how far a prediction is off; docs/methods.md has the formulas."""

    kind: Literal["mse", "mae", "smooth-l1", "huber", "pseudo-huber", "wavelet"] = "mse"
    """Of each value's error; `wavelet`: of each band of the error's Haar transform alike, so that coarse structure,
    which is a small part of all values, counts as much as fine."""
    delta: Annotated[float, Field(gt=0)] = 0.1
    """Of the Hubers and `smooth-l1`: errors above it count linearly."""
    delta_schedule: Literal["constant", "exponential", "snr"] = "constant"
    """`exponential`: delta to the power of sigma; `snr`: from 1 without noise to delta in pure noise."""
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

    @model_validator(mode="after")
    def _fitting(self) -> Loss:
        for key, (other, takers) in ONLY.items():
            if getattr(self, key) != type(self).model_fields[key].default and getattr(self, other) not in takers:
                ways = " or ".join(f'"{taker}"' for taker in takers)
                raise ValueError(f'{key} is for {other}={ways}; here it is "{getattr(self, other)}", and {key} nothing')
        if self.contrastive_guidance == 1 and (self.contrastive_zero_star or self.contrastive_schedule != "constant"):
            raise ValueError("contrastive_guidance=1 leaves the target, whatever schedule and scaling: set 3")
        return self


def unused(loss: Loss, methods: Sequence[str]) -> str | None:
    """Which key of `[loss]` is set and has nothing to do with what is trained, in a sentence; None where none is."""
    there = {"flow" if method == "rollout" else method for method in methods}  # which is flow matching from elsewhere
    for key, (method, why) in OF_METHODS.items():
        if method not in there and getattr(loss, key) != Loss.model_fields[key].default:
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
    return data | {"noise": {key: noise[key] for key in noise if same or key != "parameters"} | own}
