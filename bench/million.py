"""Memory of large data sets: what `index`, `plan`, the opening of `train` and `gc` take per sample.

Samples table and tensor tables are made directly: no picture is drawn, nothing is encoded, a payload is one byte; a
sample has one caption of 100 characters and a trigger. Each part runs in a process of its own, whose peak of resident
memory is read before the part and after it. Left out: the driver's scan of the files and what workers hold.

`python -m bench.million [SIZE ...]`: by default 10,000 and 100,000 samples; a million takes a quarter of an hour.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from bench.measure import Row, table
from bench.scale import WORDS
from flux2_core.cache import fingerprints, garbage, index, keys, prompt_rows, publish
from flux2_core.config.reading import parse
from flux2_core.config.sections import Config
from flux2_core.data import samples as data_samples
from flux2_core.data import texts
from flux2_core.data.intake import SamplePlan
from flux2_core.data.pictures.transform import Transform
from flux2_core.embedded.tiny_model import build_model
from flux2_core.model.folder import ModelFolder, resolve
from flux2_core.plan import describe
from flux2_core.store import parquet, row, schemas
from flux2_core.store.table import Table
from flux2_core.store.writer import Writer
from flux2_core.train.batches import TrainingData
from stages import encode_images, fill
from stages import index as stage

SIZES = (10_000, 100_000)
AT_ONCE = 65_536
CUT = Transform(64, 64, 70, 64, 3, 0)
GOALS_KB = {"index": 2, "plan": 2, "train": 1, "gc": 1}


def run(*sizes: int) -> list[Row]:
    """Peak memory of each part at each size, and what each sample added since the size before (or since nothing)."""
    rows, known = [], dict.fromkeys(PARTS, (0, 0))
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), size)
            for part, (last, taken) in known.items():
                told = json.loads(subprocess.check_output([sys.executable, "-m", __spec__.name, folder, part]))
                known[part] = size, told["peak"] - told["before"]
                each = (known[part][1] - taken) / (size - last) / 1e3
                note = f"peak {told['peak'] / 1e9:.2f} GB, {told['cpu_s']:.0f} CPU-s"
                goal = f"<= {GOALS_KB[part]} kB" if last else "libraries that load"
                rows.append(Row("million", f"{part}, {size:,} samples", each, "kB/sample", goal=goal, note=note))
    return rows


def make(folder: Path, count: int) -> None:
    """A cache of so many samples, published."""
    build_model(folder / "model")
    config, model = _config(folder), _model(folder)
    prints = _fingerprints(config, model)
    schema = schemas.samples_schema()
    named = list(_batches(count, prints))
    planned = _planned(pa.Table.from_batches([pa.RecordBatch.from_pylist(each, schema) for each in named]), prints)
    filled = []
    for kind, uri_of, rows_of in (
        (schemas.KIND_TEXT, index.text_uri, _text_rows),
        (schemas.KIND_LATENTS, index.latents_uri, _latents_rows),
    ):
        made = Table.open_or_create(uri_of(config, prints[kind]), kind=kind, fingerprint=prints[kind])
        with Writer(made, batch_rows=2 * AT_ONCE, batch_bytes=1 << 30) as writer:
            for each in rows_of(named, prints[kind]):
                writer.add(each)
        made.checkout_latest()
        filled.append(fill.Filled(index.TableRef(made.uri, made.version, prints[kind]), 0, 0, {}))
    stage.publish(config, planned, text=filled[0], latents=filled[1])


def _batches(count: int, prints: dict[str, dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    trigger = keys.text_key(prints[schemas.KIND_TEXT], "sks")
    for start in range(0, count, AT_ONCE):
        rows = []
        for number in range(start, min(count, start + AT_ONCE)):
            caption = " ".join(WORDS[(number // 12**power) % 12] for power in range(15)) + f" sks {number}"
            sha256 = hashlib.sha256(str(number).encode()).hexdigest()
            name = f"{number // 1000:04}/picture-{number:07}"
            rows.append(
                {"id": name, "variant": 0, "uri": f"/data/photos/{name}.jpg", "sha256": sha256}
                | {"width": 700, "height": 640, "captions": [caption], "dataset": 0, "repeats": 1, "weight": 1.0}
                | {"text_keys": [keys.text_key(prints[schemas.KIND_TEXT], caption)]}
                | {"latent_key": keys.picture_key(prints[schemas.KIND_LATENTS], sha256, CUT), **vars(CUT)}
                | {"roles": [{"role": "trigger_only", "text": "sks", "key": trigger}], "mask": None, "references": []}
                | {"regularisation": False, "split": "train" if number % 20 else "validation", "pixels_lost": 0.1}
            )
        yield rows


def _text_rows(named: list[list[dict[str, Any]]], fingerprint: dict[str, Any]) -> Iterator[row.Row]:
    pad = prompt_rows.encode(torch.zeros(1, fingerprint["width"], dtype=torch.bfloat16), fingerprint)
    yield row.Row(prompt_rows.PAD_KEY, pad, {"text": "", "tokens": 1})
    for text in ("", "sks", *(sample["captions"][0] for rows in named for sample in rows)):
        yield row.Row(keys.text_key(fingerprint, text), b"x", {"text": text, "tokens": 30})


def _latents_rows(named: list[list[dict[str, Any]]], _fingerprint: dict[str, Any]) -> Iterator[row.Row]:
    yield from (row.Row(sample["latent_key"], b"x", {"height": 4, "width": 4}) for rows in named for sample in rows)


def _config(folder: Path) -> Config:
    return parse(
        {
            "run": "million",
            "model": {"path": str(folder / "model")},
            "data": [{"path": str(folder), "resolutions": [64], "trigger": "sks"}],
            "validate": {"every": 0},
            "output": {"root": str(folder / "runs"), "cache": str(folder / "cache")},
        }
    )


def _model(folder: Path) -> ModelFolder:
    return resolve(_config(folder).model, parts=("text_encoder", "tokenizer", "vae", "transformer"))


def _fingerprints(config: Config, model: ModelFolder) -> dict[str, dict[str, Any]]:
    return {
        schemas.KIND_TEXT: fingerprints.text_fingerprint(model, config),
        schemas.KIND_LATENTS: fingerprints.latents_fingerprint(model, config),
    }


def _planned(samples: pa.Table, prints: dict[str, dict[str, Any]]) -> SamplePlan:
    return SamplePlan(samples, schemas.quarantine_schema().empty_table(), [], fingerprints=prints)


def _cached(config: Config, model: ModelFolder) -> SamplePlan:
    return _planned(parquet.read_parquet(index.read_index(config, model).samples), _fingerprints(config, model))


def _index(config: Config, model: ModelFolder) -> None:
    """The driver of `cache` from the samples table on: leases, what is wanted and missing, the work's division."""
    planned = _cached(config, model)
    publish.announce(config, planned.samples)
    filled = []
    for kind, uri_of in ((schemas.KIND_TEXT, index.text_uri), (schemas.KIND_LATENTS, index.latents_uri)):
        made = Table.open(uri_of(config, planned.fingerprints[kind]))
        filled.append(_filled(made, _wanted(config, planned, kind)))
    for item in encode_images.items(list(data_samples.wanted(planned.samples).values())):
        assert item
    stage.publish(config, planned, text=filled[0], latents=filled[1])


