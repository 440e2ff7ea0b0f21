"""`python -m bench [NAME ...] [--json] [--quick]`: run the CPU benchmarks and print one table.

With `--json` the rows go to standard output as JSON lines and the table to standard error. `--quick` proves that a
benchmark works, on toy sizes whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import platform
import sys
import time
import warnings
from collections.abc import Sequence

from bench.measure import Row, json_line, table

BENCHMARKS = {
    "bytes": "bench.stored_bytes",
    "read_cache": "bench.read_cache",
    "encode_text": "bench.encode_text",
    "decode": "bench.decode",
    "scale": "bench.scale",
    "step": "bench.step",
    "startup": "bench.startup",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="CPU benchmarks: ours against the peers' way.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones: {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--json", action="store_true", help="print JSON lines; the table goes to standard error")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it works, figures mean nothing")
    options = parser.parse_args(arguments)
    if odd := sorted(set(options.names) - BENCHMARKS.keys()):
        parser.error(f"no benchmark {odd[0]!r}; there are {', '.join(BENCHMARKS)}")
    _settle()
    rows: list[Row] = []
    for name in options.names or BENCHMARKS:
        began = time.perf_counter()
        rows += importlib.import_module(BENCHMARKS[name]).run(quick=options.quick)
        print(f"{name}: done in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    if options.json:
        print("\n".join(json_line(row) for row in rows))
    print(f"{heading()}\n\n{table(rows)}", file=sys.stderr if options.json else sys.stdout)
    return 0


def heading() -> str:
    """Date, machine and versions, as every figure must carry them."""
    import torch

    now = datetime.datetime.now(datetime.UTC)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{now:%Y-%m-%d %H:%M} UTC, {_processor()}, {os.cpu_count()} cores (load {load}), 1 thread, "
        f"Python {platform.python_version()}, torch {torch.__version__}; CPU seconds: medians, alternating"
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (FileNotFoundError, StopIteration):
        return platform.processor() or platform.machine()


def _settle() -> None:
    """One thread, so that no CPU second is spent waiting in a spin lock; libraries quiet."""
    import torch

    torch.set_num_threads(1)
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore")


if __name__ == "__main__":
    sys.exit(main())
