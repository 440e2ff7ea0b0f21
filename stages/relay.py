"""What the training workers tell the driver: step records, the first error of ours, and that they had to go."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from flux2_core.errors import CacheloomError

AGAIN = "run the same command again to go on from the last checkpoint"

LEAVE_S = 8.0  # for a step and its checkpoint, before an interrupted driver ends what it has started

Progress = Callable[[dict[str, Any]], None]


class Told(Protocol):
    """A worker's line to the driver."""

    def put(self, record: dict[str, Any]) -> None:
        """Tell of a step."""

    def fail(self, error: CacheloomError) -> None:
        """Tell why the run cannot go on."""

    def go(self) -> None:
        """Tell that a machine was taken away."""


class Place(NamedTuple):
    """A worker's place among all, and whom it tells."""

    rank: int
    world: int
    beside: int
    """Workers of this machine."""
    device: torch.device
    told: Told
    noticed: Callable[[], bool]
    """Whether its machine is about to go."""


Work = Callable[[dict[str, Any], Place], None]


class Relay:
    """Actor: holds what was told until the driver takes it."""

    def __init__(self) -> None:
        self.records: deque[dict[str, Any]] = deque()
        self.failed: CacheloomError | None = None
        self.gone = False

    def put(self, record: dict[str, Any]) -> None:
        """Add a record."""
        self.records.append(record)
        self.gone = False

    def take(self) -> tuple[list[dict[str, Any]], CacheloomError | None, bool]:
        """Take all records; the first error, if there was one; whether the last thing told is that they go."""
        taken = [self.records.popleft() for _ in range(len(self.records))]  # a thread may put more meanwhile
        return taken, self.failed, self.gone

    def go(self) -> None:
        """Remember that the workers ended because a machine was taken away."""
        self.gone = True

    def fail(self, error: CacheloomError) -> None:
        """Remember the first error."""
        self.failed = self.failed or error
