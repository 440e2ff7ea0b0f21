"""Where a path of the configuration is, seen from the folder that the command was started in."""

from __future__ import annotations

import os
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING

from flux2_core.errors import UsageError

if TYPE_CHECKING:
    from flux2_core.config.sections import Output


class Place(Enum):
    """What a key's path is relative to, annotated on each key that holds one: `config.reading.absolute` goes by it."""

    HERE = auto()  # the folder that the command is started in; a URI stays as it is
    HUB = auto()  # the same where it is a folder there, else a hub id
    BESIDE = auto()  # the section's `path` if it is there, else the folder that the command is started in


def here(path: str) -> str:
    """A path from the folder that the command was started in, made absolute; a URI stays."""
    return path if "://" in path else str(Path(path).expanduser().absolute())


def beside(path: str, folder: str) -> str:
    """Where a folder of masks or references lies: a relative one below `data.path` if it is there, else here.

    Below an S3 prefix in any case: the store is not asked.
    """
    if "://" in folder or Path(folder).expanduser().is_absolute():
        return folder.rstrip("/") if "://" in folder else str(Path(folder).expanduser())
    if "://" in path:
        return f"{path.rstrip('/')}/{folder.strip('/')}"
    below = Path(path).absolute() / folder
    return os.path.normpath(below if below.is_dir() else Path(folder).absolute())


def outputs(output: Output) -> None:
    """See that what `[output]` names are folders, or can become some; nothing is asked of a URI.

    Raises:
        UsageError: a file is there, or `root` is a URI; names the key.
    """
    if "://" in output.root:
        raise UsageError(
            f"output.root={output.root}: must be a folder; output.mirror copies runs to s3://bucket/prefix"
        )
    for key in ("root", "cache", "mirror"):
        if (place := getattr(output, key)) and "://" not in place:
            folder(place, setting=f"output.{key}")


def folder(path: str, *, setting: str) -> None:
    """See that no file is in the way of a folder.

    Raises:
        UsageError: there is one; names the setting.
    """
    whole = Path(path).expanduser().absolute()
    there = next(each for each in (whole, *whole.parents) if os.path.exists(each))
    if not there.is_dir():
        raise UsageError(f"{setting}={path}: {there} is a file, and a folder must be there; name another one")
