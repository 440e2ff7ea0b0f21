"""What the training workers tell the driver: step records, the first error of ours, and that they had to go."""

from __future__ import annotations

from typing import Any

from flux2_core.errors import CacheloomError


class Relay:
    """Actor: holds what was told until the driver takes it."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.failed: CacheloomError | None = None
        self.gone = False

    def put(self, record: dict[str, Any]) -> None:
        """Add a record."""
        self.records.append(record)
        self.gone = False

    def take(self) -> tuple[list[dict[str, Any]], CacheloomError | None, bool]:
        """Take all records; the first error, if there was one; whether the last thing told is that they go."""
        taken, self.records = self.records, []
        return taken, self.failed, self.gone

    def go(self) -> None:
        """Remember that the workers ended because a machine was taken away."""
        self.gone = True

    def fail(self, error: CacheloomError) -> None:
        """Remember the first error."""
        self.failed = self.failed or error
