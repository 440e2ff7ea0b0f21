"""Start-up: wall seconds from `cacheloom train` to the first step's metrics, on the small model.

The one absolute figure here: imports, Ray, its training workers, opening the cache and one step. It says how long a
person waits, on this machine under its present load.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.measure import Row
from bench.tiny_cache import prepare
from flux2_core.config.reading import dump_toml
from flux2_core.config.sections import Config
from flux2_core.embedded.tiny_model import RANDOM_SHAPE
from flux2_core.run.folder import RunFolder

LIMIT_S = 180.0


def run(*, quick: bool = False) -> list[Row]:
    """Seconds to the first step; `quick` changes nothing, it is small already."""
    del quick
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = prepare(folder, RANDOM_SHAPE, side=64, pictures=2, text_rows=96, train={"steps": 1})
        file = folder / "config.toml"
        file.write_text(dump_toml(config), encoding="utf-8")
        seconds = _first_step(config, file, log=folder / "log")
    return [Row("startup", "cacheloom train to the first step", seconds, "s wall", note="small model, one worker")]


def _first_step(config: Config, file: Path, *, log: Path) -> float:
    metrics = RunFolder(config).metrics
    began = time.monotonic()
    command = [sys.executable, "-m", "flows.cli", "train", str(file)]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            while not (metrics.is_file() and metrics.stat().st_size):
                if process.poll() is not None or time.monotonic() - began > LIMIT_S:
                    raise RuntimeError(f"`{' '.join(command)}` made no step: {log.read_text()[-2000:]}")
                time.sleep(0.02)
            seconds = time.monotonic() - began
            process.wait(timeout=LIMIT_S)
        finally:
            process.terminate()
    return seconds
