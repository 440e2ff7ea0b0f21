"""How everything here is measured: our way and the peer's in turn, CPU seconds of this process, medians.

Shared machines make wall clock times meaningless; CPU seconds of the process (user and system, all its threads) move
far less, and ratios within one run least of all.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Row:
    """One line of the table: ours and theirs in `unit`, and how many times better ours is (or an absolute figure)."""

    benchmark: str
    case: str
    ours: float
    unit: str
    theirs: float | None = None
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    """Least and largest ratio of a single round."""
    goal: str = ""
    note: str = ""


@dataclass
class Timings:
    """CPU seconds of each arm, one per round, in the order of the rounds."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, arm: str) -> float:
        """Median CPU seconds of an arm."""
        return statistics.median(self.seconds[arm])

    def ratio(self, above: str, below: str) -> float:
        """How many times the CPU seconds of `below` the arm `above` takes, by medians."""
        return self.median(above) / self.median(below)

    def spread(self, above: str, below: str) -> tuple[float, float]:
        """Least and largest ratio among the rounds."""
        ratios = [a / b for a, b in zip(self.seconds[above], self.seconds[below], strict=True)]
        return min(ratios), max(ratios)


def alternate(
    arms: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warm: bool = False,
    clock: Callable[[], float] = time.process_time,
) -> Timings:
    """Run every arm once unmeasured (unless all are warm), then all of them in turn `rounds` times (A B A B ...)."""
    for arm in () if warm else arms.values():
        arm()
    timings = Timings({name: [] for name in arms})
    for _ in range(rounds):
        for name, arm in arms.items():
            gc.collect()
            began = clock()
            arm()
            timings.seconds[name].append(clock() - began)
    return timings


def compared(
    timings: Timings, benchmark: str, case: str, *, ours: str, theirs: str, per: int = 1, goal: str = "", note: str = ""
) -> Row:
    """A row of CPU milliseconds per item; the ratio is theirs / ours, so above 1 ours is cheaper."""
    return Row(
        benchmark,
        case,
        timings.median(ours) / per * 1e3,
        "CPU-ms",
        theirs=timings.median(theirs) / per * 1e3,
        ratio=timings.ratio(theirs, ours),
        spread=timings.spread(theirs, ours),
        goal=goal,
        note=note,
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table with aligned columns."""
    head = ["benchmark", "case", "ours", "theirs", "unit", "theirs / ours", "goal", "note"]
    lines = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def json_line(row: Row) -> str:
    """A row as one JSON object."""
    return json.dumps(asdict(row))


def _cells(row: Row) -> list[str]:
    ratio = "(absolute)" if row.ratio is None else f"{row.ratio:.2f}"
    if row.spread is not None:
        ratio += f" ({row.spread[0]:.2f}-{row.spread[1]:.2f})"
    theirs = "" if row.theirs is None else _number(row.theirs)
    return [row.benchmark, row.case, _number(row.ours), theirs, row.unit, ratio, row.goal, row.note]


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
