"""Nothing that a run started outlives it, whatever ended it: a watchdog in a session of its own ends what is left.

`guard()` puts a marker into the environment, which every process started from then on inherits (Ray's, Prefect's,
theirs in turn), and starts the watchdog. When the driver ends, by return, exception, SIGTERM or SIGKILL, the watchdog
sends SIGTERM to every process of this machine that carries the marker, and SIGKILL to what is left `TERM_S` later.
A process group would not do: Ray and Prefect put their processes into groups and sessions of their own.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil

MARKER = "CACHELOOM_SESSION"
KEEP_ENVIRON = "SPT_NOENV"  # setproctitle, which Ray uses, would otherwise write its titles over /proc/PID/environ
WATCH_S = 0.5
TERM_S = 3.0
KILL_S = 4.0  # detection + TERM_S + KILL_S stay below the promised 10 s
POLL_S = 0.1

_to_watchdog: int | None = None


@contextlib.contextmanager
def guard() -> Iterator[None]:
    """Everything started inside is gone within 10 seconds of the end of this process or of the `with` block.

    Inside a process that carries the marker already (a nested call, a worker of ours) this does nothing: the outer
    guard sees to it. A child that is given an environment without the marker is out of reach, and so are other
    machines: Ray itself ends a job there when its driver is gone.
    """
    if MARKER in os.environ:
        yield
        return
    global _to_watchdog
    token = uuid.uuid4().hex
    reading, writing = os.pipe()
    watchdog = _start(token, reading)
    os.close(reading)
    owner = os.getpid()
    before = os.environ.get(KEEP_ENVIRON)
    os.environ.update({MARKER: token, KEEP_ENVIRON: "1"})
    _to_watchdog = writing
    try:
        yield
    finally:
        if os.getpid() == owner:  # not in a forked child that unwinds
            _to_watchdog = None
            os.environ.pop(MARKER, None)
            if before is None:
                os.environ.pop(KEEP_ENVIRON, None)
            os.close(writing)
            watchdog.wait()


def end(token: str, *, also: frozenset[psutil.Process] = frozenset()) -> list[int]:
    """End every process that carries the marker `token`, its descendants and `also`; returns the ids still alive."""
    known = set(also)
    asked: set[psutil.Process] = set()
    started = time.monotonic()
    while True:
        alive = _alive(token, known)
        known |= alive
        spent_s = time.monotonic() - started
        if not alive or spent_s > TERM_S + KILL_S:
            return sorted(process.pid for process in alive)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if spent_s > TERM_S:
                    process.kill()
                elif process not in asked:
                    process.terminate()
        asked |= alive
        time.sleep(POLL_S)


def _alive(token: str, known: set[psutil.Process]) -> set[psutil.Process]:
    """Living processes that carry the marker or were known, and all that descend from them."""
    parents: dict[psutil.Process, int] = {}
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            parents[process] = process.ppid()
            if process in known or process.environ().get(MARKER) == token:
                found.add(process)
    fresh = found
    while fresh:
        ids = {process.pid for process in fresh}
        fresh = {process for process, parent in parents.items() if parent in ids} - found
        found = found | fresh
    return found


def _start(token: str, reading: int) -> subprocess.Popen[bytes]:
    # By path and with -P: neither the working directory nor our own folder can shadow what it imports.
    command = [sys.executable, "-P", str(Path(__file__).resolve()), token, str(reading), str(os.getpid())]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        command, pass_fds=(reading,), stdin=quiet, stdout=quiet, stderr=quiet, cwd="/", start_new_session=True
    )


def _after_fork() -> None:
    # A forked child has the driver's /proc/PID/environ, without the marker: it reports itself instead. It must not
    # hold the pipe open either, or the watchdog would not see the driver end.
    global _to_watchdog
    if _to_watchdog is not None:
        with contextlib.suppress(OSError):
            os.write(_to_watchdog, b"%d\n" % os.getpid())
        os.close(_to_watchdog)
        _to_watchdog = None


def _watch(token: str, reading: int, *, driver: int) -> None:
    """Wait until the driver is gone or has closed its end of the pipe, then end what it left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    forked: set[psutil.Process] = set()
    buffer = b""
    while os.getppid() == driver:
        if not select.select([reading], [], [], WATCH_S)[0]:
            continue
        received = os.read(reading, 4096)
        if not received:
            break
        *lines, buffer = (buffer + received).split(b"\n")
        for line in lines:
            with contextlib.suppress(psutil.NoSuchProcess):
                forked.add(psutil.Process(int(line)))
    end(token, also=frozenset(forked))


os.register_at_fork(after_in_child=_after_fork)

if __name__ == "__main__":
    _watch(sys.argv[1], int(sys.argv[2]), driver=int(sys.argv[3]))
