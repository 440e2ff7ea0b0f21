"""Checkpoints: adapter, its moving average, optimizer and position, adapter-sized, atomic and checksummed.

A checkpoint is a folder `step-000250/` of `adapter.safetensors`, `optimizer.safetensors`, `ema.safetensors` where one
is kept, and, written last, `checkpoint.json` with the checksums of the others and of itself. The newest one whose
checksums hold is loaded; a torn one is passed over with a warning. Everything random follows from (seed, step), so the
position is the whole random state.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from flux2_core.errors import DataError, SetupError
from flux2_core.store import atomic
from flux2_core.store.hashing import digest

NAME = "step-{:06d}"
ASIDE = "~"  # ends the name of a checkpoint that is being replaced by another of its step
FOLDER = re.compile(rf"step-(\d{{6,}}){ASIDE}?")
PARTS = ("adapter", "optimizer", "ema")
NOTE = "checkpoint.json"
FORMAT = 2  # raised when what a part or the facts mean changes
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on exactly: `step` optimizer steps are done; `adapter` is what is exported."""

    step: int
    adapter: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    facts: dict[str, Any]
    ema: dict[str, torch.Tensor] = field(default_factory=dict)


def write(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint, then drop all but the newest `keep`; one process at a time writes into a folder.

    Wherever this is killed, the checkpoints that were whole before still are.

    Raises:
        SetupError: the disk is full; what was there before is untouched.
    """
    final = folder / NAME.format(checkpoint.step)
    for leftover in folder.glob(".step-*"):  # of a save that was killed
        shutil.rmtree(leftover)
    temporary = folder / f".{final.name}.{os.getpid()}"
    try:
        with atomic.enough_room(folder):
            _write_parts(temporary, checkpoint)
    except (OSError, SetupError):
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    put_in_place(temporary, final)
    _drop(folder, final, keep=keep)
    return final


def _write_parts(folder: Path, checkpoint: Checkpoint) -> None:
    folder.mkdir(parents=True)
    sums = {}
    for part in PARTS:
        if not (tensors := getattr(checkpoint, part)):
            continue
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        sums[part] = hashlib.sha256(data).hexdigest()
        _write_synced(folder / f"{part}.safetensors", data)
    meta = {"format": FORMAT, "step": checkpoint.step, "sha256": sums, "facts": checkpoint.facts}
    _write_synced(folder / NOTE, json.dumps(meta | {"self": digest(meta)}, indent=1).encode())
    atomic.sync_folder(folder)


def put_in_place(temporary: Path, final: Path) -> None:
    """Give a whole checkpoint its name, whatever had that name before."""
    aside = final.with_name(final.name + ASIDE)
    if final.exists():  # the same step again: no call replaces a folder, so one of the two is always there
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    temporary.rename(final)
    atomic.sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _drop(folder: Path, written: Path, *, keep: int) -> None:
    """Drop what is older than the newest `keep`; what claims to be newer than the one just written is corrupt."""
    there = _folders(folder)
    place = there.index(written)
    for old in (*there[: max(0, place + 1 - keep)], *there[place + 1 :]):
        shutil.rmtree(old)


def newest(folder: Path) -> Checkpoint | None:
    """Load the newest checkpoint whose checksums hold; None where there is none."""
    for candidate in reversed(_folders(folder)):
        if (checkpoint := read(candidate)) is not None:
            return checkpoint
        LOG.warning("%s: torn or corrupt, passed over", candidate)
    return None


def read(folder: Path) -> Checkpoint | None:
    """Load one checkpoint folder, or None where it is torn or corrupt.

    Raises:
        DataError: another version of this program wrote it.
    """
    try:
        meta = json.loads((folder / NOTE).read_bytes())
        if meta.pop("self") != digest(meta):
            return None
        if meta.get("format") != FORMAT:
            raise DataError(
                f"{folder}: of checkpoint format {meta.get('format')}, this cacheloom reads {FORMAT}: finish the run "
                "with the version that began it, or start anew with run=NAME"
            )
        parts: dict[str, dict[str, torch.Tensor]] = {"adapter": {}, "optimizer": {}}
        for part, wanted in meta["sha256"].items():
            data = (folder / f"{part}.safetensors").read_bytes()
            if hashlib.sha256(data).hexdigest() != wanted:
                return None
            parts[part] = load(data)
        return Checkpoint(step=int(meta["step"]), facts=meta["facts"], **parts)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _folders(folder: Path) -> list[Path]:
    """The checkpoints, oldest first; of two of one step that which is in place counts as newer."""
    found = [path for path in folder.glob("step-*") if FOLDER.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: (step_of(path.name), not path.name.endswith(ASIDE)))


def step_of(name: str) -> int:
    """The step that a checkpoint's folder is named by."""
    return int(name.removeprefix("step-").removesuffix(ASIDE))


def _write_synced(path: Path, data: bytes) -> None:
    with atomic.synced(path) as stream:
        stream.write(data)