def _wanted(config: Config, planned: SamplePlan, kind: str) -> dict[str, Any]:
    if kind == schemas.KIND_LATENTS:
        return dict(data_samples.wanted(planned.samples))
    return {keys.text_key(planned.fingerprints[kind], text): text for text in texts.texts(config, planned.samples)}


def _filled(made: Table, wanted: dict[str, Any]) -> fill.Filled:
    return fill.fill(made, wanted, divide=iter, make=object, actors=1, progress=fill.silent)


def _gc(config: Config, model: ModelFolder) -> None:
    assert not any(garbage.collect(config, keep=timedelta(0), dry_run=False)["dropped"].values())


PARTS: dict[str, Callable[[Config, ModelFolder], object]] = {
    "index": _index,
    "plan": lambda config, model: describe.describe(config, model, _cached(config, model)),
    "train": TrainingData,
    "gc": _gc,
}


def _part(folder: Path, part: str) -> None:
    config, model = _config(folder), _model(folder)
    before, began = _peak(), time.process_time()
    PARTS[part](config, model)
    print(json.dumps({"before": before, "peak": _peak(), "cpu_s": time.process_time() - began}))


def _peak() -> int:
    """Largest resident size of this program; ru_maxrss would tell the parent's where that was larger."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[2] in PARTS:
        _part(Path(sys.argv[1]), sys.argv[2])
    else:
        print(table(run(*([int(size) for size in sys.argv[1:]] or SIZES))))
