"""Sample: pictures from cached prompt rows and a LoRA file, on one device.

Prompts are encoded by their own stage first; no text encoder is loaded here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayTaskError

from flux2_core.cache import prompt_rows
from flux2_core.cache.index import TableRef
from flux2_core.cache.keys import text_key
from flux2_core.config.reading import parse
from flux2_core.config.sections import Config
from flux2_core.errors import CacheloomError
from flux2_core.lora import file
from flux2_core.lora.adapter import attach
from flux2_core.model import frozen_linear, sampler, transformer
from flux2_core.model.folder import ModelFolder, resolve, same_folder
from flux2_core.model.vae import Vae
from flux2_core.placement import build
from flux2_core.store.reader import Reader
from flux2_core.store.table import Table
from stages import cluster, fill

PARTS = ("transformer", "scheduler", "vae")


def sample(
    config: Config,
    model: ModelFolder,
    prompts: Sequence[str],
    table: TableRef,
    *,
    adapter: Path | None,
    progress: fill.Progress = fill.silent,
) -> list[np.ndarray]:
    """Draw one picture (H, W, 3) uint8 per prompt, with an adapter or from the base model."""
    actor = ray.remote(**cluster.device_options())(SampleWorker)
    worker = actor.remote(cluster.tree(config, model), table, None if adapter is None else str(adapter))
    pictures = []
    try:
        ray.get(worker.load.remote({part: model.likeness(part) for part in ("transformer", "vae")}))
        for place, prompt in enumerate(prompts):
            progress(place, len(prompts))
            pictures.append(ray.get(worker.draw.remote(prompt, config.validation.seed + place)))
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, CacheloomError) else error from None
    progress(len(prompts), len(prompts))
    ray.kill(worker)
    return pictures


class SampleWorker:
    """Actor: the transformer with its adapter, and the VAE."""

    def __init__(self, tree: dict[str, Any], table: TableRef, adapter: str | None) -> None:
        self.config, self.table, self.adapter = parse(tree), Table.open(table.uri), adapter
        self.device = torch.device(cluster.device())
        self.precision = build.compute_dtype(self.config.train, self.device)

    def load(self, driver: Mapping[str, str]) -> None:
        """Load both models, where this machine has those of the driver (`ModelFolder.likeness`, by part)."""
        config, adapter = self.config, self.adapter
        self.model = resolve(config.model, parts=PARTS)
        for part, likeness in driver.items():
            same_folder(self.model, part, likeness)
        self.transformer = transformer.build(self.model, dtype=self.precision)
        if config.text.stored == "projected":
            transformer.skip_projection(self.transformer)
        if adapter is not None:
            attach(self.transformer, file.from_file(adapter), device=self.device)
        frozen_linear.swap(self.transformer, config.train.precision, dtype=self.precision, device=self.device)
        transformer.load_weights(self.transformer, self.model, device=self.device)
        self.transformer.eval()
        self.vae = Vae(self.model, device=str(self.device))

    def draw(self, prompt: str, seed: int) -> np.ndarray:
        """One picture, (H, W, 3) uint8."""
        validate = self.config.validation
        size = validate.size or self.config.data[0].resolutions[0]
        negative = [] if validate.negative is None else [validate.negative]
        rows_BLD = self._prompts([prompt, *negative])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            latents = sampler.draw(
                self.transformer,
                rows_BLD[:1],
                [seed],
                height=size,
                width=size,
                steps=validate.steps,
                guidance=sampler.guidance_of(validate, self.model),
                negative_1LD=rows_BLD[1:] if negative else None,
            )
        return self.vae.decode(latents)[0].numpy()

    def _prompts(self, texts: Sequence[str]) -> torch.Tensor:
        fingerprint = self.table.fingerprint
        keys = [text_key(fingerprint, text) for text in texts]
        reader = Reader(self.table, [*keys, *([prompt_rows.PAD_KEY] if prompt_rows.ragged(fingerprint) else [])])
        pad_1D = prompt_rows.pad_row(reader, fingerprint, pad_rows=self.config.train.pad_rows)
        return prompt_rows.full(reader, keys, fingerprint, pad_1D=pad_1D).to(self.device, self.precision)
