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
    trainer: Trainer,
    on_step: Callable[[dict[str, Any]], None],
    *,
    on_phase: Callable[[str], None] = lambda _phase: None,
    noticed: Callable[[], bool] = lambda: False,
) -> bool:
    """Train to `train.steps` from where the trainer stands; return whether all steps are done.

    Args:
        trainer: at the step that it was restored to.
        on_step: gets what `metrics.jsonl` gets, and `of` how many steps.
        on_phase: gets what is done between steps, in words.
        noticed: whether this worker's machine is about to go. All workers then stop after the step and its checkpoint.

    Raises:
        DataError: the loss was not finite several times in a row; names the samples.
        SetupError: the GPU's memory is full; names the planner's next-smaller setting.
        UsageError: another machine has taken the run over.
    """
    steps = trainer.config.train.steps
    with (
        Writer(trainer.folder.path, resume_step=trainer.step) if trainer.rank == 0 else nullcontext() as metrics,
        Copies(trainer.folder, first=trainer.rank == 0) as copies,
    ):
        beside = Beside(trainer, metrics, copies, on_phase)
        beside.look()
        news = _first_news(trainer)
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
                "eta": round((steps - trainer.step) * pace + beside.to_come(trainer.step), 1),
                "peak_gb": round(_peak_bytes(trainer.device) / 1e9, 2),
            } | _joined(news, trainer.compiler.news() if trainer.compiler else {}, copies.news())
            news = {}
            if metrics is not None:
                metrics.log(trainer.step, record)
            beside.save()
            if trainer.stopping and trainer.step < steps:
                return False
            beside.look()
            on_step({"step": trainer.step, "of": steps} | record)
        if steps == 0:
            beside.save()
    return True


class Beside:
    """What is done between steps, and how long that which is still to come will take: as long as it took last."""

    def __init__(
        self, trainer: Trainer, metrics: Writer | None, copies: Copies, on_phase: Callable[[str], None]
    ) -> None:
        self.trainer, self.metrics, self.copies, self.on_phase = trainer, metrics, copies, on_phase
        self.data, self.steps = trainer.data, trainer.config.train.steps
        self.watch = Watch(trainer, on_phase)
        self.every = {"look": trainer.config.validation.every, "save": trainer.config.output.save_every}
        self.took_s = dict.fromkeys(self.every, 0.0)
        self.all = {what: self._in_all(every) for what, every in self.every.items()}

    def look(self) -> None:
        """Draw previews and measure the validation loss where they are due."""
        if self.watch.due(self.trainer.step):
            other = "; or draw smaller previews (validate.size), or look at nothing (validate.every=0)"
            doing = f"previews and validation at step {self.trainer.step}"
            with self.timed("look"), _full_memory_told(self.trainer, doing, other):
                self.watch.look(self.trainer.step, self.metrics)

    def save(self) -> None:
        """Write a checkpoint where one is due, or the training ends."""
        step = self.trainer.step
        if self.trainer.stopping or step == self.steps or self.data.due(self.every["save"], step):
            self.on_phase("saving")
            with self.timed("save"):
                self.copies.settle()
                self.trainer.save()
                self.copies.start()

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Time it."""
        began = time.perf_counter()
        yield
        self.took_s[what] = time.perf_counter() - began

    def to_come(self, step: int) -> float:
        """Seconds that those after this step's will take."""
        if step == self.steps:
            return 0.0
        left = {what: self.all[what] - self.data.passed(every, step) for what, every in self.every.items() if every}
        return sum(self.took_s[what] * count for what, count in left.items())

    def _in_all(self, every: int | str) -> int:
        """How often something is due in the whole run; after the last step it always is."""
        return self.data.passed(every, self.steps) + (not self.data.due(every, self.steps)) if every else 0


def _first_news(trainer: Trainer) -> dict[str, str]:
    """What is told with the first step of a start."""
    idle = preflight.fillers(trainer.config.train.batch_size, trainer.world)
    told = "; ".join([*([idle] if idle else []), *trainer.notes])
    return {"warning": told} if told else {}


def _joined(*news: Mapping[str, Any]) -> dict[str, Any]:
    warnings = [each["warning"] for each in news if "warning" in each]
    others = {key: value for each in news for key, value in each.items() if key != "warning"}
    return others | ({"warning": "; ".join(warnings)} if warnings else {})


def _step(trainer: Trainer, batch: Batch, *, notice: bool) -> dict[str, Any]:
    with _full_memory_told(trainer, f"step {trainer.step + 1}"):
        return trainer.train_step(batch, notice=notice)


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
