"""Checkpoints: adapter, optimizer and position, adapter-sized, atomic and checksummed.

A checkpoint is a folder `step-000250/` of `adapter.safetensors`, `optimizer.safetensors` and, written last,
`checkpoint.json` with the checksums of the other two. The newest one whose checksums hold is loaded; a torn one is as if
it were not there. Everything random follows from (seed, step), so the position is the whole random state.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

NAME = "step-{:06d}"
PARTS = ("adapter", "optimizer")


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on exactly: `step` optimizer steps are done."""

    step: int
    adapter: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    facts: dict[str, Any]


def write(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint, then drop all but the newest `keep`."""
    final = folder / NAME.format(checkpoint.step)
    temporary = folder / f".{final.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    sums = {}
    for part in PARTS:
        data = save({name: tensor.contiguous() for name, tensor in getattr(checkpoint, part).items()})
        sums[part] = hashlib.sha256(data).hexdigest()
        _write_synced(temporary / f"{part}.safetensors", data)
    meta = {"step": checkpoint.step, "sha256": sums, "facts": checkpoint.facts}
    _write_synced(temporary / "checkpoint.json", json.dumps(meta, indent=1).encode())
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _sync_folder(folder)
    for old in sorted(_folders(folder))[:-keep]:
        shutil.rmtree(old)
    return final


def newest(folder: Path) -> Checkpoint | None:
    """Load the newest checkpoint whose checksums hold; None where there is none."""
    for candidate in sorted(_folders(folder), reverse=True):
        if (checkpoint := read(candidate)) is not None:
            return checkpoint
    return None


def read(folder: Path) -> Checkpoint | None:
    """Load one checkpoint folder, or None where it is torn or corrupt."""
    try:
        meta = json.loads((folder / "checkpoint.json").read_bytes())
        parts = {}
        for part in PARTS:
            data = (folder / f"{part}.safetensors").read_bytes()
            if hashlib.sha256(data).hexdigest() != meta["sha256"][part]:
                return None
            parts[part] = load(data)
        return Checkpoint(step=int(meta["step"]), facts=meta["facts"], **parts)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _folders(folder: Path) -> list[Path]:
    return list(folder.glob("step-*")) if folder.is_dir() else []


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
