"""The planner's table for `plan`."""

import pytest
import torch

from flux2_core import accelerator
from flux2_core.placement import planner
from flux2_core.plan import memory
from tests.flux2_core.jobs import CARD_24, H100, asked, described, limit


def test_table_for_plan() -> None:
    """`plan` gets every alternative with its bytes, the chosen one, and why; without a card it is told what to set."""
    job = asked(H100)
    told = memory.describe(job.config, described("dev"), memory=None, world=1, local=1)
    chosen = told["chosen"]
    assert chosen["fits"]
    assert chosen in told["alternatives"]
    assert chosen["total_gb"] <= told["limit_gb"] == 79.8
    assert told["card_gb"] == 84.9
    assert 'train.recompute="none" would be better' in told["reason"]
    best = planner.decide(job, limit(H100))
    assert (chosen["strategy"], chosen["precision"], chosen["recompute"]) == (
        best.strategy, best.precision, best.recompute,
    )  # fmt: skip
    for row in told["alternatives"]:
        parts = sum(row[f"{part}_gb"] for part in ("base", "activations", "adapter", "margin"))
        assert parts == pytest.approx(row["total_gb"], abs=0.03)
    unknown = memory.describe(asked().config, described("dev"), memory=None, world=1, local=1)
    assert "set cluster.gpu_memory" in unknown["reason"]
    small = memory.describe(asked(4).config, described("dev"), memory=None, world=1, local=1)
    assert "no placement fits" in small["refused"]


@pytest.mark.parametrize(("local", "free", "wanted"), [(1, 96e9, "bf16"), (1, 48e9, "int8"), (2, 96e9, "int8")])
def test_host_memory_of_streamed_blocks(local: int, free: float, wanted: str) -> None:
    """On cards of 24 GB the blocks of a base wait in host memory, once for each worker of a node: where bf16 does not
    fit there it is said to be too much, with its bytes, and int8 is taken; nothing else takes any."""
    job = asked(CARD_24, workers=local, cluster={"strategy": "stream"})
    told = memory.describe(job.config, described("dev"), memory=None, world=local, local=local, host=free)
    exact, rounded = told["alternatives"]
    assert (exact["precision"], rounded["precision"]) == ("bf16", "int8")
    assert (exact["host_gb"], exact["fits"]) == (pytest.approx(62.8 * local, abs=0.05), wanted == "bf16")
    assert rounded["host_gb"] == pytest.approx(exact["host_gb"] / 2, abs=0.02)
    assert told["host_gb"] == free / 1e9
    assert told["chosen"]["precision"] == wanted
    assert f"and {told['chosen']['host_gb']:.1f} GB of a node's host memory, of 23.8 GB" in told["reason"]
    whole = memory.describe(asked(H100).config, described("dev"), memory=None, world=1, local=1)["alternatives"]
    assert all((row["host_gb"] > 0) == (row["strategy"] == "stream") for row in whole)


def test_where_the_encoders_lie() -> None:
    """Beside the training's stands each encoder's place and bytes, with advice where the exact one is streamed; what
    fits nowhere is refused there, and without a card nothing is said."""
    config, model = asked(CARD_24).config, described("dev")
    told = memory.describe_encoders(config, model, memory=None, encoders=2, host=96e9)
    assert told["text"]["advice"].startswith('text.quantize="int8" fits whole in 23.0 GB')
    assert (told["text"]["strategy"], told["text"]["per_pass"], told["text"]["host_gb"]) == ("stream", 8192, 66.69)
    assert told["latents"] == {"strategy": "whole", "per_pass": 4 * 2**20, "total_gb": 13.08, "host_gb": 0.0}
    small = memory.describe_encoders(config, model, memory=None, encoders=2, host=60e9)
    assert "66.7 GB of a node's host memory; set text.quantize" in small["text"]["refused"]
    assert "advice" not in memory.describe_encoders(asked(H100).config, model, memory=None)["text"]
    large = asked(CARD_24, data=[{"path": "x", "resolutions": [4096]}]).config
    assert (
        "VAE takes 45.3 GB for one picture" in memory.describe_encoders(large, model, memory=None)["latents"]["refused"]
    )
    assert memory.describe_encoders(asked().config, model, memory=None) == {}


def test_a_node_that_cannot_hold_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit a node is refused with both figures and the ways out; a machine without a GPU plans for cards
    elsewhere, and does not count its own host memory."""
    job = asked(CARD_24, workers=4, train={"precision": "bf16"}, cluster={"strategy": "stream"})
    told = memory.describe(job.config, described("dev"), memory=None, world=4, local=4, host=100e9)
    assert "and 251.3 of a node's 100.0 GB of free host memory" in told["refused"]
    assert told["refused"].endswith('; set train.precision="int4", fewer workers in a node'), (
        "no other resolution helps"
    )
    few = asked(CARD_24, train={"precision": "int4"}, cluster={"strategy": "stream"})
    told = memory.describe(few.config, described("dev"), memory=None, world=1, local=1, host=10e9)
    assert told["refused"].endswith("; use a machine with more memory")
    monkeypatch.setattr(accelerator, "free_host_bytes", lambda: 10**10)
    monkeypatch.setattr(accelerator, "count", lambda: 4)
    assert "chosen" in memory.here(job.config, described("dev"))
    monkeypatch.setattr(accelerator, "here", lambda: torch.device("xpu"))
    monkeypatch.setattr(accelerator, "free_bytes", lambda _device: None)
    assert "of a node's 10.0 GB" in memory.here(job.config, described("dev"))["refused"]
