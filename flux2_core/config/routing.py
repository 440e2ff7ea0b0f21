"""The section of what a training pass does otherwise: which blocks a token goes through."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from flux2_core.config.section import Section
from flux2_core.errors import UsageError

# Methods whose passes know of routes; another one would train without them and not say so
ROUTED = ("flow", "dop", "blank")


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


def check(tread: Tread, methods: tuple[str, ...]) -> None:
    """Refuse what makes no sense together.

    Raises:
        ValueError: names the keys.
    """
    if tread.routes and (others := [name for name in methods if name not in ROUTED]):
        raise ValueError(f"tread.routes: the passes of {others[0]} take no routes: leave out tread.routes")
