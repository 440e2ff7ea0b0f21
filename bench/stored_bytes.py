"""Bytes of a cached caption: what a table takes on disk, against the full (512, 15360) bf16 tensor of every peer."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from bench import captions
from bench.measure import Row
from flux2_core import tables
from flux2_core.rows import Row as StoredRow
from flux2_core.store import Table, Writer

FULL_ROWS = 512
WIDTHS = {"raw": 15360, "projected": 6144}  # 3 x hidden of Mistral Small; inner width of FLUX.2-dev
BF16 = 2
THEIR_BYTES = FULL_ROWS * WIDTHS["raw"] * BF16  # 15.73 MB


def run(*, quick: bool = False) -> list[Row]:
    """Bytes on disk per caption, everything that the table needs included."""
    rows = []
    for stored, width in WIDTHS.items():
        lengths = captions.lengths(2 if quick else 16)
        ours = _size(lengths, width=64 if quick else width) / len(lengths)
        theirs = THEIR_BYTES if not quick else FULL_ROWS * 64 * BF16
        mean = sum(lengths) / len(lengths)
        rows.append(
            Row(
                "bytes",
                f"{stored}, mean {mean:.0f} tokens",
                ours / 1e6,
                "MB/caption",
                theirs=theirs / 1e6,
                ratio=theirs / ours,
                goal="2.0 MB" if stored == "projected" else "",
                note="pads stored once",
            )
        )
    return rows


def _size(lengths: list[int], *, width: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        uri = str(Path(folder) / "text.lance")
        table = Table.open_or_create(uri, kind=tables.KIND_TEXT, fingerprint={"width": width})
        with Writer(table, batch_rows=8, batch_bytes=1 << 26) as writer:
            for place, tokens in enumerate(lengths):
                payload = os.urandom(tokens * width * BF16)  # bf16 states do not compress; nor do these
                writer.add(StoredRow(str(place), payload, {tables.TEXT: f"caption {place}", tables.TOKENS: tokens}))
        return Table.open(uri).size_bytes()
