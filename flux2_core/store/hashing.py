"""Hashes: of values in one spelling, of files, of a tensor inside a file; and where two fingerprints differ."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flux2_core.errors import SetupError
from flux2_core.store import atomic

SHA256 = re.compile(r"[0-9a-f]{64}")


def canonical(value: Any) -> str:
    """JSON in one spelling: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(value: Any) -> str:
    """sha256 over canonical JSON (sorted keys, no spaces), as 64 hex digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def first_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """Name the first differing field with both values, or None where they agree."""
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            return f"{name}: wanted {_short(ours.get(name))}, found {_short(theirs.get(name))}"
    return None


def files_digest(folder: Path, names: Iterable[str]) -> str:
    """One hash over the contents of files of a model folder; each file's hash is remembered by path, size, mtime.

    Raises:
        FileNotFoundError: a file is missing.
    """
    return digest({name: file_sha256(folder / name) for name in sorted(names)})


def file_sha256(path: Path) -> str:
    """sha256 of a file. Hub downloads carry it in their blob's name; others are hashed once per (size, mtime)."""
    target = path.resolve(strict=True)
    if target.parent.name == "blobs" and SHA256.fullmatch(target.name):
        return target.name
    status = target.stat()
    if status.st_size < 1 << 24:
        return _hash(target)
    memory = _memory_folder() / (digest([str(target), status.st_size, status.st_mtime_ns]) + ".sha256")
    if memory.is_file() and SHA256.fullmatch(known := memory.read_text().strip()):
        return known
    value = _hash(target)
    with contextlib.suppress(OSError, SetupError):  # a home that takes no file costs time at the next start, no more
        atomic.write(memory, value.encode())
    return value


def tensor_sha256(file: Path, name: str) -> str:
    """sha256 of one tensor's bytes, dtype and shape in a safetensors file; the other tensors are not read.

    Raises:
        KeyError: the file does not hold the tensor.
    """
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        entry = json.loads(stream.read(size))[name]
        start, stop = entry["data_offsets"]
        stream.seek(8 + size + start)
        content = hashlib.sha256(stream.read(stop - start)).hexdigest()
    return digest([entry["dtype"], entry["shape"], content])


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _memory_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cacheloom" / "sha256"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:28] + "..." + text[-28:]
