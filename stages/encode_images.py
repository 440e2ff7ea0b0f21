"""Encode images: every (picture, transform) that has no row yet, on one actor per device, into the latents table.

A picture that fails only now (its header was fine, its pixels are not) is handed back and quarantined, as `plan` would
have done had it decoded it; its neighbours are not touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from flux2_core import cache, images, prompt_rows, recipes, tables
from flux2_core.buckets import Transform
from flux2_core.config import Config
from flux2_core.config_file import parse
from flux2_core.errors import DataError
from flux2_core.model_folder import ModelFolder, resolve
from flux2_core.rows import Row
from flux2_core.store import Table, Writer
from stages import cluster, fill

PIXELS_PER_PASS = 4 * 1024 * 1024  # of one VAE forward
PICTURES_PER_ITEM = 16
TRANSFORM = ("bucket_height", "bucket_width", "resize_height", "resize_width", "crop_top", "crop_left", "flip")


def encode(
    config: Config, model: ModelFolder, samples: pa.Table, *, progress: fill.Progress = fill.silent
) -> fill.Filled:
    """Make sure that every row of the samples table has its latents, or that its picture is named in `failed`.

    Raises:
        DataError: rows are still missing after several rounds.
    """
    fingerprint = recipes.latents_fingerprint(model, config)
    uri = cache.latents_uri(config, fingerprint)
    table = Table.open_or_create(uri, kind=tables.KIND_LATENTS, fingerprint=fingerprint)
    rows = samples.select(["uri", "sha256", "latent_key", *TRANSFORM]).to_pylist()
    actor = ray.remote(**cluster.device_options())(ImageWorker)
    tree = config.model_dump(mode="json", by_alias=True)
    return fill.fill(
        table,
        {row["latent_key"]: row for row in rows},
        divide=_items,
        make=lambda: actor.remote(tree, uri),
        actors=cluster.encoders(config.cluster),
        progress=progress,
    )


def _items(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Runs of one bucket, small enough to share out evenly."""
    item: list[dict[str, Any]] = []
    for row in sorted(rows, key=_size):
        if item and (len(item) == PICTURES_PER_ITEM or _size(row) != _size(item[0])):
            yield item
            item = []
        item.append(row)
    yield item


def _size(row: dict[str, Any]) -> tuple[int, int]:
    return row["bucket_height"], row["bucket_width"]


class ImageWorker:
    """Actor: the VAE on one device, threads that decode ahead of it, and a writer into the table."""

    def __init__(self, tree: dict[str, Any], uri: str) -> None:
        self.config = parse(tree)
        self.uri = uri
        self.dtype = prompt_rows.DTYPES[self.config.latents.dtype]
        self.threads = ThreadPoolExecutor(4, thread_name_prefix="cacheloom-decode")

    @cached_property
    def vae(self) -> Any:
        """The model, loaded by the first item, so that an error of ours reaches the driver as it is."""
        from flux2_core.vae import Vae

        return Vae(resolve(self.config.model, parts=("vae",)), device=cluster.device())

    @cached_property
    def writer(self) -> Writer:
        """Commits rows in the background."""
        cluster.see(self.uri)
        return Writer(Table.open(self.uri), batch_rows=fill.BATCH_ROWS, batch_bytes=fill.BATCH_BYTES)

    def ready(self) -> None:
        """Answers once the actor has its device."""

    def work(self, rows: list[dict[str, Any]]) -> tuple[int, dict[str, str]]:
        """Encode pictures of one bucket; return how many, and the broken ones with their reasons."""
        height, width = _size(rows[0])
        count = max(1, PIXELS_PER_PASS // (height * width))
        broken: dict[str, str] = {}
        ready: list[tuple[str, np.ndarray]] = []
        for row, loaded in zip(rows, self.threads.map(_load, rows), strict=True):
            if isinstance(loaded, DataError):
                broken[row["latent_key"]] = str(loaded).removeprefix(f"{row['uri']}: ")
                continue
            ready.append((row["latent_key"], loaded))
            if len(ready) == count:
                self._encode(ready)
                ready = []
        if ready:
            self._encode(ready)
        return len(rows) - len(broken), broken

    def close(self) -> None:
        """Commit what is left."""
        self.writer.close()

    def _encode(self, ready: list[tuple[str, np.ndarray]]) -> None:
        latents_Bchw = self.vae.encode(torch.from_numpy(np.stack([pixels for _, pixels in ready])))
        for (key, _), latent in zip(ready, latents_Bchw.to(self.dtype), strict=True):
            if not torch.isfinite(latent).all():
                raise DataError(f'the VAE made NaN or infinity of row {key}; use latents.dtype = "fp32"')
            sizes: dict[str, str | int] = {tables.HEIGHT: latent.shape[1], tables.WIDTH: latent.shape[2]}
            self.writer.add(Row(key, prompt_rows.to_bytes(latent), sizes))


def _load(row: dict[str, Any]) -> np.ndarray | DataError:
    try:
        return images.load(row["uri"], Transform(**{name: row[name] for name in TRANSFORM}), sha256=row["sha256"])
    except DataError as error:
        return error
