"""Notice that a machine is about to go: SIGTERM to a training worker; of a node that Ray drains `stages.group` hears.

The training runs in a thread, where Python allows no signal handlers: ours is installed in each worker's main thread.
A worker that was told writes its step and a checkpoint, and ends; nothing of it is lost.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

_TOLD = threading.Event()


def told() -> bool:
    """Whether this worker was told to go; called in the training thread."""
    return _TOLD.is_set()


def listen() -> None:
    """Heed SIGTERM from now on, once: a second one ends the process. Called in a worker's main thread."""
    _TOLD.clear()
    signal.signal(signal.SIGTERM, _heed)


def _heed(number: int, _frame: Any) -> None:
    if _TOLD.is_set():
        os._exit(128 + number)
    _TOLD.set()
