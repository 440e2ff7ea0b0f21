"""Bytes of a cached caption: what a table takes on disk, against the full (512, 15360) bf16 tensor of every peer."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from bench import captions
from bench.measure import Row
from flux2_core.cache import prompt_rows
from flux2_core.store import objects, schemas
from flux2_core.store.row import Row as StoredRow
from flux2_core.store.table import Table
from flux2_core.store.writer import Writer

FULL_ROWS = 512
RAW, PROJECTED = 15360, 6144  # 3 x hidden of Mistral Small; inner width of FLUX.2-dev
FORMS = {"raw": (RAW, False), "projected": (PROJECTED, False), "projected, int8_rows": (PROJECTED, True)}
GOALS = {"projected": "<= 2.1 MB", "projected, int8_rows": "1.0 MB"}
BF16 = 2


def run(*, quick: bool = False) -> list[Row]:
    """Bytes on disk per caption, everything that the table needs included."""
    rows = []
    for stored, (width, int8_rows) in FORMS.items():
        lengths = captions.lengths(2 if quick else 16)
        shrink = 96 if quick else 1
        ours = _size(lengths, width=width // shrink, int8_rows=int8_rows) / len(lengths)
        theirs = FULL_ROWS * RAW // shrink * BF16  # 15.73 MB
        mean = sum(lengths) / len(lengths)
        rows.append(
            Row(
                "bytes",
                f"{stored}, mean {mean:.0f} tokens",
                ours / 1e6,
                "MB/caption",
                theirs=theirs / 1e6,
                ratio=theirs / ours,
                goal=GOALS.get(stored, ""),
                note="pads stored once",
            )
        )
    return rows


def _size(lengths: list[int], *, width: int, int8_rows: bool) -> int:
    fingerprint = {"dtype": "bf16", "width": width, "int8_rows": int8_rows}
    with tempfile.TemporaryDirectory() as folder:
        uri = str(Path(folder) / "text.lance")
        table = Table.open_or_create(uri, kind=schemas.KIND_TEXT, fingerprint=fingerprint)
        with Writer(table, batch_rows=8, batch_bytes=1 << 26) as writer:
            for place, tokens in enumerate(lengths):
                payload = prompt_rows.encode(torch.randn(tokens, width).bfloat16(), fingerprint)
                writer.add(StoredRow(str(place), payload, {schemas.TEXT: f"caption {place}", schemas.TOKENS: tokens}))
        return sum(size for _, size in objects.listing(uri))
