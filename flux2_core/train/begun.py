"""What a run has begun with, and goes on with: how its base lay and was rounded, as its checkpoints say.

`train.precision="auto"` asks the card. A run that goes on where more or less of one is free keeps the precision that
it began with, as its numbers depend on it; strategy and recomputing change none, and are planned anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from flux2_core.config.sections import Config
from flux2_core.errors import UsageError
from flux2_core.placement import planner
from flux2_core.placement.planner import Placement
from flux2_core.run.checkpoint import Checkpoint

FACT = "placement"  # of a checkpoint; there is none in those before 2026-11-28, which go on as `auto` decides now


@dataclass(frozen=True)
class Begun:
    """What a checkpoint says of it; empty for a run that only begins."""

    step: int = 0
    placement: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, found: Checkpoint | None) -> Begun:
        """What the newest checkpoint says."""
        return cls() if found is None else cls(found.step, found.facts.get(FACT))

    def config(self, config: Config) -> Config:
        """The configuration with the precision that `auto` was at the start."""
        if self.placement is None or config.train.precision != "auto":
            return config
        return planner.altered(config, train={"precision": self.placement["precision"]})

    @contextmanager
    def kept(self, config: Config) -> Iterator[None]:
        """Say of a refused placement that the precision is the run's and no longer free.

        Raises:
            UsageError: the run cannot go on here as it began.
        """
        try:
            yield
        except UsageError as error:
            if self.config(config) is config:
                raise
            assert self.placement is not None
            raise UsageError(
                f'run {config.run} began with train.precision="{self.placement["precision"]}", which "auto" was then, '
                f"and keeps it from step {self.step} on, since another one changes its numbers; here {error}; or go on "
                "where it began, or start anew with run=NAME"
            ) from error

    def otherwise(self, computed: torch.dtype) -> str | None:
        """What differs from the start all the same, in words: few-bit bases are multiplied as the device does."""
        if self.placement is None or self.placement["computed"] == _name(computed):
            return None
        return (
            f"up to step {self.step} the base was multiplied in {self.placement['computed']}, on this device it is in "
            f"{_name(computed)}: the run goes on, with other roundings than it would have had there"
        )


def facts(placement: Placement, computed: torch.dtype) -> dict[str, Any]:
    """What a checkpoint keeps of a placement; `recompute` may be a number of blocks."""
    names = ("strategy", "precision", "recompute")
    return {name: getattr(placement, name) for name in names} | {"computed": _name(computed)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
