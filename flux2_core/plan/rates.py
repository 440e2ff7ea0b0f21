"""Measured rates: what encoding and training took the last time, so that `plan` predicts from measurements alone.

`rates.json` in the cache holds one measurement per table fingerprint and device. It is a hint: two runs that end at
once may lose one of two updates, and a file that cannot be read counts as no measurement.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flux2_core.config.reading import load
from flux2_core.config.sections import Config
from flux2_core.errors import CacheloomError
from flux2_core.run import metrics
from flux2_core.store import objects
from flux2_core.store.hashing import digest
from flux2_core.store.schemas import HEIGHT, TOKENS, WIDTH

NAME = "rates.json"
SURE_ROWS, SURE_STEPS = 100, 20  # of fewer, loading and compiling are most of what was measured: 4 s told as 7.5 min
LIGHTER = 10  # a measurement of less than a tenth of the known one's tokens does not replace it


class Stopwatch:
    """Device-seconds of rows as they are finished. Loading a model is no rate: the clock starts at the first item's
    end where at least half of all rows come after it.
    """

    def __init__(self, devices: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._devices, self._clock = devices, clock
        self._laps = [(0, clock())]

    def lap(self, rows: int) -> None:
        """So many rows more are finished."""
        self._laps.append((self._laps[-1][0] + rows, self._clock()))
        del self._laps[2:-1]

    @property
    def rows(self) -> int:
        """Rows that `seconds` are about."""
        return self._laps[-1][0] - self._start()[0]

    @property
    def seconds(self) -> float:
        """Wall clock times devices."""
        return (self._laps[-1][1] - self._start()[1]) * self._devices

    def _start(self) -> tuple[int, float]:
        warm = self._laps[min(1, len(self._laps) - 1)]
        return warm if 2 * warm[0] <= self._laps[-1][0] else self._laps[0]


@dataclass(frozen=True)
class Rate:
    """So many rows of so many tokens took so many device-seconds (wall clock times devices) on this kind of device."""

    device: str
    rows: int
    tokens: int
    seconds: float
    at: str
    """When, ISO 8601."""

    @classmethod
    def of(cls, watch: Stopwatch, attributes: Iterable[Mapping[str, Any]], *, device: str, now: str) -> Rate:
        """What a stopwatch measured, of rows whose mean size the attributes of encoded rows tell."""
        sizes = [row[TOKENS] if TOKENS in row else row[HEIGHT] * row[WIDTH] for row in attributes]
        tokens = round(sum(sizes) / len(sizes) * watch.rows) if sizes else 0
        return cls(device, watch.rows, tokens, round(watch.seconds, 3), now)

    @property
    def rough(self) -> bool:
        """Whether it says little of larger work."""
        return self.rows < SURE_ROWS

    def predict(self, tokens: int) -> float:
        """Device-seconds for so many tokens."""
        return tokens * self.seconds / self.tokens


def record(root: str, fingerprint: Mapping[str, Any], measured: Rate) -> None:
    """Remember what encoding took, unless far more was measured before on the same device, or nothing now."""
    if not (measured.tokens and measured.seconds > 0):
        return
    tree = _read(root)
    of_table = tree.setdefault(_name(fingerprint), {})
    known = of_table.get(measured.device)
    if known is None or known["tokens"] <= LIGHTER * measured.tokens:
        of_table[measured.device] = asdict(measured)
        objects.write(objects.join(root, NAME), json.dumps(tree, indent=1, sort_keys=True).encode())


def newest(root: str, fingerprint: Mapping[str, Any]) -> Rate | None:
    """The latest measurement for a table's fingerprint, on whatever device; None where there is none."""
    found = _read(root).get(_name(fingerprint), {}).values()
    return Rate(**max(found, key=lambda entry: entry["at"])) if found else None


def step_seconds(config: Config) -> tuple[float, str, int] | None:
    """Median seconds of a step in the latest run that trained alike, that run's name, and of how many steps."""
    runs = sorted(Path(config.output.root).expanduser().glob("*/metrics.jsonl"), key=lambda file: -file.stat().st_mtime)
    for file in runs:
        try:
            then = load(file.parent / "config.toml")
        except CacheloomError:
            continue  # of another version, or half written: no measurement of ours
        if _alike(then) == _alike(config) and (seconds := _seconds(file)):
            return statistics.median(seconds), file.parent.name, len(seconds)
    return None


def _alike(config: Config) -> tuple[Any, ...]:
    """What the time of a step depends on."""
    train = config.train
    return (
        config.model,
        *(config.lora.kind, config.lora.targets),
        sorted({side for data in config.data for side in data.resolutions}),
        config.text.max_length,
        -(-train.batch_size // config.cluster.workers),
        config.cluster.strategy,
        *(train.precision, train.recompute, train.compile),
        *(config.methods, config.tread, config.rollout),
    )


def _seconds(file: Path) -> list[float]:
    return [record["seconds"] for record in metrics.read(file) if record.get("seconds")]


def _name(fingerprint: Mapping[str, Any]) -> str:
    return digest(dict(fingerprint))[:16]


def _read(root: str) -> dict[str, dict[str, dict[str, Any]]]:
    try:
        tree = json.loads(objects.read(objects.join(root, NAME)))
        return {name: {device: asdict(Rate(**entry)) for device, entry in of.items()} for name, of in tree.items()}
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return {}
