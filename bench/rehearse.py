"""`python -m bench.rehearse klein-4b`: the whole way at a published model's real sizes, with random weights, on CPUs.

Writes the model's folder (klein-4b: 16 GB), two noise pictures of 256 px, and runs plan, cache, two steps of train
(which exports both LoRA files) and sample, through the command line. Prints what each took: seconds, and of each
process the most memory, against what the planner counts for a card. `--tiny` is the same way in toy sizes.

Told are a process's memory at the most, and what of it is its own: the rest are pages of files, weights above all,
which a CPU uses where the files have them. The planner counts what tensors take; libraries are 0.5 GB more.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from bench import full_size
from bench.full_size import SIZES
from flux2_core.config.reading import dump_toml, parse
from flux2_core.config.sections import Config
from flux2_core.model.folder import ModelFolder
from flux2_core.placement import drawing, planner

VERBS = ("plan", "cache", "train", "sample")
LOOKS_S = 0.2  # how often memory is read
LEAST = 0.5e9  # bytes of a process that has a row of its own
SIDE, TINY_SIDE = 256, 64


@dataclass(frozen=True)
class Took:
    """What one verb took; of each process the bytes that are its own, and with files' pages."""

    verb: str
    seconds: float
    processes: list[tuple[str, int, int]]
    planned: float | None
    """Bytes of the process that has the model."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 0 where every verb ended well."""
    parser = argparse.ArgumentParser(prog="python -m bench.rehearse", description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=[*SIZES])
    parser.add_argument("--tiny", action="store_true", help="toy sizes: shows that it works")
    parser.add_argument("--folder", type=Path, help="where the model and the run are put, and stay; default: nowhere")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        began = time.perf_counter()
        size = SIZES[options.model]
        model = full_size.describe(folder / "model", full_size.tiny(size) if options.tiny else size)
        full_size.write(model)
        print(f"{options.model}: folder written in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        config = prepare(folder, model, side=TINY_SIDE if options.tiny else SIDE)
        found = []
        for verb in VERBS:
            found.append(rehearse(folder, model, config, verb))
            print(table(found[-1:]), file=sys.stderr, flush=True)
    print(table(found))
    return 0


def prepare(folder: Path, model: ModelFolder, *, side: int) -> Config:
    """Two pictures with captions, and the configuration beside them."""
    photos = folder / "photos"
    photos.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for place in range(2):
        Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(photos / f"p{place}.png")
        (photos / f"p{place}.txt").write_text(f"a photo of a red square, number {place}")
    guided = {} if model.guided else {"guidance": 1.0}
    config = parse(
        {
            "run": "rehearsal",
            "model": {"path": str(model.path)},
            "data": [{"path": str(photos), "resolutions": [side]}],
            "train": {"steps": 2, "batch_size": 1, "precision": "bf16", "recompute": "none"},
            "validate": {"every": 0, "prompts": ["a red square"], "steps": 2, **guided},
            "output": {"root": str(folder / "runs"), "cache": str(folder / "cache")},
        }
    )
    (folder / "config.toml").write_text(dump_toml(config), encoding="utf-8")
    return config


def rehearse(folder: Path, model: ModelFolder, config: Config, verb: str) -> Took:
    """Run one verb and watch its processes.

    Raises:
        RuntimeError: it did not end well; holds the end of what it said.
    """
    log, began = folder / f"{verb}.log", time.perf_counter()
    command = [sys.executable, "-m", "flows.cli", verb, str(folder / "config.toml")]
    peaks: dict[int, tuple[str, int, int]] = {}
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        over = threading.Event()
        watcher = threading.Thread(target=_watch, args=(process.pid, peaks, over))
        watcher.start()
        try:
            code = process.wait()
        finally:
            over.set()
            watcher.join()
            process.terminate()
    if code:
        raise RuntimeError(f"`cacheloom {verb}` ended with {code}: {log.read_text()[-2000:]}")
    processes = sorted(peaks.values(), key=lambda peak: -peak[2])
    return Took(verb, time.perf_counter() - began, processes, planned(model, config, verb))


def planned(model: ModelFolder, config: Config, verb: str) -> float | None:
    """What the process that has a model takes in tensors, by the planner; of the encoder its weights alone."""
    if verb == "cache":
        layers = max(model.family.taps)
        names = (f"layers.{number}." for number in range(layers))
        wanted = (*names, "embed_tokens")
        every = full_size.tensors(model, "text_encoder")
        return sum(
            one.nbytes for name, one in every.items() if any(part in name for part in wanted) and "vision" not in name
        )
    if verb == "plan":
        return None
    asked = planner.job(config, model, world=1, local=1)
    if verb == "sample":
        asked = drawing.job(config, model, adapter=asked.adapter)
    return planner.place(asked, "ddp", "bf16", "none").total - planner.SPARE


def _watch(first: int, peaks: dict[int, tuple[str, int, int]], over: threading.Event) -> None:
    """Keep the most memory of a process and of all that it started, until it is over."""
    while not over.wait(LOOKS_S):
        with suppress(psutil.NoSuchProcess):
            for process in (one := psutil.Process(first)), *one.children(recursive=True):
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError, ProcessLookupError):
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    told = dict(line.split(":", 1) for line in status.splitlines())
                    own, all_ = (int(told.get(name, "0").split()[0]) * 1024 for name in ("RssAnon", "VmHWM"))
                    title = " ".join(process.cmdline()[:1] if process.pid != first else ["cacheloom"])
                    name, most, whole = peaks.get(process.pid, (title, 0, 0))
                    peaks[process.pid] = (title or name, max(most, own), max(whole, all_))


def table(found: Sequence[Took]) -> str:
    """A row for each large process of each verb, and one for all others."""
    rows = ["| verb | seconds | process | GB | of it own | planned |", "| --- " * 6 + "|"]
    for took in found:
        large = [one for one in took.processes if one[2] >= LEAST] or took.processes[:1]
        for place, (name, own, whole) in enumerate(large):
            shown = f"{took.planned / 1e9:.2f}" if took.planned and not place else ""
            seconds = f"{took.seconds:.0f}" if not place else ""
            rows.append(
                f"| {took.verb if not place else ''} | {seconds} | {Path(name).name} | {whole / 1e9:.2f} | "
                f"{own / 1e9:.2f} | {shown} |"
            )
        others = [one[1] for one in took.processes if one not in large]
        rows.append(f"| | | {len(others)} others | | {sum(others) / 1e9:.2f} | |")
    return "\n".join(rows)


if __name__ == "__main__":
    raise SystemExit(main())
