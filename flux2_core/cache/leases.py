"""Leases: who uses which rows of a cache and until when, written in the cache itself, where anybody's `gc` reads them.

`cache` takes one before it looks for its rows and gives it back when an index names them; `train` takes one for as long
as its run is unfinished. While they work a thread renews it. One whose holder was killed, or whose run was interrupted,
runs out by itself after `LEASE_S`, long enough for clocks of two machines to differ by a day.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import psutil

from flux2_core.cache import sealed
from flux2_core.config.sections import Config
from flux2_core.errors import CacheloomError
from flux2_core.run.folder import RunFolder
from flux2_core.store import objects
from flux2_core.store.hashing import digest

FOLDER = "leases"
LEASE_S = 7 * 86400.0
RENEW_S = 600.0
RUN, USER, NODE, PID, WORK, UNTIL, RENEWED = "run", "user", "node", "pid", "work", "until", "renewed"
LOG = logging.getLogger(__name__)


class Lease:
    """One lease that this process holds and renews."""

    def __init__(self, config: Config, work: str, names: Mapping[str, Any]) -> None:
        """Take it.

        Args:
            config: says which cache, and which run.
            work: `cache` or `train`; a run has one lease of each.
            names: what must stay, in the words of an index: `samples`, `texts`, and for `train` the tables' versions.

        Raises:
            SetupError: the cache cannot be written.
        """
        run = str(RunFolder(config).path)
        self.uri = objects.join(config.output.cache, FOLDER, f"{work}-{digest([run, platform.node()])[:24]}.json")
        self._tree = {RUN: run, USER: _user(), NODE: platform.node(), PID: os.getpid(), WORK: work, **names}
        self._ended = threading.Event()
        self._renew()
        self._thread = threading.Thread(target=self._keep, name="cacheloom-lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give it back, unless another process has taken it for the same run meanwhile."""
        self.leave()
        with contextlib.suppress(FileNotFoundError):
            if sealed.read(self.uri)[PID] == os.getpid():
                objects.delete(self.uri)

    def leave(self) -> None:
        """Stop renewing it; it stays until it has run out."""
        self._ended.set()
        self._thread.join()

    def _renew(self) -> None:
        now = time.time()
        objects.write(self.uri, sealed.encode({**self._tree, RENEWED: now, UNTIL: now + LEASE_S}))

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_S):
            try:
                self._renew()
            except (CacheloomError, OSError) as error:  # the next one may pass: a lease lasts a thousand renewals
                LOG.warning("%s could not be renewed: %s", self.uri, error)


@contextlib.contextmanager
def held(config: Config, work: str, names: Mapping[str, Any]) -> Iterator[None]:
    """Hold a lease inside; it is given back where the work is done, and runs out where it was broken off."""
    lease = Lease(config, work, names)
    try:
        yield
    except BaseException:
        lease.leave()
        raise
    lease.release()


def read(cache: str, *, now: float) -> tuple[list[dict[str, Any]], list[str]]:
    """(leases that hold, URIs of those that have run out) of a cache.

    Raises:
        DataError: a lease is damaged, so that what it holds cannot be known.
    """
    holding, over = [], []
    for uri, _ in objects.listing(objects.join(cache, FOLDER)):
        try:
            tree = sealed.read(uri)
        except FileNotFoundError:  # given back since the listing
            continue
        if tree[UNTIL] > now:
            holding.append(tree)
        else:
            over.append(uri)
    return holding, over


def at_work(lease: Mapping[str, Any]) -> bool:
    """Whether its holder may still be working: of another machine's nothing is known but the lease."""
    return lease[NODE] != platform.node() or psutil.pid_exists(lease[PID])


def told(lease: Mapping[str, Any]) -> str:
    """A lease in words."""
    until = time.strftime("%Y-%m-%d %H:%M", time.localtime(lease[UNTIL]))
    return f"{lease[WORK]} of {lease[RUN]} by {lease[USER]} on {lease[NODE]}, until {until}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())
