"""Sample: pictures from cached prompt rows and a LoRA file, on one device.

Prompts are encoded by their own stage first; no text encoder is loaded here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from flux2_core import accelerator
from flux2_core.cache import prompt_rows
from flux2_core.cache.index import TableRef
from flux2_core.cache.keys import text_key
from flux2_core.config.reading import parse
from flux2_core.config.sections import Config
from flux2_core.lora import reading
from flux2_core.model import sampler
from flux2_core.model.folder import ModelFolder, resolve, same_folder
from flux2_core.model.vae import Vae
from flux2_core.placement import build, drawing
from flux2_core.store.reader import Reader
from flux2_core.store.table import Table
from stages import cluster, fill, vitals

PARTS = ("transformer", "scheduler", "vae")


def sample(
    config: Config,
    model: ModelFolder,
    prompts: Sequence[str],
    table: TableRef,
    *,
    adapter: Path | None,
    progress: fill.Progress = fill.silent,
    say: Callable[[str], None] = lambda _line: None,
) -> list[np.ndarray]:
    """Draw one picture (H, W, 3) uint8 per prompt, with an adapter or from the base model; `say` how it is placed.

    Raises:
        UsageError: the card holds the model in no allowed way, or the adapter is for another model.
        SetupError: the worker's machine has another model, or its process ended.
    """
    tree = cluster.tree(config, model)
    pictures: list[np.ndarray] = []
    progress(0, len(prompts))
    with vitals.asking():
        worker = ray.remote(**cluster.device_options())(SampleWorker).remote(tree, table, adapter)
        try:
            parts = {part: model.likeness(part) for part in ("transformer", "vae")}
            say(vitals.get(worker.load.remote(parts), of="that draws"))
            for place, prompt in enumerate(prompts):
                drawn = worker.draw.remote(prompt, config.validation.seed + place)
                pictures.append(vitals.get(drawn, of="that draws"))
                progress(len(pictures), len(prompts))
        finally:
            vitals.kill(worker)
    return pictures


class SampleWorker:
    """Actor: the transformer with its adapter where the planner puts it, and the VAE."""

    def __init__(self, tree: dict[str, Any], table: TableRef, adapter: Path | None) -> None:
        self.tree, self.uri, self.adapter = tree, table.uri, adapter

    def load(self, driver: Mapping[str, str]) -> str:
        """Bring everything to the device; errors of `__init__` would reach the driver as Ray's own.

        Args:
            driver: What this machine must have, by part (`ModelFolder.likeness`).

        Returns:
            What the planner chose, in a line.
        """
        self.config, self.device = parse(self.tree), torch.device(cluster.device())
        config = self.config
        self.precision = build.compute_dtype(config.train, self.device)
        self.model = resolve(config.model, parts=PARTS)
        for part, likeness in driver.items():
            same_folder(self.model, part, likeness)
        finished = None if self.adapter is None else reading.to_draw(self.adapter)
        count = sum(weight.numel() for weight in (finished or {}).values())
        job = drawing.job(config, self.model, adapter=count, host=accelerator.free_host_bytes())
        chosen = build.decide(job, self.device)
        self.transformer = build.build(job, chosen, self.model, device=self.device, finished=finished)
        self.vae = Vae(self.model, device=str(self.device) if chosen.decodes else "cpu")
        self.table = Table.open(self.uri)
        told = f'drawing with train.precision="{chosen.precision}" cluster.strategy="{chosen.strategy}"'
        return told if chosen.decodes else f"{told}; pictures are decoded by the CPU, the card has no room for it"

    def draw(self, prompt: str, seed: int) -> np.ndarray:
        """One picture, (H, W, 3) uint8."""
        validate = self.config.validation
        size = self.config.preview_size
        negative = [] if validate.negative is None else [validate.negative]
        rows_BLD = self._prompts([prompt, *negative])
        with accelerator.autocast(self.device, self.precision):
            latents = sampler.draw(
                self.transformer,
                rows_BLD[:1],
                [seed],
                size=(size, size),
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
