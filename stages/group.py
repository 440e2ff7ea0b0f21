"""Group: training workers on several devices or machines, driven by Ray Train.

Ray Train restarts the group when a worker or node is lost; the workers then go on from the newest checkpoint. With
`cluster.min_workers` the new group takes the machines that there are, and a later one those that came back.
The workers meet at one address of the first one's machine: torch's store asks nobody for a password, and by itself
listens on every interface (torch 2.13). Here it is handed a socket that listens at the address which Ray uses there:
loopback in a cluster of our own, else the cluster's network.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import socket
import uuid
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import ray
import torch.distributed as dist
from ray.exceptions import RayTaskError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, and in no __all__

from flux2_core.config.sections import Config
from flux2_core.errors import CacheloomError, SetupError
from flux2_core.run.folder import RunFolder
from stages import background, cluster, notice, vitals
from stages.relay import AGAIN, LEAVE_S, Place, Progress, Relay, Work

NODE = "ray.io/node-id"  # a label that Ray gives every node
RAY_STATE = ".ray"  # Ray Train's own notes; our checkpoints are in checkpoints/
REGROW_S = 60.0  # how often an elastic group that runs looks for machines that came back; growing costs a restart

_OFFERED: list[TCPStore] = []  # of this process; the group lives as long as it


def fit(config: Config, work: Work, inputs: dict[str, Any], progress: Progress, leave: Callable[[], None]) -> None:
    """Train in `cluster.workers` workers, which each do `work` from the same inputs.

    `leave` asks them to end after their step; they are given `LEAVE_S` for that where this is interrupted.

    Raises:
        CacheloomError: what a worker refused.
        SetupError: they failed more often than `cluster.retries` allows.
    """
    folder, name = RunFolder(config), f"{config.run}-{uuid.uuid4().hex[:8]}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    lasting = {"max_restarts": -1, "max_task_retries": -1}  # what it had not handed on is in metrics.jsonl
    relay = ray.remote(num_cpus=0, scheduling_strategy=here, **lasting)(Relay).remote()  # other nodes may go
    loop = functools.partial(_placed, work, relay)
    try:
        for attempt in itertools.count():
            trainer = _trainer(
                config,
                loop,
                inputs,
                RunConfig(
                    name=f"{name}-{attempt}",
                    storage_path=str(folder.path / RAY_STATE),
                    failure_config=FailureConfig(max_failures=config.cluster.retries),
                ),
            )
            if watched(trainer, relay, progress, leave):
                return
    finally:
        shutil.rmtree(folder.path / RAY_STATE, ignore_errors=True)


def _trainer(config: Config, loop: Any, inputs: dict[str, Any], run: RunConfig) -> TorchTrainer:
    workers, fewest = config.cluster.workers, config.cluster.min_workers
    on_gpus = cluster.gpus(nodes := cluster.training_nodes(config.cluster)) > 0
    kept_off = {node["NodeID"] for node in cluster.alive()} - {node["NodeID"] for node in nodes}
    return TorchTrainer(
        loop,
        train_loop_config=inputs,
        torch_config=Heeding(),
        scaling_config=ScalingConfig(
            num_workers=workers if fewest is None else (fewest, workers),
            elastic_resize_monitor_interval_s=REGROW_S,
            use_gpu=on_gpus,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if on_gpus else {})},
            label_selector={NODE: f"!in({','.join(sorted(kept_off))})"} if kept_off else None,
        ),
        run_config=run,
    )


def watched(trainer: TorchTrainer, relay: Any, progress: Progress, leave: Callable[[], None] = lambda: None) -> bool:
    """Whether the run is done; else a machine was taken away with notice, which counts as no failure.

    Raises:
        CacheloomError: what a worker refused.
        SetupError: the workers failed.
    """
    fitting = background.start(trainer.fit, name="fit")
    ended = trains = False
    try:
        while not ended:
            ended = bool(wait([fitting], timeout=0.5).done)
            vitals.look()
            records, failed, gone = vitals.get(relay.take.remote(), of="that hears of the progress")
            for record in records:
                progress(record)
                trains = trains or "step" in record
    except KeyboardInterrupt:
        if trains:
            leave()
            wait([fitting], timeout=LEAVE_S)
        raise
    error = fitting.exception()
    if failed:
        raise failed from error
    if isinstance(error, TrainingFailedError | RayTaskError):
        if gone:
            return False
        raise SetupError(*f"training ended: {error}; {AGAIN}".splitlines()) from error
    fitting.result()
    return True


class _Told:
    """The relay as a worker of the group reaches it: the first one tells of its steps."""

    def __init__(self, relay: Any, *, first: bool) -> None:
        self.relay, self.first = relay, first

    def put(self, record: dict[str, Any]) -> None:
        if self.first:
            self.relay.put.remote(record)

    def fail(self, error: CacheloomError) -> None:
        ray.get(self.relay.fail.remote(error))

    def go(self) -> None:
        ray.get(self.relay.go.remote())


def _placed(work: Work, relay: Any, inputs: dict[str, Any]) -> None:
    """In each worker: do the work in the place that Ray Train gives it."""
    context = ray.train.get_context()
    rank, world, beside = context.get_world_rank(), context.get_world_size(), context.get_local_world_size()
    told = _Told(relay, first=rank == 0)
    work(inputs, Place(rank, world, beside, get_device(), told, _noticed))


def _noticed() -> bool:
    return notice.told() or get_train_context().preemption_context.preemption_info is not None


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        meet(worker_group, backend_config)
        worker_group.execute(notice.listen)


@dataclass
class Heeding(TorchConfig):
    """Torch's process group, in workers that listen."""

    @property
    def backend_cls(self) -> type[_Backend]:
        """What starts the workers."""
        return _Backend


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


def _interface() -> str | None:
    """The network interface that has this node's address in Ray.

    By itself gloo takes that of the machine's name, which leads to loopback on many (Debian writes 127.0.1.1 into
    /etc/hosts), where no other machine finds it (torch 2.13).
    """
    here = ray.util.get_node_ip_address()
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, known in interfaces if here in {each.address for each in known}), None)


def _join(*, backend: str, number: int, world: int, host: str, port: int, timeout_s: float) -> None:
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # as Ray does: a lost peer ends the others
    if interface := _interface():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(host, port, wait_for_workers=False, timeout=timeout) if number else _OFFERED[0]
    dist.init_process_group(backend, store=store, rank=number, world_size=world, timeout=timeout)
