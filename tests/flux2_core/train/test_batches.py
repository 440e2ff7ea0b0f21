"""What training holds of its data: columns instead of rows, the same buckets, a kilobyte a sample."""

import gc
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa

from bench import million
from flux2_core.store import parquet, schemas
from flux2_core.train.batches import TrainingData
from flux2_core.train.length import buckets_of

MOST_BYTES = 750  # held; while it opens 200 more, for a moment (docs/benchmarks.md)


def test_buckets_are_those_of_the_definition() -> None:
    """Samples share a bucket where their own sides and each reference's are the same; places ascend in each."""
    rng = np.random.default_rng(1)

    def sides() -> dict[str, int]:
        return {"bucket_height": int(rng.choice([64, 96])), "bucket_width": int(rng.choice([64, 96]))}

    schema = pa.schema(
        [schemas.samples_schema().field(name) for name in ("bucket_height", "bucket_width", "references")]
    )
    listed = [sides() | {"references": [sides() for _ in range(rng.integers(3))]} for _ in range(300)]
    places = np.flatnonzero(rng.random(300) < 0.9)
    wanted: dict[tuple[int, ...], list[int]] = {}
    for place, row in enumerate(listed[each] for each in places):
        key = [part[name] for part in (row, *row["references"]) for name in ("bucket_height", "bucket_width")]
        wanted.setdefault(tuple(key), []).append(place)
    table = pa.Table.from_pylist(listed, schema)
    found = buckets_of(parquet.Rows(table, places))
    assert {key: each.tolist() for key, each in found.items()} == wanted
    alone = table.set_column(2, schema.field(2), pa.array([[]] * 300, schema.field(2).type))
    assert {len(key) for key in buckets_of(parquet.Rows(alone, places))} == {2}


def test_a_sample_takes_a_kilobyte(tmp_path: Path) -> None:
    """Opened for training, a sample with a caption of 100 characters takes under 750 bytes, readers and all."""
    count = 3_000
    million.make(tmp_path, count)
    config, model = million._config(tmp_path), million._model(tmp_path)
    TrainingData(config, model)  # what libraries keep
    gc.collect()
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    data = TrainingData(config, model)
    taken = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - before
    tracemalloc.stop()
    assert len(data.train) + len(data.validation) == count
    assert taken / count < MOST_BYTES
