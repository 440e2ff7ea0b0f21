"""The data set's folder is a wall: which names and links found in it may be followed, and how large files may be."""

from __future__ import annotations

import os
import re
from pathlib import PureWindowsPath

MAX_BYTES = 2**30  # of a picture
CAPTION_BYTES = 16 * 2**20  # of a caption file; a 1 MB caption passes, and `plan` reports its truncation
METADATA_BYTES = 2**29  # of a metadata file, and of all caption files of an archive: a million of 500 bytes
UNPACKED_BYTES = 2**30  # of all names and captions of a table, which may be packed into few bytes
MOST_ROWS = 2**22  # of one file or table; each takes about 0.5 kB while it is read
LONGEST_NAME = 4096  # no system takes a longer path
NOT_REGULAR = "not a regular file (a pipe, socket or device)"
CAPTION_TOO_LARGE = f"caption file over {CAPTION_BYTES // 2**20} MiB"


def refused(name: str) -> str | None:
    """Why a name out of a file may not be followed; None for a plain path below the folder."""
    if not name:
        return "the name is empty"
    if "\0" in name:
        return "the name holds a NUL character"
    if len(name) > LONGEST_NAME:
        return f"a name of {len(name):,} letters, longer than any path"
    if shown(name) != name:
        return "the name is not valid UTF-8; rename it"
    if re.search(r"(?i)[a-z]:/{2}|^(file|data):", name) or PureWindowsPath(name).drive:
        return "the name is a URL or has a drive; name a file inside the data set's folder"
    if name.startswith(("/", "\\")):
        return "the name is an absolute path; name a file relative to the data set's folder"
    if ".." in re.split(r"[/\\]", name):
        return "the name leaves the data set's folder ('..')"
    return None


def outside(path: str, wall: str) -> str | None:
    """Why a local path may not be followed; None when it ends below `wall` (a real path), or the hub cache's own."""
    try:
        real = os.path.realpath(path, strict=True)
    except OSError as error:
        return f"a link that leads nowhere ({error.strerror})"
    if all(os.path.commonpath((real, place)) != place for place in (wall, *_blobs(wall))):
        return "a link that leaves the data set's folder; copy the file into it"
    return None


def _blobs(wall: str) -> list[str]:
    """Where the files of a snapshot in the hub's cache lie, which are links in the snapshot's own folder."""
    found = re.match(r"(.*/(?:datasets|models)--[^/]+)/snapshots/[^/]+(?:/|$)", wall)
    return [f"{found[1]}/blobs"] if found else []


def too_large(size: int) -> str | None:
    """Why a file of so many bytes is left out."""
    return f"file of {size / 2**30:.1f} GiB; pictures up to 1 GiB are read" if size > MAX_BYTES else None


def shown(path: str) -> str:
    """A path that any table or terminal can hold: NUL and undecodable bytes escaped."""
    return path.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
