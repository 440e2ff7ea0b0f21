"""`plan` and `index` of large data sets: CPU seconds and memory per sample, at growing sizes in one process.

Every sample is a small JPEG of its own bytes (one picture, a number behind its end) and a caption of its own. All work
must grow linearly with their number: the ratio of CPU seconds per sample at four times the size is about 1.
Sizes: 5,000, 10,000 and 20,000 samples; `python -m bench.scale --full` goes on to 100,000 (a quarter of an hour).
"""

from __future__ import annotations

import gc
import io
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from bench.measure import Row, table
from flux2_core.cache import fingerprints
from flux2_core.cache.index import TableRef, latents_uri, text_uri
from flux2_core.config.reading import parse
from flux2_core.config.sections import Config
from flux2_core.embedded.tiny_model import build_model
from flux2_core.model.folder import ModelFolder, resolve
from flux2_core.plan import describe, survey
from flux2_core.store import schemas
from flux2_core.store.table import Table
from stages import index
from stages.fill import Filled

SIZES = (5_000, 10_000, 20_000)
FULL = 100_000
WORDS = ("red", "blue", "green", "small", "large", "wooden", "old", "bright", "quiet", "round", "square", "flat")
PER_FOLDER = 1_000
LIMIT_GB = 2.0


@dataclass(frozen=True)
class Point:
    """One size: CPU seconds of `plan` and of `index` after it, and the process's peak memory so far."""

    samples: int
    plan_s: float
    index_s: float
    peak_bytes: int


def run(*, quick: bool = False, full: bool = False) -> list[Row]:
    """Seconds per sample, their growth over a fourfold size, and memory per sample with what 100,000 would take."""
    sizes = (50, 100, 200) if quick else (*SIZES, FULL) if full else SIZES
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build_model(folder / "model")
        make(folder / "photos", sizes[0] // 10)
        _measure(_config(folder, model), sizes[0] // 10)  # imports, tokenizer, thread pools
        points = []
        for size in sizes:
            make(folder / "photos", size)
            points.append(_measure(_config(folder, model), size))
    first, last = points[0], points[-1]
    rows = [
        Row("scale", f"{verb}, {point.samples:,} samples", seconds / point.samples * 1e3, "CPU-ms/sample")
        for point in points
        for verb, seconds in (("plan", point.plan_s), ("index", point.index_s))
    ]
    for verb in ("plan", "index"):
        small, large = (getattr(point, f"{verb}_s") / point.samples for point in (first, last))
        case = f"{verb}, a sample of {last.samples:,} against one of {first.samples:,}"
        rows.append(Row("scale", case, large / small, "x", goal="<= 1.3"))
    growth = (last.peak_bytes - first.peak_bytes) / (last.samples - first.samples)
    at_most = (last.peak_bytes + growth * max(0, FULL - last.samples)) / 1e9
    rows.append(Row("scale", "peak memory per sample", growth / 1e3, "kB"))
    rows.append(
        Row("scale", f"peak memory of {FULL:,} samples", at_most, "GB", goal=f"<= {LIMIT_GB:g}", note=_note(last))
    )
    return rows


def make(folder: Path, count: int) -> None:
    """Have `count` pictures and captions in a folder; those that are there already stay."""
    shade = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(shade).save(out, "JPEG")
    for number in range(count):
        if number % PER_FOLDER == 0:
            (folder / f"{number // PER_FOLDER:04}").mkdir(parents=True, exist_ok=True)
        place = folder / f"{number // PER_FOLDER:04}" / f"picture-{number:06}"
        if not (caption := place.with_suffix(".txt")).exists():
            place.with_suffix(".jpg").write_bytes(out.getvalue() + number.to_bytes(4, "big"))
            caption.write_text(" ".join(WORDS[(number // 12**power) % 12] for power in range(6)) + f" sks {number}")


def _config(folder: Path, model: Path) -> Config:
    return parse(
        {
            "run": "scale",
            "model": {"path": str(model)},
            "data": [{"path": str(folder / "photos"), "resolutions": [64], "trigger": "sks"}],
            "validate": {"every": 0},
            "output": {"root": str(folder / "runs"), "cache": str(folder / "cache")},
        }
    )


def _measure(config: Config, size: int) -> Point:
    model = resolve(config.model, parts=("text_encoder", "tokenizer", "vae", "transformer"))
    gc.collect()
    began = time.process_time()
    planned = survey.survey(config, model)
    surveyed = time.process_time()
    told = describe.describe(config, model, planned)
    assert told["samples"]["kept"] == size, told["samples"]["kept"]
    described = time.process_time()
    text, latents = _tables(config, model)
    published = time.process_time()
    index.publish(config, planned, text=text, latents=latents)
    indexed = time.process_time()
    peak = psutil.Process().memory_info()
    return Point(size, described - began, (surveyed - began) + (indexed - published), _peak(peak.rss))


def _tables(config: Config, model: ModelFolder) -> tuple[Filled, Filled]:
    """Both tables as if all rows were encoded: encoding is another benchmark."""
    made = []
    for kind, fingerprint, uri_of in (
        (schemas.KIND_TEXT, fingerprints.text_fingerprint(model, config), text_uri),
        (schemas.KIND_LATENTS, fingerprints.latents_fingerprint(model, config), latents_uri),
    ):
        uri = uri_of(config, fingerprint)
        version = Table.open_or_create(uri, kind=kind, fingerprint=fingerprint).version
        made.append(Filled(TableRef(uri, version, fingerprint), 0, 0, {}))
    return made[0], made[1]


def _peak(now: int) -> int:
    """Largest resident size of this process so far."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return now


def _note(last: Point) -> str:
    return "measured" if last.samples == FULL else f"from {last.peak_bytes / 1e9:.2f} GB at {last.samples:,}"


if __name__ == "__main__":
    print(table(run(quick="--quick" in sys.argv, full="--full" in sys.argv)))
