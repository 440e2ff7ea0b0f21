"""The cluster: which device an actor computes on, and one that cannot be joined."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
import torch

from flux2_core import accelerator
from flux2_core.config.sections import Cluster
from flux2_core.errors import SetupError
from stages import cluster, embedded, group

JOINED = """
import sys
from flux2_core.config.sections import Cluster
from stages import cluster
with cluster.connect(Cluster(address=sys.argv[1])):
    print(cluster.cpus())
"""

THREADS = """
import json, os
from flux2_core.config.sections import Cluster
from stages import cluster
class Worker:
    def encodes(self):
        import torch
        return torch.get_num_threads(), os.nice(0)
    def trains(self, workers):
        cluster.share_cores(workers)
        return self.encodes()
def seen(workers):
    import ray
    with cluster.connect(Cluster()):
        worker = ray.remote(num_cpus=1)(Worker).remote()
        return ray.get([worker.encodes.remote(), worker.trains.remote(workers)])
os.environ["OMP_NUM_THREADS"] = "2"
told = seen(workers=os.cpu_count())
del os.environ["OMP_NUM_THREADS"]
print(json.dumps({"set": told, "unset": seen(workers=1)}))
"""


def test_the_device_of_an_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU without a GPU from Ray, else torch's accelerator; a GPU that torch cannot use is refused, not ignored."""
    given: list[int] = []
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(cluster.ray, "get_gpu_ids", lambda: given)
    monkeypatch.setattr(accelerator, "here", lambda: torch.device("xpu"))
    assert cluster.device() == "cpu"
    given.append(3)
    assert cluster.device() == "xpu"
    monkeypatch.setattr(accelerator, "here", lambda: accelerator.CPU)
    with pytest.raises(SetupError, match=r"Ray gave a worker GPU 3, and torch .* cannot use it: .*--num-gpus=0"):
        cluster.device()


def test_a_cluster_that_does_not_answer() -> None:
    """Where nothing listens at `cluster.address` it is said at once; names that Ray resolves are left to Ray."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        began = time.monotonic()
        for scheme in ("", "ray://"):
            with pytest.raises(
                SetupError, match=rf"^cluster\.address={scheme}{address}: Ray does not answer .*`ray start"
            ):
                cluster.knock(Cluster(address=scheme + address))
        assert time.monotonic() - began < cluster.KNOCK_S
    for address in (None, "auto"):
        cluster.knock(Cluster(address=address))


def test_where_workers_of_several_machines_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo is told the interface that has Ray's address; of an address that none has (behind a translation) nothing."""
    for address, interface in (("127.0.0.1", "lo"), ("192.0.2.77", None)):
        monkeypatch.setattr(group.ray.util, "get_node_ip_address", lambda address=address: address)
        assert group._interface() == interface


@pytest.mark.ray
def test_threads_and_niceness_of_workers() -> None:
    """Workers of a Ray of our own are as nice as the command; with OMP_NUM_THREADS each has so many threads, without it
    encoders have one (Ray's word), and training has all cores."""
    environment = {name: value for name, value in os.environ.items() if name not in embedded.NICENESS}
    ran = subprocess.run([sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True, timeout=180)
    assert ran.returncode == 0, ran.stderr
    nice = os.nice(0)
    assert json.loads(ran.stdout) == {"set": [[2, nice]] * 2, "unset": [[1, nice], [os.cpu_count(), nice]]}


@pytest.mark.ray
def test_rays_client_is_taken_in(ray_runtime: str) -> None:
    """A cluster is joined through Ray's client too, where no raylet is ours to look at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = f"--mode=legacy --host=127.0.0.1 --port={port} --address={ray_runtime}".split()
    server = subprocess.Popen(  # of its own, since it ends its connection to Ray with its last client's
        [sys.executable, "-m", "ray.util.client.server", *served], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        line = [sys.executable, "-c", JOINED, f"ray://127.0.0.1:{port}"]
        ran = subprocess.run(line, capture_output=True, text=True, timeout=120)
    finally:
        server.kill()
        server.wait()
    assert (ran.returncode, ran.stdout) == (0, "4\n"), ran.stderr
