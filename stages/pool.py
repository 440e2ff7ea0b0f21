"""Actors that pull work: one item in flight each, so a slow one never holds the rest.

A dead actor is replaced and its item given to another; an item that kills three actors stops the run and is named.
Chosen over Ray Data (which retries a poisoned shard for ever) and ActorPool (which loses a dead actor's item).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from flux2_core.errors import CacheloomError, SetupError

ATTEMPTS = 3


@dataclass
class Job:
    """An item and how often it was tried."""

    item: Any
    attempts: int = 0


def run(make: Callable[[], Any], items: Iterable[Any], *, actors: int) -> Iterator[Any]:
    """Yield the result of `actor.work(item)` for every item, in the order of completion.

    An actor gets its first item when its `ready()` has answered, so one that still waits for a device holds no work.
    Each one that worked is told to `close()` at the end; work counts only after that (what it buffered is then stored).

    Raises:
        CacheloomError: one of ours, raised inside an actor.
        SetupError: an item ended several actors.
    """
    waiting = deque(Job(item) for item in items)
    pool = [make() for _ in range(min(actors, len(waiting)))]
    running: dict[Any, tuple[Any, Job | None]] = {actor.ready.remote(): (actor, None) for actor in pool}
    worked: list[Any] = []
    try:
        while waiting or any(job for _, job in running.values()):
            (done,), _ = ray.wait(list(running), num_returns=1)
            actor, job = running.pop(done)
            try:
                result = _result(done)
            except RayActorError as error:
                if job is not None:
                    _count(job, error)
                    waiting.appendleft(job)
                pool[pool.index(actor)] = actor = make()
                running[actor.ready.remote()] = actor, None
                continue
            if job is not None:
                worked.append(actor)
                yield result
            if waiting:
                job = waiting.popleft()
                running[actor.work.remote(job.item)] = actor, job
        for closing in [actor.close.remote() for actor in pool if actor in worked]:
            _result(closing)
    finally:
        for actor in pool:
            ray.kill(actor)


def _count(job: Job, error: RayActorError) -> None:
    job.attempts += 1
    if job.attempts == ATTEMPTS:
        raise SetupError(f"{ATTEMPTS} workers ended while they had {_short(job.item)}: {error}") from error


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, CacheloomError):
            raise error.cause from None
        raise


def _short(item: Any) -> str:
    text = repr(item)
    return text if len(text) < 200 else text[:200] + "..."
