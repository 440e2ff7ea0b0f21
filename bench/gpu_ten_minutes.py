"""`python -m bench.gpu_ten_minutes`: all that only a card can tell, in ten minutes, in the order of what it decides.

Each step is a process of its own with a time limit, so that one that crashes or hangs loses itself alone; what it
printed before is kept. Results are JSON lines on standard output as they come: first whether numbers are right, then
what a step takes, then what the estimates of `plan` rest on, then the encoders. Nothing is downloaded. `--tiny` runs
every step with toy sizes on whatever device there is, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

PRECISIONS = ("bf16", "fp8-matmul", "int8", "int8-matmul", "fp8", "int4", "nf4")
SAID = 3  # last lines of what a failed step wrote on standard error
LEAST_S = 15.0  # a step is not begun with less left


@dataclass(frozen=True)
class Step:
    """Processes that run side by side, each of `python -m` and these words."""

    name: str
    decides: str
    limit_s: float
    commands: tuple[tuple[str, ...], ...]


def _probe(*words: str) -> tuple[str, ...]:
    return "bench.gpu_probes", *words


def _train(precision: str, compiled: str, *words: str, case: str = "1024x1") -> tuple[str, ...]:
    return "bench.gpu_step", "--precision", precision, "--case", case, "--compile", compiled, *words


NONE, WAYS = ("--recompute", "none"), ("resident", "stream", "compile")
STREAM = ("--strategy", "stream")
STEPS = (
    Step("card", "what the rest is about", 60, (_probe("card"),)),
    Step(
        "correct", "whether a precision may be used: resident, streamed, compiled", 120,
        tuple(_probe("correct", precision, way) for precision in PRECISIONS for way in WAYS),
    ),
    Step("bf16", "seconds a step; the planner's bytes", 80, (_train("bf16", "off", "--recompute", "none", "full"),)),
    Step("bf16 compiled", "train.compile by default", 110, (_train("bf16", "on", *NONE),)),
    Step("fp8-matmul", "the precision to advise", 60, (_train("fp8-matmul", "off", *NONE),)),
    Step("fp8-matmul compiled", "the same", 110, (_train("fp8-matmul", "on", *NONE),)),
    Step("matmuls", "use_fast_accum, and shares of `plan`", 40, (_probe("matmuls"),)),
    Step("selective", "what recomputing costs", 60, (_train("fp8-matmul", "off", "--recompute", "selective"),)),
    Step("attention", "which backend, and its share", 40, (_probe("attention"),)),
    Step("copies", "whether streaming hides; shares of `plan`", 40, (_probe("copies"),)),
    Step("stream", "seconds a step on small cards", 90, (_train("int8", "off", *STREAM),)),
    Step("captions", "text.quantize", 90, (_probe("captions", "none"),)),
    Step("captions int8", "the same", 90, (_probe("captions", "int8"),)),
    Step("pictures", "the VAE's batch; tiles above a size", 60, (_probe("pictures"),)),
    Step("512", "the goal of 0.24 s a picture", 60, (_train("fp8-matmul", "off", *NONE, case="512x4"),)),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 whatever failed, since that is a result."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_ten_minutes", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600, help="of all steps together")
    parser.add_argument("--steps", nargs="+", choices=[step.name for step in STEPS], help="only these")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: shows that it works")
    options = parser.parse_args(arguments)
    chosen = [step for step in STEPS if not options.steps or step.name in options.steps]
    for line in lines(chosen, seconds=options.seconds, more=("--tiny",) if options.tiny else ()):
        print(json.dumps(line), flush=True)
    return 0


def lines(steps: Sequence[Step], *, seconds: float, more: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """What every step printed, each line with the step's name; then how it ended."""
    end = time.monotonic() + seconds
    for step in steps:
        told = {"step": step.name, "decides": step.decides}
        began = time.monotonic()
        if (left := end - began) < LEAST_S:
            yield told | {"left_out": f"after {seconds:.0f} s"}
            continue
        with ThreadPoolExecutor(min(len(step.commands), os.cpu_count() or 1)) as beside:
            run = partial(_run, more=more, limit_s=min(step.limit_s, left))
            for found in beside.map(run, step.commands):
                yield from (told | line for line in found)
        yield told | {"took_s": round(time.monotonic() - began, 1)}


def _run(words: Sequence[str], *, more: Sequence[str], limit_s: float) -> list[dict[str, Any]]:
    """Lines of one process; the last one says how it ended, where it did not end well."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", *words, *more], stdout=subprocess.PIPE, stderr=errors, text=True,
            start_new_session=True, cwd=Path(__file__).parents[1],
        )  # fmt: skip
        try:
            out, ended = process.communicate(timeout=limit_s)[0], {}
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it had compile
            out, ended = process.communicate()[0], {"timed_out_s": round(limit_s)}
        if process.returncode and not ended:
            errors.seek(0)
            ended = {"failed": process.returncode, "said": errors.read().splitlines()[-SAID:]}
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{") and line.endswith("}")]
    return [*found, *([{"command": " ".join(words)} | ended] if ended else [])]


if __name__ == "__main__":
    raise SystemExit(main())
