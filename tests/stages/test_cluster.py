"""The cluster: which device an actor computes on."""

import pytest
import torch

from flux2_core import accelerator
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
