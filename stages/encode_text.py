"""Encode text: every text that has no row yet, on one actor per device, straight into the text table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import ray
import torch

from flux2_core import cache, prompt_rows, recipes, tables
from flux2_core.config import Config
from flux2_core.config_file import parse
from flux2_core.errors import DataError
from flux2_core.model_folder import ModelFolder, resolve
from flux2_core.rows import Row
from flux2_core.store import Table, Writer
from stages import cluster, fill

PARTS = ("text_encoder", "tokenizer", "transformer")
TEXTS_PER_ITEM = 64
TOKEN_BUDGET = 8192  # tokens of one forward pass: 16 full prompts


def encode(
    config: Config, model: ModelFolder, texts: Sequence[str], *, progress: fill.Progress = fill.silent
) -> fill.Filled:
    """Make sure that every text has a row.

    Raises:
        DataError: a row is not finite, or rows are still missing after several rounds.
    """
    fingerprint = recipes.text_fingerprint(model, config)
    uri = cache.text_uri(config, fingerprint)
    table = Table.open_or_create(uri, kind=tables.KIND_TEXT, fingerprint=fingerprint)
    actor = ray.remote(**cluster.device_options())(TextWorker)
    tree = config.model_dump(mode="json", by_alias=True)
    return fill.fill(
        table,
        {cache.text_key(fingerprint, text): text for text in texts},
        divide=_items,
        make=lambda: actor.remote(tree, uri),
        actors=cluster.encoders(config.cluster),
        progress=progress,
    )


def _items(texts: list[str]) -> Iterator[list[str]]:
    """Texts of like length together, so that a forward pass carries few pads."""
    ordered = sorted(texts, key=len)
    for start in range(0, len(ordered), TEXTS_PER_ITEM):
        yield ordered[start : start + TEXTS_PER_ITEM]


class TextWorker:
    """Actor: the encoder on one device and a writer into the table."""

    def __init__(self, tree: dict[str, Any], uri: str) -> None:
        self.config = parse(tree)
        self.uri = uri

    @cached_property
    def encoder(self) -> Any:
        """The model, loaded by the first item, so that an error of ours reaches the driver as it is."""
        from flux2_core.text_encoder import TextEncoder

        model = resolve(self.config.model, parts=PARTS)
        encoder = TextEncoder(model, self.config.text, device=cluster.device())
        if (pad_1D := encoder.pad_row()) is not None:
            self.writer.add(_row(prompt_rows.PAD_KEY, "", pad_1D))
        return encoder

    @cached_property
    def writer(self) -> Writer:
        """Commits rows in the background."""
        return Writer(Table.open(self.uri), batch_rows=fill.BATCH_ROWS, batch_bytes=fill.BATCH_BYTES)

    def ready(self) -> None:
        """Answers once the actor has its device."""

    def work(self, texts: list[str]) -> tuple[int, dict[str, str]]:
        """Encode some texts; rows are committed in the background."""
        from flux2_core.text_encoder import batches

        cluster.see(self.uri)
        fingerprint = Table.open(self.uri).fingerprint
        lengths = [self.encoder.tokenizer.count(text) for text in texts]
        for group in batches([self.encoder.cost(length) for length in lengths], budget=TOKEN_BUDGET):
            members = [texts[place] for place in group]
            for text, rows_ND in zip(members, self.encoder.encode(members), strict=True):
                if not torch.isfinite(rows_ND).all():
                    raise DataError(f'the encoder made NaN or infinity of {text!r}; use text.dtype = "bf16" or "fp32"')
                self.writer.add(_row(cache.text_key(fingerprint, text), text, rows_ND))
        return len(texts), {}

    def close(self) -> None:
        """Commit what is left."""
        self.writer.close()


def _row(key: str, text: str, rows_ND: torch.Tensor) -> Row:
    return Row(key, prompt_rows.to_bytes(rows_ND), {tables.TEXT: text, tables.TOKENS: rows_ND.shape[0]})
