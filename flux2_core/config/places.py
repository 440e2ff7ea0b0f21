"""Where a path of the configuration is, seen from the folder that the command was started in."""

from __future__ import annotations

import os
from enum import Enum, auto
from pathlib import Path


class Place(Enum):
    """What a key's path is relative to, annotated on each key that holds one: `config.reading.absolute` goes by it."""

    HERE = auto()  # the folder that the command is started in; a URI stays as it is
    HUB = auto()  # the same where it is a folder there, else a hub id
    BESIDE = auto()  # the section's `path` if it is there, else the folder that the command is started in


COLUMN = "column:"  # a column of `data.path` in a place's or a caption's stead: `data.caption = "column:NAME"`


def here(path: str) -> str:
    """A path from the folder that the command was started in, made absolute; a URI, a column or nothing stays."""
    return path if not path or path.startswith(COLUMN) or "://" in path else str(Path(path).expanduser().absolute())


def beside(path: str, folder: str) -> str:
    """Where a folder of masks or references lies: a relative one below `data.path` if it is there, else here.

    Below an S3 prefix in any case: the store is not asked.
    """
    if folder.startswith(COLUMN):
        return folder
    if "://" in folder or Path(folder).expanduser().is_absolute():
        return folder.rstrip("/") if "://" in folder else str(Path(folder).expanduser())
    if "://" in path:
        return f"{path.rstrip('/')}/{folder.strip('/')}"
    below = Path(path).absolute() / folder
    return os.path.normpath(below if below.is_dir() else Path(folder).absolute())
