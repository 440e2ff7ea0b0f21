"""A copy of a run's folder at `output.mirror`, from which another machine goes on when this one's disk is gone.

    push   folder -> mirror   after each checkpoint, in the background, and at the end
    pull   mirror -> folder   at the start, where the mirror is further than the folder

Cut anywhere, the newest whole checkpoint of the mirror loads: a checkpoint goes up part by part and its note last, and
only then do older ones go, their notes first. Every start signs the mirror; a machine that finds another signature has
been replaced and stops, so two of them take turns (one that slept between looking and writing may tear a checkpoint:
its checksums tell). Left out: TensorBoard logs, which repeat metrics and previews, and names that begin with a dot.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from flux2_core.errors import SetupError, UsageError
from flux2_core.run import checkpoint
from flux2_core.run.folder import RunFolder
from flux2_core.store import objects

HOLDER = ".holder"  # in the mirror: the signature of the machine that works on the run
STATE = ".mirror"  # in the folder: our signature, and size and time of each file as it was copied last
OURS = ("index.json", "quarantine.parquet")  # what `cacheloom cache` wrote here is newer than the mirror's
LEFT_OUT = (".", "events.out.")  # begin the names of our own notes and half-written files, and of TensorBoard's logs
CHECKPOINT = re.compile(r"checkpoints/(step-\d{6,})/[^/]+")
PATIENCE_S = 300.0  # that a save waits for the copy before: the other workers wait with it, under NCCL 600 s at most
LOG = logging.getLogger(__name__)


def pull(run: RunFolder) -> None:
    """Fetch the mirror's newest whole checkpoint, where it is of a later step than the folder's, and all else.

    Raises:
        SetupError: the mirror cannot be read.
    """
    if run.mirror is None:
        return
    with _named(run):
        there = _listing(run.mirror)
        here = checkpoint.newest(run.checkpoints) if (whole := _whole(there)) else None
        for name in reversed(whole):
            if here is not None and checkpoint.step_of(name) <= here.step:
                return
            if _adopt(run, name, there):
                return
            LOG.warning("%s: torn or corrupt, passed over", objects.join(run.mirror, "checkpoints", name))


def _adopt(run: RunFolder, name: str, there: Mapping[str, int]) -> bool:
    """Fetch a checkpoint and all else that travels; False where the checkpoint is torn or corrupt."""
    temporary = run.checkpoints / f".{name}.pulled"
    shutil.rmtree(temporary, ignore_errors=True)
    parts = [part for part in there if part.startswith(f"checkpoints/{name}/") and _travels(part)]
    for part in parts:
        _fetch(run, part, temporary / part.rsplit("/", 1)[1])
    if checkpoint.read(temporary) is None:
        shutil.rmtree(temporary, ignore_errors=True)
        return False
    others = [other for other in there if _travels(other) and not CHECKPOINT.fullmatch(other)]
    wanted = [other for other in others if other not in OURS or not (run.path / other).exists()]
    for other in wanted:
        _fetch(run, other, run.path / other)
    checkpoint.put_in_place(temporary, run.checkpoints / name)  # last: cut before, all is fetched again
    known = {file: _stamp(run.path / file) for file in (*wanted, *parts)}
    _write_state(run, {"holder": _holder(run), "files": known})
    return True


def claim(run: RunFolder) -> None:
    """Sign the mirror: a machine that still works on this run elsewhere stops at its next checkpoint.

    Raises:
        SetupError: the mirror cannot be written.
    """
    if run.mirror is None:
        return
    with _named(run):
        state = _state(run)
        if _holder(run) != state["holder"]:
            state["files"] = {}  # another machine has written there since, or nobody has
        state["holder"] = f"{platform.node()} {uuid.uuid4().hex}"
        objects.write(objects.join(run.mirror, HOLDER), state["holder"].encode())
        _write_state(run, state)


def push(run: RunFolder) -> None:
    """Copy what is new or changed, the newest checkpoint last; then drop all but the newest `output.keep` there.

    Raises:
        SetupError: the mirror cannot be written; what it held before is untouched.
        UsageError: another machine has taken the run over.
    """
    if run.mirror is None:
        return
    with _named(run):
        there, state = _listing(run.mirror), _state(run)
        if (holder := _holder(run)) not in ("", state["holder"]):
            raise UsageError(
                f"{run.mirror}: {holder.split()[0]} has taken this run over, so this machine stops; what it did is in "
                f"{run.path}. Let that one go on, or end it and run the same command again here"
            )
        names, copied = _names(run), state["files"]
        state["files"] = {name: copied[name] for name in names if name in copied}
        try:
            for name in names:
                stamp = _stamp(run.path / name)
                if copied.get(name) != stamp or there.get(name) != stamp[0]:
                    objects.write(objects.join(run.mirror, name), (run.path / name).read_bytes())
                    state["files"][name] = stamp
        finally:
            _write_state(run, state)
        if names and (newest := CHECKPOINT.fullmatch(names[-1])):
            _drop(run, there, newest[1])


def _drop(run: RunFolder, there: Mapping[str, int], newest: str) -> None:
    """Drop, of what was there before, older checkpoints than are kept, and what is torn or claims to be newer."""
    older = [name for name in _whole(there) if checkpoint.step_of(name) < checkpoint.step_of(newest)]
    kept = {newest, *older[max(0, len(older) + 1 - run.config.output.keep) :]}
    dropped = [name for name in there if (found := CHECKPOINT.fullmatch(name)) and found[1] not in kept]
    for name in sorted(dropped, key=lambda name: not name.endswith(checkpoint.NOTE)):
        objects.delete(objects.join(str(run.mirror), name))


class Copies:
    """Pushes in the background, one after the other, in the first worker of a run that has a mirror."""

    def __init__(self, run: RunFolder, *, first: bool) -> None:
        self._run = run
        self._pool = ThreadPoolExecutor(1, "cacheloom-mirror") if first and run.mirror else None
        self._last: Future[None] | None = None
        self._warning = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the last push: the machine may be about to go."""
        if self._pool is not None:
            self._pool.shutdown()
            for warning in self.news().values():
                LOG.warning("%s", warning)

    def start(self) -> None:
        """Push what is there now.

        Raises:
            UsageError: another machine has taken the run over.
        """
        if self._pool is not None:
            self._hear()
            self._last = self._pool.submit(push, self._run)

    def settle(self) -> None:
        """Wait until the push before has read its checkpoint, which a save may drop; one that hangs is not awaited."""
        if self._last is not None:
            wait([self._last], PATIENCE_S)

    def news(self) -> dict[str, str]:
        """A `warning`, once, when a push has failed: the folder has everything, and the next push takes it along.

        Raises:
            UsageError: another machine has taken the run over.
        """
        self._hear()
        warning, self._warning = self._warning, ""
        return {"warning": warning} if warning else {}

    def _hear(self) -> None:
        if self._last is not None and self._last.done():
            done, self._last = self._last, None
            try:
                done.result()
            except SetupError as error:
                self._warning = str(error)


