"""The planner's table for `plan`."""

import pytest

from flux2_core.placement import planner
from flux2_core.plan import memory
from tests.flux2_core.jobs import H100, asked, described, limit


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
