"""What the training workers tell the driver: step records, the first error of ours, and that they had to go."""

from __future__ import annotations

from typing import Any


class Relay:
    """Actor: holds what was told until the driver takes it."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.failed: tuple[str, str] | None = None
        self.gone = False

    def put(self, record: dict[str, Any]) -> None:
        """Add a record."""
        self.records.append(record)
        self.gone = False

    def take(self) -> list[dict[str, Any]]:
        """Take all records."""
        taken, self.records = self.records, []
        return taken

    def go(self) -> None:
        """Remember that the workers ended because a machine was taken away."""
        self.gone = True

    def went(self) -> bool:
        """Whether that was the last thing that they did."""
        return self.gone

    def fail(self, kind: str, message: str) -> None:
        """Remember an error."""
        self.failed = self.failed or (kind, message)

    def failure(self) -> tuple[str, str] | None:
        """The error, if there was one."""
        return self.failed
