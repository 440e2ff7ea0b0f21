"""Drawing is placed as training is: one picture at a time on one card, and nothing is kept for a backward pass."""

from __future__ import annotations

import math

from flux2_core.config.sections import Config
from flux2_core.model.folder import ModelFolder
from flux2_core.placement import planner
from flux2_core.placement.planner import Job


def job(config: Config, model: ModelFolder, *, adapter: int, host: float = math.inf) -> Job:
    """Count what drawing takes, with so many parameters of a finished adapter and bytes of free host memory."""
    data = config.data[0].model_copy(update={"resolutions": (config.preview_size,), "references": ()})
    strategy = config.cluster.strategy if config.cluster.strategy in ("ddp", "stream") else "auto"  # of one card
    alone = planner.altered(
        config,
        train={"batch_size": 1, "recompute": "auto", "compile": False},
        cluster={"strategy": strategy, "micro_batch": None},
    )
    asked = alone.model_copy(update={"data": (data,)})
    return Job(asked, planner.sizes(model), adapter, world=1, local=1, host=host, trains=False)
