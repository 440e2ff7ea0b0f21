"""What a run was started with, written beside it, and whether it is asked to go on with something else."""

from __future__ import annotations

import tomllib
from typing import Any

from flux2_core.config.reading import dump_toml, parse
from flux2_core.config.sections import Config
from flux2_core.errors import UsageError
from flux2_core.run.folder import RunFolder
from flux2_core.store import atomic, objects

RECORD = "config.toml"
# What may change between two starts of one run: none of it changes what is computed, but for the last bits;
FREE = ("cluster.", "output.", "max_quarantined", "train.compile", "train.recompute", "validate.")
KEPT = ("validate.held_out",)  # but which pictures are trained on
LENGTH = ("train.steps", "train.epochs")  # may grow


def write(folder: RunFolder) -> None:
    """Write down the configuration that the run is trained with."""
    folder.make()
    atomic.write(folder.path / RECORD, dump_toml(folder.config).encode())


def begun(folder: RunFolder) -> bool:
    """Whether this run was started before, here or on a machine that mirrored it."""
    return any(objects.exists(objects.join(place, RECORD)) for place in _places(folder))


def check(folder: RunFolder) -> None:
    """Compare the configuration with the one that this run was started with, here or on a machine that mirrored it.

    Raises:
        UsageError: the run exists with other settings; names them.
        SetupError: the mirror cannot be read.
    """
    for place in _places(folder):
        if (then := _recorded(objects.join(place, RECORD))) is None:
            continue
        ours, theirs = (_flat(tomllib.loads(dump_toml(config))) for config in (folder.config, then))
        differing = [key for key in sorted({*ours, *theirs}, key=_path_first) if ours.get(key) != theirs.get(key)]
        if not folder.config.train.settled:  # else it is what the epochs, which are compared, come to
            differing = [key for key in differing if key != "train.steps"]
        if differing := [key for key in differing if not _free(key, theirs.get(key), ours.get(key))]:
            named = "; ".join(f"{key} was {theirs.get(key)!r}, is {ours.get(key)!r}" for key in differing[:5])
            raise UsageError(
                f"{place} holds a run with another configuration ({named}): give this one another name with "
                "run=NAME, or remove that folder"
            )


def lengthened(folder: RunFolder) -> int | None:
    """The steps that this run was to have before, where it is now to have more."""
    before = [then.train.steps for place in _places(folder) if (then := _recorded(objects.join(place, RECORD)))]
    steps = folder.config.train.steps
    return before[0] if before and before[0] < steps else None


def _free(key: str, then: Any, now: Any) -> bool:
    if key in LENGTH and None not in (then, now):
        return bool(now > then)
    return key.endswith("check_images") or (key.startswith(FREE) and key not in KEPT)


def settled(config: Config) -> Config:
    """The configuration with the steps that its epochs came to when this run was begun; as it is where it was not."""
    if config.train.settled:
        return config
    for place in _places(RunFolder(config)):
        then = _recorded(objects.join(place, RECORD))
        if then is not None and then.train.epochs == config.train.epochs:
            return config.model_copy(update={"train": config.train.model_copy(update={"steps": then.train.steps})})
    return config


def _places(folder: RunFolder) -> list[str]:
    return [str(folder.path), *([folder.mirror] if folder.mirror else [])]


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
