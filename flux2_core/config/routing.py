"""Sections of what a training pass does otherwise: which blocks a token goes through, and how its noise was reached."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from flux2_core.config.objective import Noise
from flux2_core.config.section import Section, Share
from flux2_core.errors import UsageError

SAMPLER_STEPS = 50  # of diffusers' pipeline, when nothing is said
# Methods whose passes know of routes; another one would train without them and not say so
ROUTED = ("flow", "rollout", "dop", "blank")


class Route(Section):
    """One of `tread.routes`."""

    skip: Annotated[float, Field(ge=0, lt=1)]
    """Share of a picture's tokens that skip the blocks of the route."""
    start: int
    """First block of it, of all blocks from 0, double ones before single ones; negative: from the end."""
    end: int
    """Last block of it, likewise."""


class Tread(Section):
    """`[tread]`: some of a picture's tokens skip blocks while training; docs/methods.md says what of it."""

    routes: tuple[Route, ...] = ()
    """Tables of `skip` (share of a picture's tokens that skip), `start` and `end` (first and last block, of all from 0,
    double ones before single ones, negative from the end): `[{ skip = 0.5, start = 2, end = -2 }]`."""

    def spans(self, blocks: int) -> list[tuple[int, int, float]]:
        """(first block, last block, share that skips) of each route that skips anything, in a model of so many blocks.

        Raises:
            UsageError: a route has no blocks, or some that the model or another route has; names it.
        """
        found: list[tuple[int, int, float]] = []
        for place, route in enumerate(self.routes):
            start, end = (at + blocks * (at < 0) for at in (route.start, route.end))
            told = f"tread.routes.{place}: start={route.start} and end={route.end} are blocks {start} to {end}"
            if not 0 <= start < end < blocks:
                raise UsageError(f"{told} of 0 to {blocks - 1}: a route begins before it ends, inside of them")
            if over := [at for at, (first, last, _) in enumerate(found) if start <= last and first <= end]:
                raise UsageError(f"{told}, some of which tread.routes.{over[0]} has too: routes may not overlap")
            found.append((start, end, route.skip))
        return [span for span in found if span[2]]

    def skipped(self, blocks: int) -> list[float]:
        """Share of a picture's tokens that skips each block."""
        shares = [0.0] * blocks
        for start, end, skip in self.spans(blocks):
            shares[start : end + 1] = [skip] * (end + 1 - start)
        return shares


class Rollout(Section):
    """`[rollout]`: learn from where the sampler gets by itself (scheduled sampling); docs/methods.md says what of."""

    probability: Share | tuple[Share, Share] = 0.0
    """Share of steps whose pictures are reached by steps of the sampler, instead of mixed with noise; or two, between
    which it goes over the run."""
    steps: Annotated[int, Field(ge=1, le=SAMPLER_STEPS)] = 3
    """Steps of the sampler at the most; as many as are drawn, 1 or more. One pass without gradient each."""
    reflexflow: bool = False
    """Weigh tokens by how far the prediction strays where it was reached, and hold its direction (ReflexFlow). One more
    pass without gradient."""

    @model_validator(mode="after")
    def _on(self) -> Rollout:
        for key in ("steps", "reflexflow"):
            if not self.on and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} is of a rollout, and probability is 0: set rollout.probability, or leave it out"
                )
        return self

    @property
    def ends(self) -> tuple[float, float]:
        """The probability of the first and of the last step."""
        return self.probability if isinstance(self.probability, tuple) else (self.probability, self.probability)

    @property
    def on(self) -> bool:
        """Whether any step is rolled out."""
        return any(self.ends)

    @property
    def passes(self) -> float:
        """Passes without gradient of a step, the mean over the run."""
        return sum(self.ends) / 2 * ((1 + self.steps) / 2 + self.reflexflow)


def check(tread: Tread, rollout: Rollout, methods: tuple[str, ...], noises: tuple[Noise, ...]) -> None:
    """Refuse what makes no sense together.

    Raises:
        ValueError: names the keys.
    """
    if tread.routes and (others := [name for name in methods if name not in ROUTED]):
        raise ValueError(f"tread.routes: the passes of {others[0]} take no routes: leave out tread.routes")
    if rollout.on and "rollout" not in methods:
        raise ValueError(f"rollout.probability: {methods[0]} has no noise that could be reached: leave out rollout")
    if rollout.on and all(noise.distribution == "levels" and noise.grid == (1.0,) for noise in noises):
        raise ValueError("rollout.probability: noise.parameters trains pure noise alone, to which no step leads")
