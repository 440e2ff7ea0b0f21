"""The folder of a run: its places, its lock, and whether it is finished."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flux2_core.config.places import here
from flux2_core.config.sections import Config
from flux2_core.errors import SetupError, UsageError
from flux2_core.run import checkpoint
from flux2_core.store import objects


class RunFolder:
    """Paths under `<output.root>/<run>/`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.path = Path(config.output.root).expanduser().absolute() / config.run
        self.checkpoints = self.path / "checkpoints"
        self.previews = self.path / "previews"
        self.strengths = self.previews / "strengths.png"  # of a slider
        self.metrics = self.path / "metrics.jsonl"
        self.validation = self.path / "validation.jsonl"
        self.lora = self.path / "lora"
        self.index = self.path / "index.json"
        self.quarantine = self.path / "quarantine.parquet"

    @property
    def mirror(self) -> str | None:
        """Where this folder is copied to, if anywhere."""
        place = self.config.output.mirror
        return objects.join(here(place), self.config.run) if place else None

    @property
    def lora_files(self) -> tuple[Path, Path]:
        """The diffusers file and the ComfyUI file."""
        return self.lora / f"{self.config.run}.safetensors", self.lora / f"{self.config.run}-comfyui.safetensors"

    def finished(self) -> bool:
        """Whether all steps are done and both LoRA files are written."""
        last = self.checkpoints / checkpoint.NAME.format(self.config.train.steps)
        return checkpoint.read(last) is not None and all(file.is_file() for file in self.lora_files)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; freed by the system when the process ends, however it ends.

        Raises:
            UsageError: another process works on this run.
            SetupError: the folder cannot be made, or takes no file.
        """
        self.make()
        try:
            handle = (self.path / ".lock").open("w")
        except OSError as error:
            raise SetupError(
                f"{self.path}: {error.strerror}; give write permission, or set output.root elsewhere"
            ) from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"{self.path}: another process is working on this run; wait for it, or use run=NAME"
                ) from None
            yield

    def make(self) -> None:
        """Make the folder if it is missing.

        Raises:
            SetupError: it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SetupError(f"{self.path}: cannot be made ({error.strerror}); set output.root elsewhere") from error

    def previews_drawn(self) -> list[Path]:
        """The preview grids so far, oldest first."""
        return sorted(self.previews.glob("step-*.png"))
