"""The folder of a run: its lock, its recorded configuration, and whether it is finished."""

from __future__ import annotations

import fcntl
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flux2_core.config.reading import dump_toml, parse
from flux2_core.config.sections import Config
from flux2_core.errors import SetupError, UsageError
from flux2_core.run import checkpoint
from flux2_core.store import atomic, objects

RECORD = "config.toml"
FREE = ("cluster.", "output.", "max_quarantined")  # what may change between two starts of one run


class RunFolder:
    """Paths under `<output.root>/<run>/`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.path = Path(config.output.root).expanduser().absolute() / config.run
        self.checkpoints = self.path / "checkpoints"
        self.previews = self.path / "previews"
        self.metrics = self.path / "metrics.jsonl"
        self.validation = self.path / "validation.jsonl"
        self.lora = self.path / "lora"
        self.index = self.path / "index.json"
        self.quarantine = self.path / "quarantine.parquet"

    @property
    def mirror(self) -> str | None:
        """Where this folder is copied to, if anywhere."""
        place = self.config.output.mirror
        if not place:
            return None
        if not objects.is_remote(place):
            place = str(Path(place).expanduser().absolute())
        return objects.join(place, self.config.run)

    @property
    def lora_files(self) -> tuple[Path, Path]:
        """The diffusers file and the ComfyUI file."""
        return self.lora / f"{self.config.run}.safetensors", self.lora / f"{self.config.run}-comfyui.safetensors"

    def finished(self) -> bool:
        """Whether all steps are done and both LoRA files are written."""
        last = self.checkpoints / checkpoint.NAME.format(self.config.train.steps)
        return checkpoint.read(last) is not None and all(file.is_file() for file in self.lora_files)

    def check(self) -> None:
        """Compare the configuration with the one that this run was started with, here or on a machine that mirrored it.

        Raises:
            UsageError: the run exists with other settings; names them.
            SetupError: the mirror cannot be read.
        """
        for place in filter(None, (str(self.path), self.mirror)):
            if (then := _recorded(objects.join(place, RECORD))) is None:
                continue
            ours, theirs = (_flat(tomllib.loads(dump_toml(config))) for config in (self.config, then))
            differing = [key for key in sorted({*ours, *theirs}, key=_path_first) if ours.get(key) != theirs.get(key)]
            if differing := [key for key in differing if not key.startswith(FREE) and not key.endswith("check_images")]:
                named = "; ".join(f"{key} was {theirs.get(key)!r}, is {ours.get(key)!r}" for key in differing[:5])
                raise UsageError(
                    f"{place} holds a run with another configuration ({named}): give this one another name with "
                    "run=NAME, or remove that folder"
                )

    def record(self) -> None:
        """Write down the configuration that the run is trained with."""
        self._make()
        atomic.write(self.path / RECORD, dump_toml(self.config).encode())

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; freed by the system when the process ends, however it ends.

        Raises:
            UsageError: another process works on this run.
            SetupError: the folder cannot be made.
        """
        self._make()
        with (self.path / ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"{self.path}: another process is working on this run; wait for it, or use run=NAME"
                ) from None
            yield

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SetupError(f"{self.path}: cannot be made ({error.strerror}); set output.root elsewhere") from error

    def previews_drawn(self) -> list[Path]:
        """The preview grids so far, oldest first."""
        return sorted(self.previews.glob("step-*.png"))


def _recorded(uri: str) -> Config | None:
    """The configuration in a file, keys that are newer than it at their defaults; None where there is no file."""
    if not objects.exists(uri):
        return None
    try:
        tree = tomllib.loads(objects.read(uri).decode())
    except ValueError as error:
        raise UsageError(f"{uri}: not a TOML file ({error})") from error
    return parse(tree, source=uri)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}{key}.").items()}
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        return {k: v for place, value in enumerate(tree) for k, v in _flat(value, f"{prefix}{place}.").items()}
    return {prefix.rstrip("."): tree}


def _path_first(key: str) -> tuple[bool, str]:
    """Of a data set that is new, the path says most."""
    return not key.endswith(".path"), key
