"""The training of one LoRA in one process group: build, restore, step, save.

Every worker has a `Trainer`. The frozen base is sharded; each worker computes its part of the batch; adapter
gradients are summed in one all-reduce, so that every worker takes the same fp32 AdamW step.
No text encoder can be reached from here; the VAE is loaded only by the worker that decodes previews.

Legend: B samples, S = h * w image tokens, c = 128, L text rows, D row width.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from flux2_core import checkpoint, lora, transformer
from flux2_core.checkpoint import Checkpoint
from flux2_core.config import Config, Train
from flux2_core.errors import DataError
from flux2_core.flow_matching import add_noise, mse_B, predict, velocity
from flux2_core.latents import image_ids, text_ids, to_tokens
from flux2_core.model_folder import TRAINING_PARTS, ModelFolder, resolve
from flux2_core.run_folder import RunFolder
from flux2_core.training_data import Batch, TrainingData

MOST_SKIPPED_IN_A_ROW = 3


class Trainer:
    """State of one worker: model, adapter, optimizer, open caches, position."""

    def __init__(self, config: Config, *, rank: int = 0, world: int = 1, device: str = "cpu") -> None:
        self.config = config
        self.rank, self.world, self.device = rank, world, torch.device(device)
        self.folder = RunFolder(config)
        self.model: ModelFolder = resolve(config.model, parts=TRAINING_PARTS)
        self.data = TrainingData(config, self.model)
        self.precision = resolve_precision(config.train, self.device)
        self.transformer = self._build()
        self.adapter = dict(lora.parameters(self.transformer))
        self.optimizer = torch.optim.AdamW(
            self.adapter.values(),
            lr=config.train.learning_rate,
            weight_decay=config.train.weight_decay,
            fused=self.device.type == "cuda",
        )
        self.guidance = config.train.guidance if self.model.guided else None
        self.step = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self._restore(checkpoint.newest(self.folder.checkpoints))

    def train_step(self, batch: Batch) -> dict[str, Any]:
        """One optimizer step on this worker's part of a batch; return what is worth recording."""
        learning_rate = rate(self.config.train, self.step)
        micro = self.config.cluster.micro_batch or len(batch.ids)
        loss = torch.zeros((), device=self.device)
        for start in range(0, len(batch.ids), micro):
            part_loss = self.loss(batch, slice(start, start + micro))
            part_loss.backward()
            loss += part_loss.detach()
        loss = self._sum_over_workers(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.adapter.values(), self.config.train.max_grad_norm)
        finite = bool(torch.isfinite(loss)) and bool(torch.isfinite(norm))
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._count_skipped(finite, batch)
        epoch = self.data.order.epoch(self.step)
        self.step += 1
        record = {"loss": float(loss), "learning_rate": learning_rate, "grad_norm": float(norm), "epoch": epoch}
        return record | ({"skipped": self.skipped} if self.skipped else {})

    def loss(self, batch: Batch, part: slice) -> torch.Tensor:
        """Sum of the part's sample losses over the whole batch's size: parts and workers add up to the batch mean."""
        clean = to_tokens(batch.latents_Bchw[part]).to(self.device)
        noise = to_tokens(batch.noise_Bchw[part]).to(self.device)
        sigma_B = batch.sigma_B[part].to(self.device)
        height, width = batch.latents_Bchw.shape[2:]
        prediction = self.predict(
            add_noise(clean, noise, sigma_B), batch.prompts_BLD[part], sigma_B, height=height, width=width
        )
        return mse_B(prediction, velocity(clean, noise)).sum() / batch.total

    def predict(
        self, noisy_BSc: torch.Tensor, prompts_BLD: torch.Tensor, sigma_B: torch.Tensor, *, height: int, width: int
    ) -> torch.Tensor:
        """Predicted velocity (B, S, c) for an image of h x w tokens, under the run's precision."""
        with self.autocast():
            return predict(
                self.transformer,
                noisy_BSc,
                self.prompts(prompts_BLD),
                sigma_B,
                img_ids=image_ids(height, width).to(self.device),
                txt_ids=text_ids(prompts_BLD.shape[1]).to(self.device),
                guidance=self.guidance,
            )

    def prompts(self, prompts_BLD: torch.Tensor) -> torch.Tensor:
        """Prompt rows on the device in the base's precision."""
        return prompts_BLD.to(self.device, self.precision)

    def autocast(self) -> AbstractContextManager[Any]:
        """Matmuls in the base's precision; everything else, and the adapter's weights, in fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16)

    def save(self) -> None:
        """Write a checkpoint; the adapter is whole in every worker, so the first one writes alone."""
        if self.rank == 0:
            checkpoint.write(self.folder.checkpoints, self._snapshot(), keep=self.config.output.keep)
        if self.world > 1:
            dist.barrier()

    def _build(self) -> Any:
        config = self.config
        built = transformer.build(self.model, dtype=self.precision)
        if config.text.stored == "projected":
            transformer.skip_projection(built)
        lora.inject(built, config.lora, lora.match(config.lora, transformer.linear_names(built)))
        if config.train.recompute == "full":
            built.enable_gradient_checkpointing()
        transformer.shard(built, init_device_mesh(self.device.type, (self.world,)))
        transformer.load_weights(built, self.model, device=self.device)
        lora.initialise(built, seed=config.train.seed, device=self.device)
        return built.train()

    def _restore(self, found: Checkpoint | None) -> None:
        if found is None:
            return
        if found.facts["samples"] != self.data.samples:
            raise DataError(
                f"{self.folder.path}: its data set has changed since step {found.step} (its samples table was "
                f"{found.facts['samples']}): go on with the old pictures, or start anew with run=NAME"
            )
        lora.load(self.transformer, found.adapter, device=self.device)
        state = {}
        for place, name in enumerate(self.adapter):
            moments = {field: found.optimizer.get(f"{name}.{field}") for field in ("step", "exp_avg", "exp_avg_sq")}
            if moments["step"] is not None:
                state[place] = moments
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step = found.step
        self.skipped = int(found.facts["skipped"])

    def _snapshot(self) -> Checkpoint:
        moments = {
            f"{name}.{field}": value.detach().cpu().clone()
            for name, parameter in self.adapter.items()
            for field, value in self.optimizer.state.get(parameter, {}).items()
        }
        facts = {"skipped": self.skipped, "samples": self.data.samples}
        return Checkpoint(step=self.step, adapter=lora.state(self.transformer), optimizer=moments, facts=facts)

    def _sum_over_workers(self, loss: torch.Tensor) -> torch.Tensor:
        if self.world == 1:
            return loss
        gradients = [parameter.grad for parameter in self.adapter.values() if parameter.grad is not None]
        flat = torch.cat([loss.view(1), *(gradient.view(-1) for gradient in gradients)])
        dist.all_reduce(flat)
        for gradient, summed in zip(gradients, flat[1:].split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))
        return flat[0]

    def _count_skipped(self, finite: bool, batch: Batch) -> None:
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == MOST_SKIPPED_IN_A_ROW:
            raise DataError(
                f"the loss was not finite {MOST_SKIPPED_IN_A_ROW} steps in a row (now step {self.step + 1}, samples "
                f"{', '.join(batch.ids)}): lower train.learning_rate, or look at these samples with `cacheloom show`"
            )


def rate(train: Train, step: int) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then the schedule."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[train.schedule]
    return train.learning_rate * factor


def resolve_precision(train: Train, device: torch.device) -> torch.dtype:
    """Precision of the frozen base."""
    if train.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if train.precision == "bf16" else torch.float32
