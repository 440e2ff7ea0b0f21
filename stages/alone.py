"""Alone: the one training worker of this machine, which the driver asks itself.

Ray Train would put a controller and five actors beside it, of which each imports Ray Train, and our relay: 11.5 CPU-s
and 0.9 GB before the first step (Ray 2.60). What a group survives this one does too: a worker that dies, raises or
hangs is replaced by another process, which goes on from the newest checkpoint, `cluster.retries` times; a notice that
the machine goes counts as no failure.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayError

from flux2_core.errors import SetupError
from stages import background, cluster, notice, vitals
from stages.relay import AGAIN, LEAVE_S, Place, Progress, Relay, Work

HANGS = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"  # what a group goes by too, and its default in seconds
HANGS_S = 600.0
TAKE_S = 0.5  # for records to come together


class RayTrainWorker(Relay):
    """Actor: the worker, in a thread of its own, and what it tells; its process is called as those of a group are."""

    training: Future[None]

    def start(self, work: Work, inputs: dict[str, Any]) -> None:
        """Begin; called in the main thread."""
        notice.listen()
        place = Place(0, 1, 1, torch.device(cluster.device()), self, notice.told)
        self.training = background.start(lambda: work(inputs, place), name="train")

    def news(self) -> tuple[Any, str | None]:
        """What was told (`take`), and how the training has ended: "" where it is done, None where it goes on."""
        ended = bool(wait([self.training], timeout=TAKE_S).done)  # before the rest is taken
        error = self.training.exception() if ended else None
        raised = "".join(traceback.format_exception(error)).rstrip() if error else ""
        told = f"the worker that trains raised an error\n{raised}" if raised else ""
        return self.take(), told if ended else None


def fit(work: Work, inputs: dict[str, Any], *, retries: int, progress: Progress, leave: Callable[[], None]) -> None:
    """Have one worker do `work` on this machine, in another process after each failure.

    `leave` asks it to end after its step; it is given `LEAVE_S` for that where this is interrupted.

    Raises:
        CacheloomError: what the worker refused.
        SetupError: it failed more often than `retries` allows, or what Ray stands on has ended.
    """
    failures = 0
    while failures <= retries:
        if not (failed := _attempt(work, inputs, progress, leave)):
            return
        told, gone = failed
        failures += not gone
    raise SetupError(*f"training ended: {told}; {AGAIN}".splitlines())


def _attempt(
    work: Work, inputs: dict[str, Any], progress: Progress, leave: Callable[[], None]
) -> tuple[str, bool] | None:
    """How a worker failed, and whether it was its machine that goes; None where it is done."""
    worker = ray.remote(**cluster.device_options())(RayTrainWorker).remote()
    trains = False
    try:
        _answer(worker.start.remote(work, inputs))
        while True:
            (records, failed, gone), ended = _answer(worker.news.remote())
            for record in records:
                progress(record)
                trains = trains or "step" in record
            if failed:
                raise failed
            if ended is not None:
                return (ended, gone) if ended else None
    except KeyboardInterrupt:
        if trains:
            leave()
            _await_end(worker)
        raise
    except RayActorError as error:
        vitals.settle()
        return f"the worker that trains has ended{vitals.why(error)}", False
    except TimeoutError as error:
        return str(error), False
    finally:
        vitals.kill(worker)


def _await_end(worker: Any) -> None:
    """Give a worker that was asked to leave the time that it needs."""
    until_s, ended = time.monotonic() + LEAVE_S, None
    with suppress(RayError):  # it is ended either way
        while ended is None and time.monotonic() < until_s:
            _, ended = ray.get(worker.news.remote(), timeout=LEAVE_S)


def _answer(call: Any) -> Any:
    """What the worker answers.

    Raises:
        RayActorError: it has ended.
        TimeoutError: it does not answer.
    """
    patience_s = float(os.environ.get(HANGS, HANGS_S))
    until_s = time.monotonic() + patience_s
    while not ray.wait([call], timeout=vitals.LOOK_S)[0]:
        vitals.look()
        if time.monotonic() > until_s:
            raise TimeoutError(f"the worker has not answered for {patience_s:.0f} s")
    return ray.get(call)
