"""The kinds of container that hold many pictures each: one entry a kind, with all that is asked of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from flux2_core.data.sources import lance_rows, parquet_rows, tar_members
from flux2_core.data.sources.columns import Rows
from flux2_core.data.sources.tar_members import Member


@dataclass(frozen=True)
class Container:
    """A kind of container: of `members`, paired by name like files of a folder, or of `rows` with their captions."""

    title: str
    """What a person calls some of them."""
    read: Callable[[str, str, str], bytes | None]
    """A picture's bytes: (container, the stamp that it must have, the picture's address in it)."""
    members: Callable[[str], list[Member]] | None = None
    rows: Callable[[str, str, str | None], Rows] | None = None
    """(container, `data.caption`, the pictures' column where one is named)."""
    is_folder: bool = False
    in_groups: bool = False
    """Whether all that has the same stamp is read at once."""


CONTAINERS = {  # by suffix
    ".tar": Container("WebDataset tar files", tar_members.read, members=tar_members.members),
    ".parquet": Container(
        "Parquet files with picture bytes", parquet_rows.read, rows=parquet_rows.rows, in_groups=True
    ),
    ".lance": Container("Lance tables", lance_rows.read, rows=lance_rows.rows, is_folder=True),
}


def suffix_of(name: str) -> str | None:
    """The suffix in `CONTAINERS` by which a name promises a container, if it does."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix if suffix in CONTAINERS else None


def is_folder(name: str) -> bool:
    """Whether a name promises a container that is a folder."""
    return (suffix := suffix_of(name)) is not None and CONTAINERS[suffix].is_folder
