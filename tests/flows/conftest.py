"""Fixtures: a real Prefect server on a free loopback port, and process workers for it."""

import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.flows.real_prefect import BIN, POOL, ROOT, end_tree, prefect, server_environment, wait_until_healthy


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which `prefect` and our flows use a real server with an empty database of its own.

    The work pool `local` exists. Everything is ended with the session, by process id.
    """
    folder = tmp_path_factory.mktemp("prefect")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = server_environment(folder, port)
    with (folder / "server.log").open("wb") as log:
        command = [BIN / "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
    try:
        wait_until_healthy(environment["PREFECT_API_URL"], server, folder / "server.log")
        prefect(environment, "work-pool", "create", POOL, "--type", "process", check=True)
        yield environment
    finally:
        end_tree(server)


@pytest.fixture
def start_worker(tmp_path: Path) -> Iterator[Callable[[dict[str, str]], Path]]:
    """Starts a process worker of the pool `local` in an environment; returns its log; ends it after the test."""
    workers: list[subprocess.Popen] = []

    def start(environment: dict[str, str], *, cwd: Path = ROOT) -> Path:
        path = tmp_path / f"worker-{len(workers)}.log"
        command = [BIN / "prefect", "worker", "start", "--pool", POOL, "--type", "process"]
        with path.open("wb") as log:
            workers.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=cwd))
        return path

    yield start
    for worker in workers:
        end_tree(worker)
