"""The loop of one worker: step, record, save, look, until all steps are done or the machine is taken away."""

from __future__ import annotations

import functools
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from flux2_core import accelerator
from flux2_core.errors import SetupError
from flux2_core.placement import relief
from flux2_core.run.metrics import Writer, smooth
from flux2_core.run.mirror import Copies
from flux2_core.train import preflight
from flux2_core.train.methods.protocol import Batch
from flux2_core.train.trainer import Trainer
from flux2_core.train.validate import Watch


def run(
    trainer: Trainer, on_step: Callable[[dict[str, Any]], None], *, noticed: Callable[[], bool] = lambda: False
) -> bool:
    """Train to `train.steps` from where the trainer stands, calling `on_step` with each step's record.

    Args:
        trainer: at the step that it was restored to.
        on_step: gets what `metrics.jsonl` gets.
        noticed: whether this worker's machine is about to go. All workers then stop after the step and its checkpoint.

    Returns:
        Whether all steps are done.

    Raises:
        DataError: the loss was not finite several times in a row; names the samples.
        SetupError: the GPU's memory is full; names the planner's next-smaller setting.
        UsageError: another machine has taken the run over.
    """
    steps, save_every = trainer.config.train.steps, trainer.config.output.save_every
    watch = Watch(trainer)
    with (
        Writer(trainer.folder.path, resume_step=trainer.step) if trainer.rank == 0 else nullcontext() as metrics,
        Copies(trainer.folder, first=trainer.rank == 0) as copies,
    ):
        _look(watch, trainer, metrics)
        idle = preflight.fillers(trainer.config.train.batch_size, trainer.world)
        told = "; ".join([*([idle] if idle else []), *trainer.notes])
        news = {"warning": told} if told else {}
        smoothed, pace = metrics.last.get("smoothed") if metrics else None, None
        share = functools.partial(trainer.data.batches, rank=trainer.rank, world=trainer.world)
        for batch, waited in share(trainer.step, steps, pinned=accelerator.is_gpu(trainer.device)):
            began = time.perf_counter()
            record = _step(trainer, batch, notice=noticed())
            seconds = time.perf_counter() - began + waited
            smoothed, pace = smooth(smoothed, record["loss"]), smooth(pace, seconds)
            record |= {
                "smoothed": smoothed,
                "seconds": round(seconds, 4),
                "images_per_second": round(batch.total / seconds, 3),
                "data_wait": round(waited / seconds, 4),
                "eta": round((steps - trainer.step) * pace, 1),
                "peak_gb": round(_peak_bytes(trainer.device) / 1e9, 2),
            } | _joined(news, trainer.compiler.news() if trainer.compiler else {}, copies.news())
            news = {}
            if metrics is not None:
                metrics.log(trainer.step, record)
            if trainer.stopping or trainer.step == steps or trainer.data.due(save_every, trainer.step):
                _save(trainer, copies)
            if trainer.stopping and trainer.step < steps:
                return False
            _look(watch, trainer, metrics)
            on_step({"step": trainer.step, "of": steps} | record)
        if steps == 0:
            _save(trainer, copies)
    return True


def _joined(*news: Mapping[str, Any]) -> dict[str, Any]:
    warnings = [each["warning"] for each in news if "warning" in each]
    others = {key: value for each in news for key, value in each.items() if key != "warning"}
    return others | ({"warning": "; ".join(warnings)} if warnings else {})


def _save(trainer: Trainer, copies: Copies) -> None:
    copies.settle()
    trainer.save()
    copies.start()


def _step(trainer: Trainer, batch: Batch, *, notice: bool) -> dict[str, Any]:
    with _full_memory_told(trainer, f"step {trainer.step + 1}"):
        return trainer.train_step(batch, notice=notice)


def _look(watch: Watch, trainer: Trainer, metrics: Writer | None) -> None:
    other = "; or draw smaller previews (validate.size), or look at nothing (validate.every=0)"
    with _full_memory_told(trainer, f"previews and validation at step {trainer.step}", other):
        watch.look(trainer.step, metrics)


@contextmanager
def _full_memory_told(trainer: Trainer, doing: str, other: str = "") -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SetupError(
            f"{doing}: the GPU's memory is full ({str(error).split('. ')[0]}); "
            f"{relief.next_smaller(trainer.job, trainer.placement)}{other}"
        ) from error


def _peak_bytes(device: torch.device) -> int:
    """Most memory that this worker has held so far: of its GPU, or of its process."""
    if accelerator.is_gpu(device):
        return accelerator.peak_bytes(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB
