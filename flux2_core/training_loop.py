"""The loop of one worker: step, record, save, look, until all steps are done."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from flux2_core.metrics import Writer
from flux2_core.training import Trainer
from flux2_core.watch import Watch


def run(trainer: Trainer, on_step: Callable[[dict[str, Any]], None]) -> None:
    """Train to `train.steps` from where the trainer stands, calling `on_step` with each step's record.

    Raises:
        DataError: the loss was not finite several times in a row; names the samples.
    """
    steps, save_every = trainer.config.train.steps, trainer.config.output.save_every
    watch = Watch(trainer)
    with Writer(trainer.folder.path, resume_step=trainer.step) if trainer.rank == 0 else nullcontext() as metrics:
        watch.look(trainer.step, metrics)
        for batch, waited in trainer.data.batches(trainer.step, steps, rank=trainer.rank, world=trainer.world):
            began = time.perf_counter()
            record = trainer.train_step(batch)
            seconds = time.perf_counter() - began + waited
            record["seconds"] = round(seconds, 4)
            record["images_per_second"] = round(batch.total / seconds, 3)
            record["data_wait"] = round(waited / seconds, 4)
            if trainer.device.type == "cuda":
                record["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            if metrics is not None:
                metrics.log(trainer.step, record)
            if trainer.step % save_every == 0 or trainer.step == steps:
                trainer.save()
            watch.look(trainer.step, metrics)
            on_step({"step": trainer.step} | record)
        if steps == 0:
            trainer.save()
