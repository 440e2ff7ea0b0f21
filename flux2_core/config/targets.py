"""Where a command may write: what the configuration and `--out` name must be folders, or can become some."""

from __future__ import annotations

import os
from pathlib import Path

from flux2_core.config.sections import Output
from flux2_core.errors import UsageError


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