@contextmanager
def _named(run: RunFolder) -> Iterator[None]:
    try:
        yield
    except (SetupError, OSError) as error:
        raise SetupError(
            f"output.mirror={run.config.output.mirror}: {error}. What {run.path} has, the next checkpoint or the same "
            "command copies; output.mirror= goes on without a mirror"
        ) from error


def _listing(mirror: str) -> dict[str, int]:
    """Size in bytes of every file by its name below the mirror."""
    return {uri[len(mirror) + 1 :]: size for uri, size in objects.listing(mirror)}


def _whole(there: Mapping[str, int]) -> list[str]:
    """Checkpoints that have their note, oldest first."""
    found = [match[1] for name in there if name.endswith(checkpoint.NOTE) and (match := CHECKPOINT.fullmatch(name))]
    return sorted(found, key=checkpoint.step_of)


def _names(run: RunFolder) -> list[str]:
    """What goes up, in this order: all but checkpoints, the newest checkpoint's parts, its note."""
    paths = (os.path.join(folder, file) for folder, _, files in os.walk(run.path) for file in files)
    names = sorted(name for path in paths if _travels(name := os.path.relpath(path, run.path)))
    newest = max(
        (found[1] for name in names if (found := CHECKPOINT.fullmatch(name))), key=checkpoint.step_of, default=""
    )
    parts = [name for name in names if newest and name.startswith(f"checkpoints/{newest}/")]
    return [
        *(name for name in names if not name.startswith("checkpoints/")),
        *sorted(parts, key=lambda name: name.endswith(checkpoint.NOTE)),
    ]


def _travels(name: str) -> bool:
    """Whether a file is copied; nothing that leads out of the folder is."""
    return all(
        part and not part.startswith(LEFT_OUT) and not part.endswith(checkpoint.ASIDE) for part in name.split("/")
    )


def _fetch(run: RunFolder, name: str, path: Path) -> None:
    objects.write(str(path), objects.read(objects.join(str(run.mirror), name)))


def _stamp(path: Path) -> list[int]:
    """What changes when a file does: its size in bytes and its time."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _holder(run: RunFolder) -> str:
    """Who works on the run, as the mirror says; empty where it does not."""
    return _note(objects.join(str(run.mirror), HOLDER)).decode()


def _state(run: RunFolder) -> dict[str, Any]:
    return dict(json.loads(_note(str(run.path / STATE)) or '{"holder": "", "files": {}}'))


def _note(uri: str) -> bytes:
    try:
        return objects.read(uri)
    except FileNotFoundError:
        return b""


def _write_state(run: RunFolder, state: Mapping[str, Any]) -> None:
    objects.write(str(run.path / STATE), json.dumps(state).encode())
