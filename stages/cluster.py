"""Ray for one run: start it here or join a running cluster, and leave nothing behind."""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from ray.exceptions import AuthenticationError

from flux2_core import accelerator
from flux2_core.config.sections import Cluster, Config
from flux2_core.errors import SetupError
from flux2_core.model.folder import ModelFolder
from flux2_core.store import objects
from stages import embedded, vitals

ATTEMPTS = "RAY_gcs_server_port_wait_time_s"  # to join: Ray makes 20, each 1 s with a wrong token, 40 s where no Ray is
THREADS = "OMP_NUM_THREADS"
KNOCK_S = 3.0  # a lost packet is sent again after 1 s


@contextmanager
def connect(cluster: Cluster) -> Iterator[None]:
    """Have Ray inside; an already connected process (an outer `connect`) keeps its connection.

    Raises:
        SetupError: the cluster at `cluster.address` does not answer.
    """
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    warnings.filterwarnings("ignore", message="lance is not fork-safe")  # Ray forks only to execute
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with ExitStack() as stack:
        try:
            if cluster.address:
                knock(cluster)
                with embedded.environment({ATTEMPTS: "1"}):
                    ray.init(address=cluster.address, **quiet)
                stack.enter_context(vitals.watched())
            else:
                cores = max(os.cpu_count() or 1, 2 * (cluster.encoders or 1), cluster.workers + 1)
                stack.enter_context(embedded.started(cores, **quiet))
        except (OSError, RuntimeError, ValueError, AuthenticationError) as error:
            raise _unreachable(cluster, error) from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray took it; Prefect cancels a flow run by it
        yield


def knock(cluster: Cluster) -> None:
    """See whether anything listens at `cluster.address`: `ray.init` itself tries for more than ten minutes (Ray 2.60).

    Raises:
        SetupError: nothing does.
    """
    host, _, port = (cluster.address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():  # `auto` and the like are found by Ray
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S).close()
        except OSError as error:
            raise _unreachable(cluster, error) from None


def _unreachable(cluster: Cluster, error: Exception) -> SetupError:
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return SetupError(
        f"cluster.address={cluster.address}: Ray does not answer ({said}); start it with `ray start --head`, give this "
        "command its token (RAY_AUTH_TOKEN_PATH), or leave cluster.address out to run here"
    )


def is_one_machine() -> bool:
    """Whether the cluster is this machine, as one of our own is."""
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]] == [ray.get_runtime_context().get_node_id()]


def alive() -> list[dict[str, Any]]:
    """The cluster's nodes, as Ray describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


def gpus(nodes: list[dict[str, Any]] | None = None) -> int:
    """GPUs of the cluster, or of some of its nodes."""
    return int(sum(node["Resources"].get("GPU", 0) for node in (alive() if nodes is None else nodes)))


def device_kind() -> str:
    """What the cluster's GPUs are called (`H200`), or `cpu`."""
    names = sorted(name.partition(":")[2] for name in ray.cluster_resources() if name.startswith("accelerator_type:"))
    return "+".join(names) if names and gpus() else "cpu"


def cpus() -> int:
    """Cores of the cluster, as Ray counts them."""
    return int(ray.cluster_resources().get("CPU", 1))


def encoders(cluster: Cluster) -> int:
    """Encoding actors per kind: as configured, else one per GPU of the nodes that encode, else one."""
    nodes = encoding_nodes(cluster)
    return cluster.encoders or max(1, int(min(gpus(nodes), sum(_room(cluster, node) for node in nodes))))


def encoding_nodes(cluster: Cluster) -> list[dict[str, Any]]:
    """Nodes on which encoders may be.

    Raises:
        SetupError: no node has what `cluster.encoder_resources` asks for.
    """
    if found := [node for node in alive() if _room(cluster, node)]:
        return found
    wanted = cluster.encoder_resources or {}
    raise SetupError(
        f"cluster.encoder_resources={wanted}: no node of the cluster has that; start one with "
        f"`ray start --resources='{json.dumps(wanted)}'`, or leave it out to encode anywhere"
    )


def training_nodes(cluster: Cluster) -> list[dict[str, Any]]:
    """Nodes on which training may be: with `cluster.encoder_resources` those that have none of that.

    Raises:
        SetupError: none of them has a core to train on.
    """
    if not cluster.encoder_resources:
        return alive()
    found = [node for node in alive() if not _room(cluster, node)]
    if not any(node["Resources"].get("CPU") for node in found):
        raise SetupError(
            f"cluster.encoder_resources={cluster.encoder_resources}: every node has that, and training goes to the "
            "others; leave it out to train on the same nodes"
        )
    return found


def _room(cluster: Cluster, node: dict[str, Any]) -> float:
    """Encoders that what a node has is enough for, its GPUs apart."""
    asked = cluster.encoder_resources or {}
    return min((node["Resources"].get(name, 0) // amount for name, amount in asked.items()), default=math.inf)


def see(path: str) -> None:
    """Make sure that this node sees a folder that the driver made; object storage is seen from everywhere.

    Raises:
        SetupError: it does not; names the node.
    """
    if not objects.is_remote(path) and not Path(path).exists():
        raise SetupError(
            f"{platform.node()} does not see {path}: with workers on several nodes output.root and output.cache "
            "must be folders that all of them share (output.cache may be s3://bucket/prefix)"
        )


def device_options(nodes: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Resources of an actor that owns a device: one GPU where the cluster, or those nodes, have any, else one core."""
    return {"num_gpus": 1, "num_cpus": 1} if gpus(nodes) else {"num_cpus": 1}


def encoding_options(cluster: Cluster) -> dict[str, Any]:
    """Resources of an encoding actor: a device, and what `cluster.encoder_resources` asks for."""
    return device_options(encoding_nodes(cluster)) | {"resources": dict(cluster.encoder_resources or {})}


def device() -> str:
    """The device of the calling actor; outside Ray (tests) the CPU.

    Raises:
        SetupError: Ray gave it a GPU that torch cannot use.
    """
    given = ray.get_gpu_ids() if ray.is_initialized() else []
    if not given:
        return "cpu"
    if not accelerator.is_gpu(device := accelerator.here()):
        raise SetupError(
            f"{platform.node()}: Ray gave a worker GPU {given[0]}, and torch {torch.__version__} cannot use it: "
            "install torch for this machine's driver, or start Ray with --num-gpus=0"
        )
    return device.type


def share_cores(workers: int) -> None:
    """Have torch compute on an even part of this machine's cores, of so many workers, or as OMP_NUM_THREADS says.

    The variable counts where Ray was started with it, which torch has heeded by itself: in a worker Ray sets it to 1
    (Ray 2.60). On busy cores two threads cost 13 times the CPU of one.
    """
    if THREADS not in psutil.Process().environ():  # of the process's start
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def tree(config: Config, model: ModelFolder) -> dict[str, Any]:
    """The configuration as encoders are given it: a hub id at the commit that the driver has."""
    revision = model.commit or config.model.revision
    pinned = config.model_copy(update={"model": config.model.model_copy(update={"revision": revision})})
    return pinned.model_dump(mode="json", by_alias=True)
