"""Metrics: one JSON object per step, on disk before the next step starts, and the same numbers for every tracker.

`metrics.jsonl` has each training step once, `validation.jsonl` each validation once, also after a run was killed and
resumed: opening them cuts off what lies beyond the checkpoint that training resumes from, and a line cut in half.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from flux2_core.errors import DataError, choose
from flux2_core.run.trackers import TRACKERS, Picture
from flux2_core.store import atomic

METRICS, VALIDATION = "metrics.jsonl", "validation.jsonl"
SMOOTHING = 0.95  # share of the past in a smoothed value: about the last 20 steps


class Writer:
    """Appends to a run's metric files; the only open handle on them."""

    def __init__(self, folder: Path, *, resume_step: int = 0, trackers: Sequence[str] = ("tensorboard",)) -> None:
        """Open the files, made if missing, and drop every record of a step after `resume_step`.

        Raises:
            DataError: a line that is not the last one is not a JSON object with a `step`.
            UsageError: there is no such tracker.
        """
        chosen = [choose(TRACKERS, name, setting="tracker") for name in trackers]
        self._streams: dict[str, TextIO] = {}
        self._last: dict[str, int] = {}
        self.last: dict[str, Any] = {}
        """The training step before the next one; empty at the beginning."""
        for name in (METRICS, VALIDATION):
            kept = _truncate(folder / name, resume_step=resume_step)
            self._last[name] = kept[-1]["step"] if kept else -1
            self.last = kept[-1] if kept and name == METRICS else self.last
            self._streams[name] = (folder / name).open("a", encoding="utf-8")
        self._trackers = [start(folder, resume_step) for start in chosen]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def log(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Append one training step; `values` without `step`, for instance loss, learning_rate, grad_norm, seconds."""
        self._append(METRICS, "train", step, values)

    def validation(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Append one validation: `loss` (the mean), and more such as `sigma 0.25`; a step logged before is kept."""
        if step > self._last[VALIDATION]:
            self._append(VALIDATION, "validation", step, values)

    def image(self, step: int, name: str, picture_HWC: Picture) -> None:
        """Show a picture; it is in no metric file."""
        for tracker in self._trackers:
            tracker.image(name, step, picture_HWC)

    def close(self) -> None:
        """Write out everything."""
        for stream in self._streams.values():
            stream.close()
        for tracker in self._trackers:
            tracker.close()

    def _append(self, name: str, group: str, step: int, values: Mapping[str, float | int | str]) -> None:
        assert step > self._last[name], f"{name}: step {step} after step {self._last[name]}"
        record = {"step": step} | {key: _json_value(value) for key, value in values.items()}
        stream = self._streams[name]
        stream.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        stream.flush()
        self._last[name] = step
        numbers = {key: value for key, value in values.items() if not isinstance(value, str)}
        for tracker in self._trackers:
            tracker.scalars(group, step, numbers)


def smooth(before: float | None, value: float) -> float:
    """Exponential average that passes over values that are not finite; `before` is None at the first step."""
    if before is None or not math.isfinite(before):
        return value
    return before if not math.isfinite(value) else SMOOTHING * before + (1 - SMOOTHING) * value


def read(path: Path) -> list[dict[str, Any]]:
    """All whole records of a metric file in order; none where there is no file. A last line cut in half is left out.

    Raises:
        DataError: another line is damaged.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline was cut in half, or is empty
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}:{number}: not a JSON object with a step; repair or delete the line") from None
        records.append(record)
    return records


def _truncate(path: Path, *, resume_step: int) -> list[dict[str, Any]]:
    kept = [record for record in read(path) if record["step"] <= resume_step]
    atomic.write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept).encode())
    return kept


def _json_value(value: float | int | str) -> float | int | str | None:
    """JSON has no NaN: a value that is not finite becomes null, which the report draws as a gap."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
