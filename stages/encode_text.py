"""Encode text: every text that has no row yet, on one actor per device, straight into the text table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import ray
import torch

from flux2_core.cache import keys, prompt_rows, proofs
from flux2_core.config.reading import parse
from flux2_core.config.sections import Config
from flux2_core.errors import DataError
from flux2_core.model import soundness, tensor_bytes
from flux2_core.model.folder import ModelFolder, resolve
from flux2_core.placement import encoding, relief
from flux2_core.store import schemas
from flux2_core.store.row import Row
from flux2_core.store.table import Table
from flux2_core.store.writer import Writer
from stages import cluster, fill

PARTS = ("text_encoder", "tokenizer", "transformer")
SHOWN = 80  # letters of a text in an error


def encode(
    config: Config,
    model: ModelFolder,
    texts: Sequence[str],
    *,
    fingerprint: Mapping[str, Any],
    progress: fill.Progress = fill.silent,
) -> fill.Filled:
    """Make sure that every text has a row in the table of this fingerprint (`cache.proofs`).

    Raises:
        DataError: a row is unsound (NaN, infinity, zeros, a wrong shape), or a round brings no row.
    """
    table = proofs.open_table(config, model, schemas.KIND_TEXT, fingerprint)
    actor = ray.remote(**cluster.encoding_options(config.cluster))(TextWorker)
    tree = cluster.tree(config, model)

    def divide(missing: list[str]) -> Iterator[list[str]]:
        from flux2_core.model.text_encoder import passes
        from flux2_core.model.tokenizer import PromptTokenizer

        text = config.text
        return passes(missing, PromptTokenizer(model, max_length=text.max_length, tokens=text.tokens), text)

    return fill.fill(
        table,
        {keys.text_key(fingerprint, text): text for text in texts},
        divide=divide,
        make=lambda: actor.remote(tree, table.uri),
        actors=cluster.encoders(config.cluster),
        progress=progress,
    )


class TextWorker:
    """Actor: the encoder on one device and a writer into the table."""

    def __init__(self, tree: dict[str, Any], uri: str) -> None:
        self.tree, self.uri = tree, uri

    @cached_property
    def config(self) -> Config:
        """Read by the first item too: what `__init__` raises reaches the driver as Ray's own error."""
        return parse(self.tree)

    @cached_property
    def encoder(self) -> Any:
        """The model, loaded by the first item, so that an error of ours reaches the driver as it is."""
        model = resolve(self.config.model, parts=PARTS)
        with ThreadPoolExecutor(1) as beside:  # of 48 GB the first hash on a machine takes a minute, as loading does
            checked = beside.submit(proofs.check_node, self.config, model, self.table)
            encoder, placed = encoding.build(self.config, model, torch.device(cluster.device()))
        checked.result()
        skipped, limit = encoder.ragged and self.config.text.pads == "skipped", self.config.text.max_length
        self.portions = relief.Portions(
            placed.most, size=lambda pair: pair[1] if skipped else limit, alone="use a larger card, or text.quantize"
        )
        if (pad_1D := encoder.pad_row()) is not None:
            self._add(prompt_rows.PAD_KEY, "", pad_1D, tokens=1)
        return encoder

    @cached_property
    def table(self) -> Table:
        """Where rows go."""
        cluster.see(self.uri)
        return Table.open(self.uri)

    @cached_property
    def writer(self) -> Writer:
        """Commits rows in the background."""
        return fill.writer(self.table)

    def ready(self) -> None:
        """Answers once the actor has its device."""

    def work(self, texts: list[str]) -> tuple[int, dict[str, str]]:
        """Encode the texts of one forward pass, or of several where the card is small; rows are committed beside it."""
        counts = self.encoder.tokenizer.counts(texts)
        pairs = [(text, min(count, self.config.text.max_length)) for text, count in zip(texts, counts, strict=True)]
        for part, rows in self.portions.passes(pairs, lambda part: self.encoder.encode([text for text, _ in part])):
            for (text, tokens), rows_ND in zip(part, rows, strict=True):
                self._add(keys.text_key(self.table.fingerprint, text), text, rows_ND, tokens=tokens)
        return len(texts), {}

    def close(self) -> None:
        """Commit what is left."""
        self.writer.close()

    def _add(self, key: str, text: str, rows_ND: torch.Tensor, *, tokens: int) -> None:
        fingerprint = self.table.fingerprint
        full = not prompt_rows.ragged(fingerprint)
        try:
            soundness.check_rows(
                rows_ND,
                count=self.config.text.max_length if full else tokens,
                width=prompt_rows.width(fingerprint),
                dtype=tensor_bytes.DTYPES[fingerprint["dtype"]],
            )
        except DataError as error:
            shown = "the pad row" if key == prompt_rows.PAD_KEY else repr(text[:SHOWN])
            raise DataError(f"{shown}: the text encoder {error}") from None
        self.writer.add(
            Row(key, prompt_rows.encode(rows_ND, fingerprint), {schemas.TEXT: text, schemas.TOKENS: tokens})
        )
