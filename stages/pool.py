"""Actors that pull work: one item in flight each, so a slow one never holds the rest.

A dead actor is replaced and its item given to another. An item that ends two is cut into single things, and a thing
that ends two more is set aside: the rest is done, then one error names it. Two pools may run at once on too few
devices: each asks for one device at a time and gives it back when no work is left, so they take turns on a single one
and share several. Chosen over Ray Data (which retries a poisoned shard for ever) and ActorPool (which loses a dead
actor's item).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from flux2_core.errors import CacheloomError, SetupError
from stages import vitals

ATTEMPTS = 2  # of an item, and of each of its things alone
SET_ASIDE = 3  # things; with more the fault is not theirs
IN_A_ROW = 8  # actors that end while no item is finished
NAMED, SHOWN = 3, 200  # things of an item that an error names, letters of each


@dataclass
class Job:
    """An item, a list of things; once an actor has ended over it, it is given to idle ones only, alone."""

    item: Any
    deaths: int = 0
    alone: bool = False


@dataclass(eq=False)
class Member:
    """An actor and what it has; not ready before it has its device."""

    actor: Any
    ready: bool = False
    jobs: list[Job] = field(default_factory=list)


@dataclass
class Pool:
    """What runs now: each call and the job that it is for, if any; and what waits."""

    make: Callable[[], Any]
    actors: int
    ahead: int
    waiting: deque[Job]
    members: list[Member] = field(default_factory=list)
    calls: dict[Any, tuple[Member, Job | None]] = field(default_factory=dict)
    aside: list[str] = field(default_factory=list)
    ended: int = 0

    def staff(self) -> None:
        """Start with half of the actors, so that another pool gets devices too; then ask for one at a time."""
        there, starting = len(self.members), sum(not member.ready for member in self.members)
        wanted = min(self.actors, sum(bool(member.jobs) for member in self.members) + len(self.waiting))
        for _ in range(max(-(-wanted // 2) - there, min(1 - starting, wanted - there))):
            self.members.append(member := Member(self.make()))
            self.calls[member.actor.ready.remote()] = member, None

    def assign(self, member: Member) -> None:
        """Give an actor what it may have; one that has nothing stores what it holds, and frees its device."""
        while self.waiting and len(member.jobs) < self.ahead and not any(job.alone for job in member.jobs):
            if self.waiting[0].alone and member.jobs:
                break
            job = self.waiting.popleft()
            member.jobs.append(job)
            self.calls[member.actor.work.remote(job.item)] = member, job
        if not member.jobs:
            self.members.remove(member)
            self.calls[member.actor.close.remote()] = member, None
        if not self.waiting:
            for call, (other, _) in list(self.calls.items()):
                if other in self.members and not other.ready:  # it shall not take a device now
                    ray.kill(other.actor)
                    self.members.remove(other)
                    del self.calls[call]

    def bury(self, member: Member, error: RayActorError) -> None:
        """An actor has ended by itself; what it had goes to others."""
        self.calls = {call: entry for call, entry in self.calls.items() if entry[0] is not member}
        if member in self.members:
            self.members.remove(member)
        self.ended += 1
        if self.ended == IN_A_ROW:
            raise SetupError(
                f"{IN_A_ROW} workers in a row ended before they finished anything{vitals.why(error)}; look at the "
                "memory of the machine and of its devices, and at Ray's logs"
            ) from error
        for job in reversed(member.jobs):
            job.deaths, job.alone = job.deaths + 1, True
            if job.deaths < ATTEMPTS:
                self.waiting.appendleft(job)
            elif isinstance(job.item, list) and len(job.item) > 1:
                self.waiting.extendleft(Job([thing], alone=True) for thing in reversed(job.item))
            else:
                self.aside.append(name(job.item))
                if len(self.aside) == SET_ASIDE:
                    raise self.refusal(vitals.why(error)) from error

    def refusal(self, why: str = "") -> SetupError:
        """What is to be said of the things that were set aside."""
        return SetupError(
            f"these ended every worker that had them, alone too: {', '.join(self.aside)}{why}; remove them or give the "
            "machine more memory, and run the same again: all else is kept"
        )


def run(make: Callable[[], Any], items: Iterable[Any], *, actors: int, ahead: int = 1) -> Iterator[Any]:
    """Yield the result of `actor.work(item)` for every item, in the order of completion.

    An actor gets its first item when its `ready()` has answered, so one that still waits for a device holds no work;
    then it has up to `ahead` items at a time. It is told to `close()` when nothing waits; what it buffered is stored
    only then. One that ends while it closes is no error here: the table shows what is missing.

    Raises:
        CacheloomError: one of ours, raised inside an actor; or another exception there, with the item's name.
        SetupError: actors ended again and again; names the things that they had.
    """
    pool = Pool(make, actors, ahead, deque(Job(item) for item in items))
    with vitals.asking():
        try:
            while pool.waiting or pool.calls:
                pool.staff()
                finished, _ = ray.wait(list(pool.calls), num_returns=1, timeout=vitals.LOOK_S)
                vitals.look()
                if not finished:
                    continue
                (done,) = finished
                member, job = pool.calls.pop(done)
                try:
                    result = _result(done, job)
                except RayActorError as error:
                    pool.bury(member, error)
                    continue
                if member not in pool.members:  # it has closed
                    ray.kill(member.actor)
                    continue
                member.ready = True
                if job is not None:
                    member.jobs.remove(job)
                    pool.ended = 0
                pool.assign(member)
                if job is not None:
                    yield result
        finally:
            for member in {member for member, _ in pool.calls.values()}:
                vitals.kill(member.actor)
    if pool.aside:
        raise pool.refusal()


def name(item: Any) -> str:
    """An item as a person knows it: the pictures or the texts in it."""
    things = item if isinstance(item, list) else [item]
    rest = f" and {len(things) - NAMED} more" if len(things) > NAMED else ""
    return ", ".join(repr(str(thing)[:SHOWN]) for thing in things[:NAMED]) + rest


def _result(call: Any, job: Job | None) -> Any:
    try:
        return ray.get(call)
    except RayTaskError as error:
        if isinstance(error.cause, CacheloomError):
            raise error.cause from None
        what = name(job.item) if job else "a worker that begins or closes"
        said = f"{what}: {type(error.cause).__name__}: {error.cause}"
        if "OutOfMemory" in type(error.cause).__name__:
            raise SetupError(f"{said}; use a device with more memory, or smaller data[].resolutions") from error
        raise CacheloomError(f"{said}; this is unexpected: Ray's logs have the traceback") from error
