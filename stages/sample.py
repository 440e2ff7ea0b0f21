"""Sample: pictures from cached prompt rows and a LoRA file, on one device.

Prompts are encoded by their own stage first; no text encoder is loaded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayTaskError

from flux2_core import cache, lora, lora_files, prompt_rows, transformer
from flux2_core.cache import TableRef
from flux2_core.config import Config
from flux2_core.config_file import parse
from flux2_core.errors import CacheloomError
from flux2_core.model_folder import resolve
from flux2_core.sampling import draw
from flux2_core.store import Table
from flux2_core.store_reader import Reader
from flux2_core.training import resolve_precision
from flux2_core.vae import Vae
from stages import cluster, fill

PARTS = ("transformer", "scheduler", "vae")


def sample(
    config: Config,
    prompts: Sequence[str],
    table: TableRef,
    *,
    adapter: Path | None,
    progress: fill.Progress = fill.silent,
) -> list[np.ndarray]:
    """Draw one picture (H, W, 3) uint8 per prompt, with an adapter or from the base model."""
    actor = ray.remote(**cluster.device_options())(SampleWorker)
    tree = config.model_dump(mode="json", by_alias=True)
    worker = actor.remote(tree, table, None if adapter is None else str(adapter))
    pictures = []
    for place, prompt in enumerate(prompts):
        progress(place, len(prompts))
        try:
            pictures.append(ray.get(worker.draw.remote(prompt, config.validation.seed + place)))
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, CacheloomError) else error from None
    progress(len(prompts), len(prompts))
    ray.kill(worker)
    return pictures


class SampleWorker:
    """Actor: the transformer with its adapter, and the VAE."""

    def __init__(self, tree: dict[str, Any], table: TableRef, adapter: str | None) -> None:
        config = self.config = parse(tree)
        self.device = torch.device(cluster.device())
        self.precision = resolve_precision(config.train, self.device)
        self.model = resolve(config.model, parts=PARTS)
        self.transformer = transformer.build(self.model, dtype=self.precision)
        if config.text.stored == "projected":
            transformer.skip_projection(self.transformer)
        transformer.load_weights(self.transformer, self.model, device=self.device)
        if adapter is not None:
            lora.attach(self.transformer, lora_files.from_file(adapter), device=self.device)
        self.transformer.eval()
        self.vae = Vae(self.model, device=str(self.device))
        self.table = Table.open(table.uri)
        self.fingerprint = table.fingerprint

    def draw(self, prompt: str, seed: int) -> np.ndarray:
        """One picture, (H, W, 3) uint8."""
        validate = self.config.validation
        size = validate.size or self.config.data[0].resolutions[0]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            latents = draw(
                self.transformer,
                self._prompt(prompt)[None].to(self.device, self.precision),
                [seed],
                height=size,
                width=size,
                steps=validate.steps,
                guidance=validate.guidance if self.model.guided else None,
                device=self.device,
            )
        return self.vae.decode(latents)[0].numpy()

    def _prompt(self, prompt: str) -> torch.Tensor:
        ragged = self.fingerprint["pads"] != "stored"
        keys = [cache.text_key(self.fingerprint, prompt), *([prompt_rows.PAD_KEY] if ragged else [])]
        rows = [
            prompt_rows.from_bytes(
                row.payload, dtype=self.fingerprint["dtype"], width=prompt_rows.width(self.fingerprint)
            )
            for row in Reader(self.table, keys).fetch(keys)
        ]
        return prompt_rows.rebuild(rows[0], rows[1] if ragged else None, max_length=self.config.text.max_length)
