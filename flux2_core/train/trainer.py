"""The training of one LoRA in one process group: build, restore, step, save.

Every worker has a `Trainer`. The frozen base lies where the planner says; each worker computes its part of the
batch; adapter gradients are summed in one all-reduce, so that every worker takes the same fp32 optimizer step.
No text encoder can be reached from here; the VAE is loaded only by the worker that decodes previews.

Legend: B samples, S = h * w image tokens, c = 128, L text rows, D row width.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist

from flux2_core import accelerator
from flux2_core.config.sections import Config
from flux2_core.errors import DataError
from flux2_core.lora import adapter
from flux2_core.model.flow import predict
from flux2_core.model.folder import TRAINING_PARTS, ModelFolder, resolve
from flux2_core.model.latents import position_ids, to_tokens
from flux2_core.placement import build, compiled
from flux2_core.placement.routing import Routing
from flux2_core.run import checkpoint
from flux2_core.run.checkpoint import Checkpoint
from flux2_core.run.folder import RunFolder
from flux2_core.train import begun, ema, optimizers
from flux2_core.train.batches import TrainingData
from flux2_core.train.begun import Begun
from flux2_core.train.methods.protocol import Batch
from flux2_core.train.schedules import rate

MOST_SKIPPED_IN_A_ROW = 3


class Trainer:
    """State of one worker: model, adapter, optimizer, open caches, position."""

    def __init__(
        self,
        config: Config,
        *,
        rank: int = 0,
        world: int = 1,
        device: str = "cpu",
        model: ModelFolder | None = None,
    ) -> None:
        self.folder = RunFolder(config)
        found = checkpoint.newest(self.folder.checkpoints)
        began, asked = Begun.of(found), config
        self.rank, self.world, self.device = rank, world, torch.device(device)
        self.model = model or resolve(asked.model, parts=TRAINING_PARTS)
        self.data = TrainingData(began.config(asked), self.model)
        self.config = config = self.data.config
        self.precision = build.compute_dtype(config.train, self.device)
        self.job = build.job(config, self.model, world=world, device=self.device)
        with began.kept(asked):
            self.placement = build.decide(self.job, self.device)
        self.notes = [note] if (note := began.otherwise(self.precision)) else []  # told with the first step
        if not self.placement.decodes:
            self.notes.append("previews are decoded by the CPU: beside the base the card has no room for their size")
        self.compiler = compiled.of(config.train, self.device)
        self.transformer = build.build(self.job, self.placement, self.model, device=self.device, compiler=self.compiler)
        self.routing = Routing(config.tread, self.transformer)
        self.adapter = dict(adapter.parameters(self.transformer))
        told = config.train.guidance
        self.guidance = (sum(told) / 2 if isinstance(told, tuple) else told) if self.model.guided else None
        self.step = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.stopping = False  # a worker was told that its machine goes: all stop after this step
        if found is None and config.lora.init:
            adapter.warm_start(self.transformer, config.lora, device=self.device)
        self.optimizer = optimizers.build(config.train, self.adapter)
        self.ema = self.weights() if config.train.ema else {}
        self._restore(found)

    def train_step(self, batch: Batch, *, notice: bool = False) -> dict[str, Any]:
        """One optimizer step on this worker's part of a batch; return what is worth recording.

        `notice` says that this worker's machine is about to go; `stopping` then is true in every worker.
        """
        learning_rate = rate(self.config.train, self.step)
        batch = batch.each(lambda tensor: tensor.to(self.device, non_blocking=True))
        micro = self.config.cluster.micro_batch or len(batch.sigma_B)
        sums = torch.zeros(1 + len(self.data.methods), device=self.device)  # notices, then each method's loss
        sums[0] = notice
        for start in range(0, len(batch.sigma_B), micro):
            for place, term in self.terms(batch.each(operator.itemgetter(slice(start, start + micro)))):
                term.backward()
                sums[1 + place] += term.detach()
        summed = self._sum_over_workers(sums)
        norm = torch.nn.utils.clip_grad_norm_(self.adapter.values(), self.config.train.max_grad_norm)
        notices, *losses, norm = torch.cat([summed, norm.view(1)]).tolist()  # the step's one wait for the device
        loss = sum(losses)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._count_skipped(finite)
        epoch = self.data.order.epoch(self.step)
        self.step += 1
        if finite and self.ema:
            ema.update(self.ema, self.adapter, decay=self.config.train.ema, step=self.step)
        self.stopping = notices > 0
        record = {"loss": loss, "learning_rate": learning_rate, "grad_norm": norm, "epoch": epoch}
        labels = [method.label for method in self.data.methods.values()]
        record |= {label: part for label, part in zip(labels, losses, strict=True) if label}
        return record | ({"skipped": self.skipped} if self.skipped else {})

    def terms(self, batch: Batch) -> Iterator[tuple[int, torch.Tensor]]:
        """(place of its method, term) of a part of a batch; the next one's passes are made when it is asked for."""
        if self.transformer.told:
            self.transformer.told.dropped_BR = batch.dropped_BR
        for place, (name, method) in enumerate(self.data.methods.items()):
            for term in method.terms(self, batch, batch.carried[name]):
                yield place, term

    def predict(
        self,
        noisy_Bchw: torch.Tensor,
        prompts_BLD: torch.Tensor,
        sigma_B: torch.Tensor,
        references_RBchw: Sequence[torch.Tensor] = (),
        guidance_B: torch.Tensor | None = None,
        routes_RBk: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """Predicted velocity (B, S, c) of noisy latents, under the run's precision.

        References stand after the image's tokens, free of noise, and have no prediction.
        """
        tokens = [to_tokens(noisy_Bchw), *(to_tokens(reference).to(self.device) for reference in references_RBchw)]
        sizes = [tuple(one.shape[2:]) for one in (noisy_Bchw, *references_RBchw)]
        image, *others = (one.shape[1] for one in tokens)
        routes = self.routing.over(routes_RBk, text=prompts_BLD.shape[1], image=image, references=sum(others))
        with self.autocast(), routes:
            return predict(
                self.transformer,
                torch.cat(tokens, dim=1) if references_RBchw else tokens[0],
                self.prompts(prompts_BLD),
                sigma_B,
                guidance=self.guidance if self.guidance is None or guidance_B is None else guidance_B,
                **position_ids(self.device, prompts_BLD.shape[1], *sizes),
            )[:, :image]

    @contextmanager
    def base(self) -> Iterator[None]:
        """Have the base model's own predictions inside, without a gradient."""
        with torch.no_grad(), adapter.switched_off(self.transformer):
            yield

    def at(self, strength: float) -> AbstractContextManager[None]:
        """Have the adapter at a strength inside; 1 is its own."""
        return adapter.at_strength(self.transformer, strength)

    def weights(self) -> dict[str, torch.Tensor]:
        """Copies of the adapter's weights as they are to be looked at and exported."""
        return optimizers.usable(self.optimizer, self.adapter)

    @contextmanager
    def wearing(self, weights: Mapping[str, torch.Tensor]) -> Iterator[Any]:
        """The transformer as it draws, with other weights; those that are trained come back bit for bit."""
        own = {name: parameter.detach().clone() for name, parameter in self.adapter.items()}
        self._put(weights)
        self.transformer.eval()
        try:
            with self.autocast():
                yield self.transformer
        finally:
            self.transformer.train()
            self._put(own)

    @torch.no_grad()
    def _put(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.adapter.items():
            parameter.copy_(weights[name])

    def prompts(self, prompts_BLD: torch.Tensor) -> torch.Tensor:
        """Prompt rows on the device in the base's precision."""
        return prompts_BLD.to(self.device, self.precision)

    def autocast(self) -> AbstractContextManager[Any]:
        """Matmuls in the base's precision; everything else, and the adapter's weights, in fp32."""
        return accelerator.autocast(self.device, self.precision)

    def save(self) -> None:
        """Write a checkpoint; the adapter is whole in every worker, so the first one writes alone."""
        if self.rank == 0:
            checkpoint.write(self.folder.checkpoints, self._snapshot(), keep=self.config.output.keep)
        if self.world > 1:
            dist.barrier()

    def _restore(self, found: Checkpoint | None) -> None:
        if found is None:
            return
        if found.facts["samples"] != self.data.samples:
            raise DataError(
                f"{self.folder.path}: its data set has changed since step {found.step} (its samples table was "
                f"{found.facts['samples']}): go on with the old pictures, or start anew with run=NAME"
            )
        self._put(found.adapter)
        optimizers.unpack(self.optimizer, self.adapter, found.optimizer, found.facts["optimizer"])
        self.ema = {name: value.to(self.device) for name, value in found.ema.items()}
        self.step = found.step
        self.skipped, self.skipped_in_a_row = found.facts["skipped"], found.facts["skipped_in_a_row"]

    def _snapshot(self) -> Checkpoint:
        moments, facts = optimizers.pack(self.optimizer, self.adapter)
        return Checkpoint(
            step=self.step,
            adapter={name: value.cpu() for name, value in self.weights().items()},
            optimizer=moments,
            ema={name: value.cpu().clone() for name, value in self.ema.items()},
            facts={
                "skipped": self.skipped,
                "skipped_in_a_row": self.skipped_in_a_row,
                "samples": self.data.samples,
                "optimizer": facts,
                begun.FACT: begun.facts(self.placement, self.precision),
            },
        )

    def _sum_over_workers(self, sums: torch.Tensor) -> torch.Tensor:
        if self.world == 1:
            return sums
        gradients = [parameter.grad for parameter in self.adapter.values() if parameter.grad is not None]
        flat = torch.cat([sums, *(gradient.view(-1) for gradient in gradients)])
        dist.all_reduce(flat)
        summed, *parts = flat.split([len(sums), *(gradient.numel() for gradient in gradients)])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return summed

    def _count_skipped(self, finite: bool) -> None:
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == MOST_SKIPPED_IN_A_ROW:
            ids = [self.data.train[place]["id"] for place in self.data.order.batch(self.step)]
            raise DataError(
                f"the loss was not finite {MOST_SKIPPED_IN_A_ROW} steps in a row (now step {self.step + 1}, samples "
                f"{', '.join(ids)}): lower train.learning_rate, or look at these samples with `cacheloom show`"
            )
