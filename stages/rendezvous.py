"""Rendezvous: how the training workers find each other, at one address of the first one's machine.

torch's store asks nobody for a password, and by itself listens on every interface (torch 2.13). Here it is handed a
socket that listens at the address which Ray uses there: loopback in a cluster of our own, else the cluster's network.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, and in no __all__

_OFFERED: list[TCPStore] = []  # of this process; the group lives as long as it


def meet(workers: Any, config: TorchConfig) -> None:
    """Join the workers of a group in torch's process group, over NCCL where they have GPUs, else over gloo."""
    backend = "nccl" if workers.get_resources_per_worker().get("GPU") else "gloo"
    host, port = workers.execute_single(0, _offer, timeout_s=config.timeout_s)
    workers.execute(_set_torch_distributed_env_vars)
    place = {"world": len(workers), "host": host, "port": port, "timeout_s": config.timeout_s}
    ray.get(
        [
            workers.execute_single_async(number, _join, backend=backend, number=number, **place)
            for number in range(len(workers))
        ]
    )


def _offer(*, timeout_s: float) -> tuple[str, int]:
    """In worker 0: listen, and say where."""
    host = ray.util.get_node_ip_address()
    listening = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port = listening.getsockname()[1]
    _OFFERED[:] = [
        TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listening.detach(),
        )
    ]
    return host, port


def _join(*, backend: str, number: int, world: int, host: str, port: int, timeout_s: float) -> None:
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # as Ray does: a lost peer ends the others
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(host, port, wait_for_workers=False, timeout=timeout) if number else _OFFERED[0]
    dist.init_process_group(backend, store=store, rank=number, world_size=world, timeout=timeout)
