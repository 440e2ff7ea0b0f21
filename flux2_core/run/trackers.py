"""Trackers: where the numbers and pictures of a run are shown beside its own files, each an entry of one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Picture = np.ndarray[Any, np.dtype[np.uint8]]


class Tracker(Protocol):
    """One place that shows a run while it trains; open as long as the run's metric files are."""

    def scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Show a step's numbers under `group`: `train` or `validation`."""
        ...

    def image(self, name: str, step: int, picture_HWC: Picture) -> None:
        """Show a picture."""
        ...

    def close(self) -> None:
        """Write out everything."""
        ...


class TensorBoard:
    """Event files in the run's `tensorboard/`; on a resume steps after the checkpoint are hidden."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second, which readers of metrics need not spend

        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """One curve for each number."""
        for name, value in values.items():
            self._events.add_scalar(f"{group}/{name}", float(value), step)

    def image(self, name: str, step: int, picture_HWC: Picture) -> None:
        """Seen at once: pictures are rare."""
        self._events.add_image(name, picture_HWC, step, dataformats="HWC")
        self._events.flush()

    def close(self) -> None:
        """Write out everything."""
        self._events.close()


TRACKERS: dict[str, Callable[[Path, int], Tracker]] = {  # from a run's folder and the step that it goes on from
    "tensorboard": TensorBoard,
}
