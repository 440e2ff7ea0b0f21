"""Encode images: every picture, reference and mask without a row yet, on one actor per device, into the latents table.

An actor has two items of work: threads decode the second one's pictures while the VAE is busy with the first one's, so
that the device never waits. A file that fails only now (its header was fine, its pixels are not) is handed back and its
samples are quarantined, as `plan` would have done had it decoded it; its neighbours are not touched.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import torch

from flux2_core.cache import proofs
from flux2_core.config.reading import parse
from flux2_core.config.sections import Config, Latents
from flux2_core.data import samples as data_samples
from flux2_core.data.pictures import load, masks
from flux2_core.data.samples import Wanted
from flux2_core.data.sources import read
from flux2_core.errors import DataError
from flux2_core.model import soundness, tensor_bytes
from flux2_core.model.folder import ModelFolder, resolve
from flux2_core.model.latents import PIXELS_PER_TOKEN
from flux2_core.placement import encoding, relief
from flux2_core.placement.encoding import PIXELS_PER_PASS
from flux2_core.store import schemas
from flux2_core.store.row import Row
from flux2_core.store.table import Table
from flux2_core.store.writer import Writer
from stages import cluster, fill

PIXELS_PER_ITEM = 4 * PIXELS_PER_PASS  # 50 MB of decoded pixels
MOST_PER_ITEM = 64
MOST_TOGETHER = 1_024  # rows out of one row group: one actor's, as each that had some would read all of it
ITEMS_PER_ACTOR = 4  # at least, however large row groups are
ITEMS_AHEAD = 2  # of one actor: one on the device, one being decoded
DECODERS = 4  # threads of one actor; decoding and resizing release Python's lock


def encode(
    config: Config,
    model: ModelFolder,
    samples: pa.Table,
    *,
    fingerprint: Mapping[str, Any],
    progress: fill.Progress = fill.silent,
) -> fill.Filled:
    """Make sure that every sample has its latents rows, or that the file which has none is named in `failed`.

    `fingerprint` is that of the samples' keys (`cache.proofs`).

    Raises:
        DataError: a latent is unsound (NaN, infinity, zeros, a wrong shape), or a round brings no row.
    """
    table = proofs.open_table(config, model, schemas.KIND_LATENTS, fingerprint)
    actor = ray.remote(max_concurrency=ITEMS_AHEAD, **cluster.encoding_options(config.cluster))(ImageWorker)
    tree = cluster.tree(config, model)
    return fill.fill(
        table,
        data_samples.wanted(samples),
        divide=partial(items, actors=(actors := cluster.encoders(config.cluster))),
        make=lambda: actor.remote(tree, table.uri),
        actors=actors,
        progress=progress,
        ahead=ITEMS_AHEAD,
    )


def items(wanted: list[Wanted], *, actors: int = 1) -> Iterator[list[Wanted]]:
    """Masks, and runs of one bucket, small enough to share out evenly; of row groups each as a whole, by bucket in it.

    By bucket alone 8 actors read 27 times as much of Parquet files with 100 rows a group as there is (84 times with
    1,000), as nearly each row was another group's than the one before; so they read it once.
    """
    grouped = [row for row in wanted if read.group(row.uri)]
    most = max(MOST_PER_ITEM, min(MOST_TOGETHER, len(grouped) // (ITEMS_PER_ACTOR * actors)))
    for part in read.together(grouped, uri=lambda row: row.uri, least=MOST_PER_ITEM, most=most):
        yield sorted(part, key=_like)
    item: list[Wanted] = []
    for row in sorted((row for row in wanted if not read.group(row.uri)), key=_like):
        most = max(1, min(MOST_PER_ITEM, PIXELS_PER_ITEM // _pixels(row)))
        if item and (len(item) == most or _like(row) != _like(item[0])):
            yield item
            item = []
        item.append(row)
    if item:
        yield item


def _like(row: Wanted) -> tuple[bool, int, int]:
    return row.mask, row.transform.bucket_height, row.transform.bucket_width


def _pixels(row: Wanted) -> int:
    return row.transform.bucket_height * row.transform.bucket_width


class ImageWorker:
    """Actor: the VAE on one device, threads that decode ahead of it, and a writer into the table."""

    def __init__(self, tree: dict[str, Any], uri: str) -> None:
        self.tree, self.uri = tree, uri
        self.threads = ThreadPoolExecutor(DECODERS, thread_name_prefix="cacheloom-decode")
        self.turn = threading.Lock()  # held by the item whose pictures are on the device

    @cached_property
    def config(self) -> Config:
        """Read by the first item: what `__init__` raises reaches the driver as Ray's own error."""
        return parse(self.tree)

    @cached_property
    def model(self) -> ModelFolder:
        """Where the model lies on this machine."""
        return resolve(self.config.model, parts=("vae",))

    @cached_property
    def vae(self) -> Any:
        """The model, loaded by the first item, so that an error of ours reaches the driver as it is."""
        from flux2_core.model.vae import Vae

        compiler = "inductor" if self.config.cluster.compile_vae else None
        precision = self.config.latents.precision
        return Vae(self.model, device=cluster.device(), compiler=compiler, precision=precision)

    @cached_property
    def portions(self) -> relief.Portions:
        """Passes of the VAE as large as the card takes them; of a picture always the whole (decisions/0037)."""
        most = encoding.pictures(self.config, encoding.here(self.config, torch.device(cluster.device()))).most
        alone = "use a larger card, or smaller data[].resolutions"
        return relief.Portions(most, size=lambda pair: _pixels(pair[0]), alone=alone)

    @cached_property
    def writer(self) -> Writer:
        """Commits rows in the background, once it is seen that this machine makes the table's bytes."""
        cluster.see(self.uri)
        table = Table.open(self.uri)
        proofs.check_node(self.config, self.model, table)
        return fill.writer(table)

    def ready(self) -> None:
        """Answers once the actor has its device."""

    def work(self, rows: list[Wanted]) -> tuple[int, dict[str, str]]:
        """Make the rows of one item; return how many, and the broken files by key with their reasons."""
        rest = iter(rows)
        ahead = min(MOST_PER_ITEM, max(1, PIXELS_PER_ITEM // max(map(_pixels, rows))))
        loading = deque(map(self._decode, islice(rest, ahead)))
        with self.turn:
            broken: dict[str, str] = {}
            ready: list[tuple[Wanted, npt.NDArray[np.uint8]]] = []
            for row in rows:
                loaded = loading.popleft().result()
                loading.extend(map(self._decode, islice(rest, 1)))
                if ready and _like(row) != _like(ready[0][0]):
                    self._encode(ready)
                    ready = []
                if isinstance(loaded, DataError):
                    broken[row.key] = str(loaded).removeprefix(f"{row.uri}: ")
                elif row.mask:
                    self._add(row, loaded.tobytes())
                else:
                    ready.append((row, loaded))
                if len(ready) == max(1, PIXELS_PER_PASS // _pixels(row)):
                    self._encode(ready)
                    ready = []
            if ready:
                self._encode(ready)
        return len(rows) - len(broken), broken

    def _decode(self, row: Wanted) -> Future[npt.NDArray[np.uint8] | DataError]:
        return self.threads.submit(_load, row, self.config.latents)

    def close(self) -> None:
        """Commit what is left."""
        self.writer.close()

    def _encode(self, ready: list[tuple[Wanted, npt.NDArray[np.uint8]]]) -> None:
        dtype = tensor_bytes.DTYPES[self.config.latents.dtype]
        for part, latents_Bchw in self.portions.passes(ready, self._latents):
            for (row, _), latent_chw in zip(part, latents_Bchw.to(dtype), strict=True):
                height, width = _tokens(row)
                try:
                    soundness.check_latent(latent_chw, height=height, width=width, dtype=dtype)
                except DataError as error:
                    raise DataError(f"{row}: the VAE {error}") from None
                self._add(row, tensor_bytes.to_bytes(latent_chw))

    def _latents(self, part: list[tuple[Wanted, npt.NDArray[np.uint8]]]) -> torch.Tensor:
        latents_Bchw: torch.Tensor = self.vae.encode(torch.from_numpy(np.stack([pixels for _, pixels in part])))
        return latents_Bchw

    def _add(self, row: Wanted, payload: bytes) -> None:
        height, width = _tokens(row)
        self.writer.add(Row(row.key, payload, {schemas.HEIGHT: height, schemas.WIDTH: width}))


def _tokens(row: Wanted) -> tuple[int, int]:
    return row.transform.bucket_height // PIXELS_PER_TOKEN, row.transform.bucket_width // PIXELS_PER_TOKEN


def _load(row: Wanted, latents: Latents) -> npt.NDArray[np.uint8] | DataError:
    """Decoded pixels, or a mask's tokens; an error is handed on as a value, in its picture's place."""
    try:
        if row.mask:
            return masks.load(row.uri, row.transform, sha256=row.sha256)
        return load.load(row.uri, row.transform, latents=latents, sha256=row.sha256)
    except DataError as error:
        return error
