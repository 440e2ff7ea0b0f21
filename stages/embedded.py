"""A Ray cluster of our own: on loopback only, behind a token of its own, in a folder that nobody else may enter.

Ray by itself would listen on every interface of the machine, write one token for all of a person's clusters into a file
that everybody may read, and keep code and logs in folders that everybody may write (Ray 2.60).
"""

from __future__ import annotations

import functools
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import parameter, ray_constants
from ray._private.node import Node
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # compiled

from flux2_core.errors import SetupError
from stages import vitals

OBJECT_STORE_BYTES = 100 * 2**20  # rows never travel through it: only texts, counts and metrics do
LOOPBACK = "127.0.0.1"
# torch's groups and NCCL's listen at the address of the host's name, if they are not told another interface.
INTERFACES = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
NICENESS = {"RAY_worker_niceness": "0"}  # Ray's own is 15: beside anything else that computes its workers stand still
PRESTART = {"RAY_prestart_worker_first_driver": "0"}  # else one for each core, 0.5 CPU-s of imports and 45 MB each
TOKEN, TOKEN_FILE = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


@contextmanager
def started(cores: int, **more: Any) -> Iterator[None]:
    """Have a cluster of this machine, its GPUs and so many cores inside; `more` is handed to `ray.init`.

    Raises:
        SetupError: somebody else owns the folder that Ray would use, or Ray does not stay on loopback.
    """
    with ExitStack() as stack:
        stack.enter_context(environment(INTERFACES | NICENESS | PRESTART))
        if not {TOKEN, TOKEN_FILE} & os.environ.keys():
            file = stack.enter_context(tempfile.NamedTemporaryFile("w", prefix="cacheloom-ray-"))  # of mode 0600
            file.write(secrets.token_hex(32))
            file.flush()
            stack.enter_context(environment({TOKEN_FILE: file.name}))
        stack.enter_context(_fresh_token())
        stack.enter_context(_staying_here())
        stack.enter_context(_few_processes())
        ray.init(
            address="local",  # not another Ray that runs on this machine
            num_cpus=cores,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _node_ip_address=LOOPBACK,
            _temp_dir=_folder(),
            **more,
        )
        stack.enter_context(vitals.watched())
        if (address := ray.util.get_node_ip_address()) != LOOPBACK:
            raise SetupError(
                f"Ray {ray.__version__} listens at {address}, where others reach it: install the Ray of constraints.txt"
            )
        yield


@contextmanager
def environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """Variables for all that is started inside; those that the user set stay as they are."""
    ours = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


@contextmanager
def _fresh_token() -> Iterator[None]:
    """A process keeps the first token that it read: of another cluster before, and for another one after."""
    AuthenticationTokenLoader.instance().reset_cache()
    try:
        yield
    finally:
        AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _staying_here() -> Iterator[None]:
    """Ray reads 127.0.0.1 as "the address that others see", save where it makes no clusters (macOS, Windows)."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _few_processes() -> Iterator[None]:
    """Without what nobody asks here: the autoscaler, the reader of logs, the dashboard's head, 1.9 CPU-s and 150 MB.

    The first two have a name among Ray's own parameters and none in `ray.init`, the third has neither (Ray 2.60). Two
    agents of the raylet's stay, without which it does not start.
    """
    parameters, dashboard = parameter.RayParams, Node.start_api_server
    parameter.RayParams = functools.partial(parameters, no_monitor=True, include_log_monitor=False)
    Node.start_api_server = lambda *_, **__: None
    try:
        yield
    finally:
        parameter.RayParams, Node.start_api_server = parameters, dashboard


def _folder() -> str | None:
    """Where Ray keeps its sessions; None is where the user told Ray to."""
    if "RAY_TMPDIR" in os.environ:
        return None
    ours = Path(tempfile.gettempdir(), f"ray-{os.getuid()}")
    ours.mkdir(mode=0o700, exist_ok=True)
    if ours.is_symlink() or ours.stat().st_uid != os.getuid():
        raise SetupError(f"{ours}: belongs to somebody else; remove it, or set RAY_TMPDIR to a folder of your own")
    ours.chmod(0o700)
    return str(ours / "ray")
