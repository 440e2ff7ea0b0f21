"""Reading cached samples at FLUX.2-dev's sizes: our tables, against a raw read of the same bytes and against peers.

A sample is 163 own text rows x 6144 bf16 (2.0 MB, projected) and 128 x 64 x 64 fp16 latents (1.05 MB). Peers keep the
full 512 x 15360 bf16 rows (15.73 MB) with the latents in one file per sample. The page cache is warm for all. Every
arm but the raw read ends with the batch's tensors, prompts (B, 512, D) bf16 and latents (B, 128, 64, 64) fp32, as a
training step gets them; ours go through `TrainingData` and verify checksums, the others have none.

Legend: B samples of a batch, L = 512 text rows, D row width.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench.measure import Row, alternate, compared
from flux2_core.cache import prompt_rows
from flux2_core.cache.index import Index, TableRef
from flux2_core.config.reading import parse
from flux2_core.model import tensor_bytes
from flux2_core.store import schemas
from flux2_core.store.reader import Reader
from flux2_core.store.row import Row as StoredRow
from flux2_core.store.table import Table
from flux2_core.store.writer import Writer
from flux2_core.train.batches import TrainingData

BATCH = 4


@dataclass(frozen=True)
class Sizes:
    """Sizes of a sample."""

    samples: int = 12
    own_rows: int = 163
    rows: int = 512
    width: int = 6144
    full_width: int = 15360
    side: int = 64
    passes: int = 4
    """How often a measured round reads all samples."""


QUICK = Sizes(samples=4, own_rows=16, rows=32, width=32, full_width=96, side=4, passes=1)


def run(*, quick: bool = False) -> list[Row]:
    """CPU milliseconds per sample of each way."""
    sizes = QUICK if quick else Sizes()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, sizes)
        served = _Served(folder, sizes)
        ways: dict[str, Callable[[list[str]], object]] = {
            "raw": partial(_raw, folder),
            "fetch": served.fetch,
            "batch": served.tensors,
            "safetensors": partial(_batch_of, lambda key: load_file(folder / f"{key}.safetensors")),
            "pt": partial(_batch_of, lambda key: torch.load(folder / f"{key}.pt", weights_only=True)),
        }
        order = _order(sizes)
        timings = alternate({name: partial(_each, way, order) for name, way in ways.items()}, rounds=1 if quick else 5)
    line = partial(compared, timings, "read_cache", per=sizes.samples * sizes.passes)
    return [
        line("rows, verified; theirs: raw read of our bytes", ours="fetch", theirs="raw", goal=">= 0.77"),
        line("batch tensors; theirs: raw read of our bytes", ours="batch", theirs="raw"),
        line("batch tensors; theirs: safetensors file", ours="batch", theirs="safetensors", goal=">= 3"),
        line("batch tensors; theirs: .pt file", ours="batch", theirs="pt", goal=">= 3"),
    ]


class _Served(TrainingData):
    """Training's own reading of prompts and latents, over our two tables, without a samples table."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        keys = _keys(sizes)
        self.config = parse(
            {
                "model": {"path": "none"},
                "data": [{"path": "none"}],
                "text": {"stored": "projected", "max_length": sizes.rows},
            }
        )
        fingerprint = {"dtype": "bf16", "family": "dev", "pads": "skipped", "width": sizes.width}
        fingerprint["max_length"] = sizes.rows
        self.text, self.latents = Table.open(str(folder / "text.lance")), Table.open(str(folder / "latents.lance"))
        text, latents = TableRef(self.text.uri, self.text.version, fingerprint), TableRef(self.latents.uri, 1, {})
        self.index = Index(schemas.CONTRACT_VERSION, "none", len(keys), text, latents, {})
        self.text_reader = Reader(self.text, [*keys, prompt_rows.PAD_KEY])
        self.latents_reader = Reader(self.latents, keys)
        self.pad_1D = prompt_rows.pad_row(self.text_reader, fingerprint, pad_rows="reference")

    def fetch(self, keys: list[str]) -> object:
        """Verified views of the stored bytes."""
        return self.text_reader.fetch(keys), self.latents_reader.fetch(keys)

    def tensors(self, keys: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts (B, L, D) and latents of a batch."""
        return self.prompt_rows(keys), torch.stack(self.latent_rows([{"latent_key": key} for key in keys]))


def _raw(folder: Path, keys: list[str]) -> object:
    return [(folder / f"{key}.{part}").read_bytes() for key in keys for part in ("text", "latents")]


def _batch_of(load: Callable[[str], dict[str, torch.Tensor]], keys: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    samples = [load(key) for key in keys]
    return torch.stack([s["prompt_embeds"] for s in samples]), torch.stack([s["latents"].float() for s in samples])


def _each(way: Callable[[list[str]], object], order: list[list[str]]) -> None:
    for keys in order:
        way(keys)


def _keys(sizes: Sizes) -> list[str]:
    return [f"sample-{place}" for place in range(sizes.samples)]


def _order(sizes: Sizes) -> list[list[str]]:
    rng = random.Random(0)
    keys = [key for _ in range(sizes.passes) for key in rng.sample(_keys(sizes), sizes.samples)]
    return [keys[start : start + BATCH] for start in range(0, len(keys), BATCH)]


def _write(folder: Path, sizes: Sizes) -> None:
    """The same samples in every form; random bits, which no form can compress."""
    text = Table.open_or_create(str(folder / "text.lance"), kind=schemas.KIND_TEXT, fingerprint={})
    latents = Table.open_or_create(str(folder / "latents.lance"), kind=schemas.KIND_LATENTS, fingerprint={})
    shape: dict[str, str | int] = {schemas.HEIGHT: sizes.side, schemas.WIDTH: sizes.side}
    with (
        Writer(text, batch_rows=64, batch_bytes=1 << 25) as text_writer,
        Writer(latents, batch_rows=64, batch_bytes=1 << 25) as latents_writer,
    ):
        pad = os.urandom(2 * sizes.width)
        text_writer.add(StoredRow(prompt_rows.PAD_KEY, pad, {schemas.TEXT: "", schemas.TOKENS: 1}))
        for key in _keys(sizes):
            own, picture = os.urandom(2 * sizes.own_rows * sizes.width), os.urandom(2 * 128 * sizes.side**2)
            text_writer.add(StoredRow(key, own, {schemas.TEXT: key, schemas.TOKENS: sizes.own_rows}))
            latents_writer.add(StoredRow(key, picture, shape))
            (folder / f"{key}.text").write_bytes(own)
            (folder / f"{key}.latents").write_bytes(picture)
            theirs = {
                "prompt_embeds": tensor_bytes.from_bytes(
                    os.urandom(2 * sizes.rows * sizes.full_width), dtype="bf16", width=sizes.full_width
                ),
                "latents": tensor_bytes.from_bytes(picture, dtype="fp16", width=1).view(128, sizes.side, sizes.side),
            }
            save_file(theirs, folder / f"{key}.safetensors")
            torch.save(theirs, folder / f"{key}.pt")
