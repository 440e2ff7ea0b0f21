"""Vitals: what a run's Ray stands on, looked at by whoever waits for Ray, so that its end is told within seconds.

Ray by itself tries for a minute to reach a GCS that has ended and then ends the driver without a word of ours; of a
raylet that ended it tells page by page, as of so many lost actors (Ray 2.60).
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import psutil
import ray
from ray._private import worker
from ray.exceptions import RayActorError, RayTaskError

from flux2_core.errors import CacheloomError, SetupError

LOG = logging.getLogger(__name__)
LOOK_S = 1.0
HANGS_S = 5.0  # for whoever asks Ray to see it too; what creates or ends an actor waits for a dead head for ever
PATIENCE_S = 8.0  # of a head that does not answer: on a busy machine, or while it moves to another one
# How long Ray's own part of this process puts up with that: it is asked no more, and a finished run is still exported.
os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "3600")
GO_ON = "run the same command again to go on: what was encoded and saved is kept"


class Vitals:
    """Of the cluster that this process has joined or started."""

    def __init__(self) -> None:
        self.address = ray.get_runtime_context().gcs_address
        self.node = worker._global_node
        self.raylet = _raylet(self.node.raylet_socket_name)
        self.answered_s = time.monotonic()
        self.dead = ""
        """What has ended, in words; `watch` finds out."""
        self.asking: set[object] = set()
        self.left = threading.Event()

    def examine(self, *, patience_s: float = PATIENCE_S) -> str:
        """What has ended, in words; nothing where all of it is there."""
        if self.raylet and not _lives(self.raylet):
            return f"Ray's raylet on this machine has ended (process {self.raylet.pid}); {GO_ON}"
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=LOOK_S).close()
            self.answered_s = time.monotonic()
        except OSError as error:
            if time.monotonic() - self.answered_s >= patience_s:
                return f"Ray's head at {self.address} does not answer any more ({error}); {GO_ON}"
        return ""

    def watch(self) -> None:
        """Find out what has ended; end the process where somebody asks it and does not come back to see it himself."""
        while not self.dead and not self.left.wait(LOOK_S):
            self.dead = self.examine()
        while not self.left.is_set():
            asked = set(self.asking)
            if not self.left.wait(HANGS_S) and asked & self.asking:
                error = SetupError(self.dead)
                os.write(2, f"cacheloom: {error}\n".encode())
                os._exit(error.exit_code)

    def leave(self) -> None:
        """End the connection, and the cluster where it is ours; a dead one without a farewell, which takes a minute."""
        self.left.set()
        if self.dead or self.examine(patience_s=0):
            atexit.unregister(ray.shutdown)
            self.node.kill_all_processes(check_alive=False)
        else:
            ray.shutdown()


_now: Vitals | None = None


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Look after the cluster that is connected, as long as it is, and end the connection."""
    global _now
    if worker._global_node is None:  # of Ray's client (ray://): a proxy stands between, and neither is within reach
        try:
            yield
        finally:
            ray.shutdown()
        return
    _now = Vitals()
    threading.Thread(target=_now.watch, name="cacheloom-vitals", daemon=True).start()
    worker.print_to_stdstream = _log  # of a dead raylet it prints the last page of its log, among our own lines
    try:
        yield
    finally:
        leaving, _now = _now, None
        leaving.leave()


@contextlib.contextmanager
def asking() -> Iterator[None]:
    """For all that asks Ray for something: where its head has ended, that may not return, and the process ends."""
    asked, now = object(), _now
    if now is not None:
        now.asking.add(asked)
    try:
        yield
    finally:
        if now is not None:
            now.asking.discard(asked)


def look() -> None:
    """See whether what Ray stands on here was there a moment ago; nothing happens where nobody watches.

    Raises:
        SetupError: it is not; says what has ended.
    """
    if _now is not None and _now.dead:
        raise SetupError(_now.dead)


def get(call: Any, *, of: str) -> Any:
    """The result of a call of an actor; `of` says in an error which one it is ("that draws").

    Raises:
        CacheloomError: one of ours, raised there.
        SetupError: the actor, or what Ray stands on, has ended.
    """
    while not ray.wait([call], timeout=LOOK_S)[0]:
        look()
    try:
        return ray.get(call)
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, CacheloomError) else error from None
    except RayActorError as error:
        raise ended(f"the worker {of} has ended", error) from error


def settle() -> None:
    """Wait until it would be known if more had died than the actor that just did.

    Raises:
        SetupError: more has.
    """
    until_s = time.monotonic() + 2 * LOOK_S  # it dies a little later than is heard of it, and is found out later still
    while time.monotonic() < until_s:
        look()
        time.sleep(LOOK_S / 10)


def ended(told: str, error: RayActorError) -> SetupError:
    """An error for what a dead actor was for, unless more has died than the actor."""
    try:
        settle()
    except SetupError as more:
        return more
    return SetupError(
        f"{told}{why(error)}; look at the memory of the machine and of its device, and at Ray's logs; {GO_ON}"
    )


def why(error: RayActorError) -> str:
    """The line of Ray's report that tells how an actor's process ended, in brackets."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if re.search(r"exit|oom|memory|signal", line, re.IGNORECASE)]
    return f" ({(told or lines)[0][:300]})"


def kill(actor: Any) -> None:
    """End an actor; in a dead cluster it is left to its own end."""
    with contextlib.suppress(SetupError):
        look()
        ray.kill(actor)


def _log(told: Mapping[str, Any], **_: bool) -> None:
    for line in told["lines"]:
        LOG.info("Ray: %s", line)


def _raylet(socket_name: str) -> psutil.Process | None:
    """This machine's raylet, by the socket that we talk to it through."""
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "raylet" and any(socket_name in word for word in process.info["cmdline"] or ()):
            return process
    return None


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
