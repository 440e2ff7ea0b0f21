"""What R11's tests do to a training run: slowed workers in which one thing goes wrong, once."""

from collections.abc import Callable
from pathlib import Path

from stages import train
from stages.relay import Place


def faulty(act: str, *, at: int, folder: Path, pause_s: float = 0.0) -> Callable[..., None]:
    """`stages.train._worker` in which the last worker does `act` before step `at` + 1, the first time it gets there.

    Each step that is begun is written to `folder/steps`, one line `step world process`, by the first worker.
    """
    original, marker, steps = train._worker, str(folder / "done"), str(folder / "steps")

    def worker(inputs: dict, place: Place) -> None:
        import os
        import signal
        import time

        from flux2_core.train.trainer import Trainer

        step = Trainer.train_step

        def faulted(self: Trainer, batch: object, **given: bool) -> dict:
            if self.rank == 0:
                with open(steps, "a") as lines:
                    lines.write(f"{self.step} {self.world} {os.getpid()}\n")
            if self.step == at and self.rank == self.world - 1 and not os.path.exists(marker):
                open(marker, "w").close()
                if act == "raise":
                    raise OSError("a fault of the test")
                if act != "nothing":
                    os.kill(os.getpid(), getattr(signal, act))
                time.sleep(3)  # until the signal has come to Python, or for good
            time.sleep(pause_s)
            return step(self, batch, **given)

        Trainer.train_step = faulted
        original(inputs, place)

    return worker


def begun(folder: Path) -> list[tuple[int, ...]]:
    """(step, world, process) of every step that was begun, in time order."""
    return [tuple(int(x) for x in line.split()) for line in (folder / "steps").read_text().splitlines()]
