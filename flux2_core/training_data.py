"""Batches from the caches alone: rows by key, prompts rebuilt, everything random keyed by (seed, step, position).

Legend: B samples of one worker, c = 128, h and w in tokens, L text rows, D row width.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from flux2_core import cache, prompt_rows, tables
from flux2_core.config import Config
from flux2_core.errors import DataError
from flux2_core.flow_matching import draw_sigma, generator
from flux2_core.latents import CHANNELS
from flux2_core.model_folder import ModelFolder
from flux2_core.order import Order
from flux2_core.rows import Row
from flux2_core.store import Table
from flux2_core.store_reader import Reader

PREFETCH = 4


@dataclass(frozen=True)
class Batch:
    """One worker's part of a step; `total` is the size of the whole batch over all workers."""

    ids: list[str]
    latents_Bchw: torch.Tensor
    noise_Bchw: torch.Tensor
    sigma_B: torch.Tensor
    prompts_BLD: torch.Tensor
    total: int


class TrainingData:
    """The open caches of a configuration, and the samples that they serve."""

    def __init__(self, config: Config, model: ModelFolder) -> None:
        self.config = config
        self.index = cache.read_index(config, model)
        self.samples = self.index.samples.rsplit("/", 1)[-1]  # named by its content: the same wherever the cache is
        rows = tables.read_parquet(self.index.samples).to_pylist()
        self.train = [row for row in rows if row["split"] == "train"]
        self.validation = [row for row in rows if row["split"] == "validation"]
        self.prompts = cache.prompts(config)
        self.text = Table.open(self.index.text.uri, version=self.index.text.version)
        self.latents = Table.open(self.index.latents.uri, version=self.index.latents.version)
        self.text_reader = Reader(self.text, self._wanted_texts(rows))
        self.latents_reader = Reader(self.latents, self._covered("latent", {r["latent_key"]: r["id"] for r in rows}))
        self.pad_1D = self._pad_row()
        self.order = Order(_buckets(self.train), batch_size=config.train.batch_size, seed=config.train.seed)

    def batch(self, step: int, *, rank: int = 0, world: int = 1) -> Batch:
        """The part of optimizer step `step` (from 0) that worker `rank` of `world` computes."""
        members = self.order.batch(step)
        share = len(members) // world
        mine = [(place, self.train[members[place]]) for place in range(rank * share, (rank + 1) * share)]
        train = self.config.train
        latents, noises, sigmas, prompts = [], [], [], []
        for (place, row), clean in zip(mine, self.latent_rows([row for _, row in mine]), strict=True):
            rng = generator(train.seed, "draw", step, place)
            sigmas.append(draw_sigma(train.timesteps, rng))
            dropped = float(torch.rand((), generator=rng)) < train.caption_dropout
            choice = int(torch.randint(len(row["text_keys"]), (), generator=rng))
            prompts.append(self.key(cache.NULL_TEXT) if dropped else row["text_keys"][choice])
            noises.append(torch.randn(clean.shape, generator=rng))
            latents.append(clean)
        return Batch(
            ids=[row["id"] for _, row in mine],
            latents_Bchw=torch.stack(latents),
            noise_Bchw=torch.stack(noises),
            sigma_B=torch.tensor(sigmas),
            prompts_BLD=self.prompt_rows(prompts),
            total=len(members),
        )

    def batches(self, start: int, stop: int, *, rank: int, world: int) -> Iterator[tuple[Batch, float]]:
        """Batches of steps start..stop-1, read ahead by threads, each with the seconds that it was waited for."""
        with ThreadPoolExecutor(2, thread_name_prefix="cacheloom-read") as pool:
            ahead: deque[Future[Batch]] = deque()
            for step in range(start, stop):
                while len(ahead) < PREFETCH and step + len(ahead) < stop:
                    ahead.append(pool.submit(self.batch, step + len(ahead), rank=rank, world=world))
                began = time.perf_counter()
                batch = ahead.popleft().result()
                yield batch, time.perf_counter() - began

    def key(self, text: str) -> str:
        """Key of a text in this cache."""
        return cache.text_key(self.index.text.fingerprint, text)

    def prompt_rows(self, keys: list[str]) -> torch.Tensor:
        """Full prompt embeddings (B, L, D) of cached texts, each row copied once."""
        fingerprint, length = self.index.text.fingerprint, self.config.text.max_length
        dtype = prompt_rows.DTYPES[fingerprint["dtype"]]
        out_BLD = torch.empty(len(keys), length, prompt_rows.width(fingerprint), dtype=dtype)
        for rows_LD, row in zip(out_BLD, self.text_reader.fetch(keys), strict=True):
            prompt_rows.rebuild_into(rows_LD, self._rows(row), self.pad_1D)
        return out_BLD

    def latent_rows(self, samples: list[dict[str, Any]]) -> list[torch.Tensor]:
        """Latents (c, h, w) of samples, fp32."""
        dtype = prompt_rows.DTYPES[self.config.latents.dtype]
        tensors = []
        for row in self.latents_reader.fetch([sample["latent_key"] for sample in samples]):
            shape = (CHANNELS, int(row.attributes[tables.HEIGHT]), int(row.attributes[tables.WIDTH]))
            flat = prompt_rows.from_bytes(row.payload, dtype=self.config.latents.dtype, width=1)
            if flat.numel() != shape[0] * shape[1] * shape[2]:
                raise DataError(
                    f"{self.latents.uri}: row {row.key} has {flat.numel()} values of {dtype}, wanted {shape}"
                )
            tensors.append(flat.view(shape).float())
        return tensors

    def _wanted_texts(self, rows: list[dict[str, Any]]) -> list[str]:
        wanted = {self.key(text): text for text in (cache.NULL_TEXT, *self.prompts)}
        wanted |= {key: text for row in rows for key, text in zip(row["text_keys"], row["captions"], strict=True)}
        keys = self._covered("text", wanted)
        return [*keys, prompt_rows.PAD_KEY] if self._ragged() else keys

    def _covered(self, kind: str, wanted: dict[str, str]) -> list[str]:
        table = self.text if kind == "text" else self.latents
        there = table.present(wanted)
        if missing := [name for key, name in wanted.items() if key not in there]:
            raise DataError(cache.missing_message(kind, table.uri, missing, len(wanted)))
        return list(wanted)

    def _ragged(self) -> bool:
        return self.index.text.fingerprint["pads"] != "stored"

    def _rows(self, row: Row) -> torch.Tensor:
        fingerprint = self.index.text.fingerprint
        return prompt_rows.from_bytes(row.payload, dtype=fingerprint["dtype"], width=prompt_rows.width(fingerprint))

    def _pad_row(self) -> torch.Tensor | None:
        return self._rows(self.text_reader.fetch([prompt_rows.PAD_KEY])[0]) if self._ragged() else None


def _buckets(rows: list[dict[str, Any]]) -> dict[tuple[int, int], list[int]]:
    if not rows:
        raise DataError("no sample is left to train on: every picture is quarantined or held out")
    buckets: dict[tuple[int, int], list[int]] = {}
    for place, row in enumerate(rows):
        size = (row["bucket_height"], row["bucket_width"])
        buckets.setdefault(size, []).extend([place] * row["repeats"])
    return buckets
