"""What is looked at while training, by all workers together: previews and the validation loss.

Every worker makes the same number of forward passes, because a sharded base needs all of them in each; work that does
not divide evenly is filled up with repeats whose results are thrown away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from flux2_core import accelerator
from flux2_core.model import sampler
from flux2_core.model.flow import add_noise, velocity
from flux2_core.model.folder import ModelFolder
from flux2_core.model.latents import to_tokens
from flux2_core.model.seeded import generator, numpy_generator
from flux2_core.placement import relief
from flux2_core.placement.planner import Job, Placement
from flux2_core.run import previews
from flux2_core.run.folder import RunFolder
from flux2_core.run.metrics import Writer
from flux2_core.store.parquet import Rows
from flux2_core.store.schemas import BUCKET_HEIGHT, BUCKET_WIDTH, DATASET
from flux2_core.train.batches import TrainingData
from flux2_core.train.losses import mse_B
from flux2_core.train.methods.protocol import Model

SIGMAS = (1.0, 0.75, 0.5, 0.25)
STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)  # of a slider's strip


class Trained(Model, Protocol):
    """What is used of a trainer: its place among the workers, its data, and its model in any of its weights."""

    rank: int
    world: int
    device: torch.device
    model: ModelFolder
    data: TrainingData
    job: Job
    placement: Placement
    ema: dict[str, torch.Tensor]

    def weights(self) -> dict[str, torch.Tensor]:
        """Those that are exported."""

    def wearing(self, weights: Mapping[str, torch.Tensor]) -> AbstractContextManager[Any]:
        """The transformer with these weights, ready to draw."""

    def prompts(self, prompts_BLD: torch.Tensor) -> torch.Tensor:
        """Prompts as the transformer takes them."""


def measured(rows: Rows, most: int) -> Sequence[dict[str, Any]]:
    """At most so many of the held-out samples (0: all of them), the same ones at every start.

    Sorted by data set and bucket and shuffled inside of them, every n-th is taken: each of them has its share.
    """
    if not most or len(rows) <= most:
        return rows
    shuffled = numpy_generator(0, "validation").permutation(len(rows))
    groups = (rows.column(name).to_numpy() for name in (BUCKET_WIDTH, BUCKET_HEIGHT, DATASET))
    order = np.lexsort((shuffled, *groups))
    taken = order[(2 * np.arange(most) + 1) * len(rows) // (2 * most)]
    return [rows[place] for place in sorted(taken.tolist())]


class Watch:
    """Previews and validation of one run; keeps nothing but the VAE that the first worker decodes with."""

    def __init__(self, trainer: Trained, on_phase: Callable[[str], None] = lambda _phase: None) -> None:
        self.trainer, self.on_phase = trainer, on_phase
        self.config = trainer.config
        self.guidance = sampler.guidance_of(trainer.config.validation, trainer.model)
        self.folder, self.strip = (folder := RunFolder(trainer.config)).previews, folder.strengths
        self.prompts = trainer.data.prompts
        self.samples = measured(trainer.data.validation, trainer.config.validation.samples)
        self.vae: Any = None

    def due(self, step: int) -> bool:
        """Whether something is looked at after this step."""
        every = self.config.validation.every
        return bool(every) and (step == self.config.train.steps or self.trainer.data.due(every, step))

    def look(self, step: int, metrics: Writer | None) -> None:
        """Draw previews and measure the validation loss where this step is due; the first worker has `metrics`."""
        if not self.due(step):
            return
        if self.prompts and not previews.drawn(self.folder, step, prompts=len(self.prompts)):
            self._preview(step, metrics)
        if self.samples:
            self.on_phase(f"measuring the validation loss at step {step}")
            self._validate(step, metrics)
        if self.config.slider.texts and step == self.config.train.steps and not self.strip.is_file():
            self._slide(metrics)

    def _preview(self, step: int, metrics: Writer | None) -> None:
        latents = self._drawn(
            [(place, 1.0) for place in range(len(self.prompts))], self.prompts, f"previews at step {step}"
        )
        if metrics is not None:
            self._show_references()
            pictures = self._pictures(latents)
            previews.write(self.folder, step, self.prompts, pictures, title=self.config.run)
            for place, picture in enumerate(pictures):
                metrics.image(step, f"preview/{place + 1}", picture)

    def _show_references(self) -> None:
        """Once a run, what the model is shown: decoded from the cache, for nothing else is here, and as it sees it."""
        for place in range(len(self.prompts)):
            for number, latent_1chw in enumerate(self.trainer.data.beside_prompt(place)):
                if not (path := previews.reference_path(self.folder, place, number)).is_file():
                    previews.save(self._decode(latent_1chw)[0].numpy(), path)

    def _slide(self, metrics: Writer | None) -> None:
        """What each strength makes of the same noise, of the previews' prompts or else of the slider's own."""
        prompts = self.prompts or [self.config.slider.texts["slider_target"]]
        wanted = [(place, strength) for place in range(len(prompts)) for strength in STRENGTHS]
        latents = self._drawn(wanted, prompts, "a strip of strengths")
        if metrics is not None:
            pictures = self._pictures(latents)
            strips = pictures.reshape(len(prompts), len(STRENGTHS), *pictures.shape[1:])
            previews.write_strip(self.strip, prompts, STRENGTHS, strips)

    def _drawn(self, wanted: Sequence[tuple[int, float]], prompts: Sequence[str], what: str) -> torch.Tensor:
        """Latents of pictures by (place of the prompt, strength of the adapter), drawn by all workers together."""
        trainer, validate, size = self.trainer, self.config.validation, self.config.preview_size
        mine, latents = [wanted[each] for each in self._share(len(wanted))], []
        with trainer.wearing(trainer.weights()) as transformer:
            for turn, (place, strength) in enumerate(mine, start=1):
                self.on_phase(f"drawing {what}: {turn} of {len(mine)}")
                with trainer.at(strength):
                    one = sampler.draw(
                        transformer,
                        self._rows(prompts[place]),
                        [validate.seed + place],
                        size=(size, size),
                        steps=validate.steps,
                        guidance=self.guidance,
                        negative_1LD=None if validate.negative is None else self._rows(validate.negative),
                        references_RBchw=trainer.data.beside_prompt(place) if self.prompts else (),
                    )
                latents.append(one)
        return self._gather(torch.cat(latents))[: len(wanted)]

    def _pictures(self, latents_Bchw: torch.Tensor) -> np.ndarray:
        return torch.cat([self._decode(latent) for latent in latents_Bchw.split(1)]).numpy()

    def _rows(self, text: str) -> torch.Tensor:
        return self.trainer.prompts(self.trainer.data.prompt_rows([self.trainer.data.key(text)]))

    @torch.no_grad()
    def _validate(self, step: int, metrics: Writer | None) -> None:
        """Measure the weights that are exported, and their moving average where one is kept."""
        trainer, began = self.trainer, time.perf_counter()
        with trainer.wearing(trainer.weights()):
            means = self._losses()
        values = {"loss": float(means.mean())}
        values |= {f"sigma {sigma:g}": float(loss) for sigma, loss in zip(SIGMAS, means, strict=True)}
        if trainer.ema:
            with trainer.wearing(trainer.ema):
                values["ema loss"] = float(self._losses().mean())
        if metrics is not None:
            metrics.validation(step, values | {"seconds": round(time.perf_counter() - began, 3)})

    def _losses(self) -> torch.Tensor:
        """Mean loss of the held-out samples at each of `SIGMAS`."""
        trainer = self.trainer
        sigma_B = torch.tensor(SIGMAS, device=trainer.device)
        at_once = len(SIGMAS)
        if accelerator.is_gpu(trainer.device):  # a CPU has no limit, and its losses the bits of one pass
            at_once = relief.levels_at_once(trainer.job, trainer.placement, at_once)
        losses = []
        for place in self._share(len(self.samples)):
            sample = self.samples[place]
            latents = trainer.data.latent_rows([sample])[0]
            noise = torch.randn(latents.shape, generator=generator(0, "validation", sample["latent_key"]))
            clean_Bchw, noise_Bchw = (x.to(trainer.device).expand(len(SIGMAS), -1, -1, -1) for x in (latents, noise))
            noisy_Bchw = add_noise(clean_Bchw, noise_Bchw, sigma_B)
            prompt_1LD = trainer.data.prompt_rows(sample["text_keys"][:1])
            references = trainer.data.references([sample])
            predictions = [
                trainer.predict(
                    part_Bchw,
                    prompt_1LD.expand(len(part_Bchw), -1, -1),
                    levels_B,
                    [one.expand(len(part_Bchw), -1, -1, -1) for one in references],
                )
                for part_Bchw, levels_B in zip(noisy_Bchw.split(at_once), sigma_B.split(at_once), strict=True)
            ]
            mask = trainer.data.masks([sample])
            mask_BS = None if mask is None else mask.flatten(1).to(trainer.device)
            losses.append(mse_B(torch.cat(predictions), to_tokens(velocity(clean_Bchw, noise_Bchw)), mask_BS))
        return self._gather(torch.stack(losses).cpu())[: len(self.samples)].mean(0)

    def _share(self, count: int) -> list[int]:
        """This worker's places of 0..count-1, as many as every other worker's."""
        rounds = -(-count // self.trainer.world)
        return [(turn * self.trainer.world + self.trainer.rank) % count for turn in range(rounds)]

    def _gather(self, mine: torch.Tensor) -> torch.Tensor:
        """All workers' results in the order of their places; repeats come last."""
        world = self.trainer.world
        if world == 1:
            return mine
        there = mine.to(self.trainer.device)
        parts = [torch.empty_like(there) for _ in range(world)]
        dist.all_gather(parts, there)
        return torch.stack(parts, dim=1).flatten(0, 1).cpu()

    def _decode(self, latent_1chw: torch.Tensor) -> torch.Tensor:
        if self.vae is None:
            from flux2_core.model.folder import resolve
            from flux2_core.model.vae import Vae

            model = resolve(self.config.model, parts=("vae",), commit=self.trainer.model.commit)
            self.vae = Vae(model, device=str(self.trainer.device) if self.trainer.placement.decodes else "cpu")
        return self.vae.decode(latent_1chw)
