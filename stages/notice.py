"""Notice that a machine is about to go: SIGTERM to a training worker, or a node that Ray drains.

Ray runs the training in a thread, where Python allows no signal handlers: the backend installs ours in each worker's
main thread. A worker that was told writes its step and a checkpoint, and ends; nothing of it is lost.
"""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.execution.context import get_train_context

from stages import rendezvous

_TOLD = threading.Event()


def noticed() -> bool:
    """Whether this worker's machine is about to go; called in the training thread."""
    return _TOLD.is_set() or get_train_context().preemption_context.preemption_info is not None


def listen() -> None:
    """Heed SIGTERM from now on, once: a second one ends the process. Called in a worker's main thread."""
    _TOLD.clear()
    signal.signal(signal.SIGTERM, _heed)


def _heed(number: int, _frame: Any) -> None:
    if _TOLD.is_set():
        os._exit(128 + number)
    _TOLD.set()


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        rendezvous.meet(worker_group, backend_config)
        worker_group.execute(listen)


@dataclass
class Heeding(TorchConfig):
    """Torch's process group, in workers that listen."""

    @property
    def backend_cls(self) -> type[_Backend]:
        """What starts the workers."""
        return _Backend
