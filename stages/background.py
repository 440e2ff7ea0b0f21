"""Work beside the main thread, which stays free for Ctrl-C and for Prefect's cancelling."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")
Second = TypeVar("Second")


def start(work: Callable[[], T], *, name: str) -> Future[T]:
    """Run work in a daemon thread: cancelled or interrupted, Ray is ended under it, and nobody waits for it then.

    It sees the caller's context: progress that it tells of is shown where the caller shows it.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised in the thread that asks for the result
            future.set_exception(error)

    threading.Thread(target=copy_context().run, args=(run,), name=f"cacheloom-{name}", daemon=True).start()
    return future


def both(first: Callable[[], T], second: Callable[[], Second]) -> tuple[T, Second]:
    """Run two pieces of work side by side; where one fails, the other is finished before its error is raised."""
    one, other = start(first, name="first"), start(second, name="second")
    for future in (one, other):
        future.exception()  # waits, and leaves raising to the line below
    return one.result(), other.result()
