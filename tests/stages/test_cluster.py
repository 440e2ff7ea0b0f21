"""The cluster: which device an actor computes on, and one that cannot be joined."""

import socket
import time

import pytest
import torch

from flux2_core import accelerator
from flux2_core.config.sections import Cluster
from flux2_core.errors import SetupError
from stages import cluster


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
