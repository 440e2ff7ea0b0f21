"""Hashes: of values in one spelling, of files, of a tensor inside a file; and where two fingerprints differ."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flux2_core.errors import SetupError
from flux2_core.store import atomic

SHA256 = re.compile(r"[0-9a-f]{64}")
HEADER_BYTES = 100_000_000  # of a safetensors file, as its own library allows
SAMPLES, SAMPLE_BYTES = 64, 4096  # of a large file, read at each start to know it again: 1 ms on a local disk


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
    """One hash over the contents of files of a model folder; that of a large file is remembered (`file_sha256`).

    Raises:
        FileNotFoundError: a file is missing.
    """
    return digest({name: file_sha256(folder / name) for name in sorted(names)})


def file_sha256(path: Path) -> str:
    """sha256 of a file. Hub downloads carry it in their blob's name; other large ones are hashed once per machine.

    A file is known again by path, size, inode, times and bytes out of all of it: tools that write in place or that
    restore times (`rsync -t`, `cp -p`) leave path, size and mtime as they were.

    Raises:
        SetupError: it is being written to.
    """
    target = path.resolve(strict=True)
    if target.parent.name == "blobs" and SHA256.fullmatch(target.name):
        return target.name
    if target.stat().st_size < 1 << 24:
        return _hash(target)
    seen = _seen(target)
    memory = _memory_folder() / f"{seen}.sha256"
    if memory.is_file() and SHA256.fullmatch(known := memory.read_text().strip()):
        return known
    value = _hash(target)
    if _seen(target) != seen:
        raise SetupError(f"{path}: was written to while it was hashed; wait until its download or copy is done")
    with contextlib.suppress(OSError, SetupError):  # a home that takes no file costs time at the next start, no more
        atomic.write(memory, value.encode())
    return value


def remembered(facts: Any, make: Callable[[], Any]) -> Any:
    """What `make` gives (JSON), kept on this machine under all that it follows from."""
    memory = _memory_folder() / f"{digest(facts)}.json"
    with contextlib.suppress(OSError, ValueError):  # not there, or torn
        return json.loads(memory.read_text())
    value = make()
    with contextlib.suppress(OSError, SetupError):
        atomic.write(memory, json.dumps(value).encode())
    return value


def tensor_sha256(file: Path, name: str) -> str:
    """sha256 of one tensor's bytes, dtype and shape in a safetensors file; the other tensors are not read.

    Raises:
        KeyError: the file does not hold the tensor.
        SetupError: its header is none.
    """
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(size)) if size <= HEADER_BYTES else None
        except (ValueError, RecursionError):
            header = None
        if not isinstance(header, dict):
            raise SetupError(f"{file}: its header of {size:,} bytes is none of safetensors; download the model again")
        entry = header[name]
        start, stop = entry["data_offsets"]
        stream.seek(8 + size + start)
        content = hashlib.sha256(stream.read(stop - start)).hexdigest()
    return digest([entry["dtype"], entry["shape"], content])


def sampled(path: Path) -> list[int | str]:
    """Size of a file, and hashes of bytes out of all of it, the first and the last among them."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        parts: list[int | str] = [size]
        for place in range(SAMPLES):
            stream.seek(max(0, size - SAMPLE_BYTES) * place // (SAMPLES - 1))
            parts.append(hashlib.sha256(stream.read(SAMPLE_BYTES)).hexdigest())
    return parts


def _seen(path: Path) -> str:
    """What a file is known again by."""
    status = path.stat()
    return digest([str(path), status.st_ino, status.st_mtime_ns, status.st_ctime_ns, *sampled(path)])


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _memory_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cacheloom" / "sha256"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:28] + "..." + text[-28:]
