"""Start-up: what a command costs until the first step's metrics, on the small model: CPU, wall, processes, memory.

CPU seconds are those of the command and of all that it started, dead ones too, as last seen in /proc: a person waits
for the wall clock, which on a shared machine means nothing. `train` and `run` find everything cached; the cold `run`,
which goes first, finds nothing, and no database of Prefect's either. `--quick` is the same: it is small already.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench.measure import Row
from bench.tiny_cache import prepare
from flows.reaper import MARKER
from flux2_core.config.reading import dump_toml, parse
from flux2_core.config.sections import Config
from flux2_core.embedded.tiny_model import RANDOM_SHAPE
from flux2_core.run.folder import RunFolder

LIMIT_S, LOOK_S = 180.0, 0.05
GOAL = "<= 12 CPU-s, <= 8 s"


@dataclass
class Cost:
    """Of a command and its descendants, each by its command line and when it was last seen."""

    cpu_s: dict[psutil.Process, float] = field(default_factory=dict)
    names: dict[psutil.Process, str] = field(default_factory=dict)
    bytes_: dict[psutil.Process, int] = field(default_factory=dict)
    """Memory of those that lived at the first step, each page that several have shared out among them."""
    wall_s: float = 0.0

    def look(self, root: psutil.Process, *, memory: bool = False) -> None:
        """See what there is now."""
        for process in {root, *root.children(recursive=True), *self.cpu_s}:
            try:
                spent = process.cpu_times()
                self.cpu_s[process] = spent.user + spent.system
                self.names[process] = " ".join(process.cmdline()).strip() or self.names.get(process, "")
                if memory:
                    self.bytes_[process] = process.memory_full_info().pss
            except psutil.Error:
                continue  # it has ended: what was last seen of it counts

    def told(self) -> str:
        """Its processes, the dearest first."""
        dearest = sorted(self.cpu_s, key=self.cpu_s.__getitem__, reverse=True)
        return "\n".join(
            f"  {self.cpu_s[one]:6.2f} CPU-s {self.bytes_.get(one, 0) / 1e6:5.0f} MB  {self.names[one][-90:]}"
            for one in dearest
        )


def run(*, quick: bool = False) -> list[Row]:
    """One line for each command, and on standard error what each of its processes costs."""
    del quick
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = prepare(folder, RANDOM_SHAPE, side=64, pictures=2, text_rows=96, train={"steps": 1})
        rows = []
        for case, verb in (("cold run", "run"), ("warm run", "run"), ("warm train", "train")):
            output = {"root": str(folder / case.replace(" ", "-")), "cache": str(folder / "of-the-first")}
            config = parse(given.model_dump(mode="json", by_alias=True) | {"output": output})
            cost = first_step(config, verb, folder)
            print(f"{case}:\n{cost.told()}", file=sys.stderr)
            rows.append(row(case, cost))
    return rows


def row(case: str, cost: Cost) -> Row:
    """A command's line of the table."""
    note = f"{cost.wall_s:.1f} s wall, {len(cost.bytes_)} processes, {sum(cost.bytes_.values()) / 1e9:.2f} GB"
    goal = "" if case.startswith("cold") else GOAL
    return Row("startup", f"{case} to the first step", sum(cost.cpu_s.values()), "CPU-s", goal=goal, note=note)


def first_step(config: Config, verb: str, folder: Path) -> Cost:
    """What `cacheloom VERB` costs until there is a step; it is waited for to its end."""
    file, log = folder / "config.toml", folder / "log"
    file.write_text(dump_toml(config), encoding="utf-8")
    command = [sys.executable, "-m", "flows.cli", verb, str(file)]
    cost, metrics, began = Cost(), RunFolder(config).metrics, time.monotonic()
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=_alone(folder)) as started,
    ):
        root = psutil.Process(started.pid)
        try:
            while not (metrics.is_file() and metrics.stat().st_size):
                if started.poll() is not None or time.monotonic() - began > LIMIT_S:
                    raise RuntimeError(f"`{' '.join(command)}` made no step: {log.read_text()[-2000:]}")
                cost.look(root)
                time.sleep(LOOK_S)
            cost.wall_s = time.monotonic() - began
            cost.look(root, memory=True)
            started.wait(timeout=LIMIT_S)
        finally:
            started.terminate()
    return cost


def _alone(folder: Path) -> Mapping[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_") and name != MARKER}
    return kept | {"PREFECT_HOME": str(folder / "prefect")}
