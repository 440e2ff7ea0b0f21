"""The planner's table for `plan`: what could be chosen, how many bytes of each card it takes, what is, and why."""

from __future__ import annotations

from typing import Any

from flux2_core.config.sections import Config
from flux2_core.errors import UsageError
from flux2_core.model.folder import ModelFolder
from flux2_core.placement import planner
from flux2_core.placement.planner import Job, Placement


def describe(config: Config, model: ModelFolder, *, memory: float | None, world: int, local: int) -> dict[str, Any]:
    """Every placement with its bytes; `memory` is what is free of a card, where none is configured."""
    asked = planner.job(config, model, world=world, local=local)
    limit = planner.card(config, memory)
    if limit is None:
        return {"card_gb": None, "reason": "no GPU is known: set cluster.gpu_memory (GiB) to plan for one"}
    found = planner.candidates(asked, limit)
    result = {
        "card_gb": round(limit / planner.FILLED / 1e9, 1),
        "limit_gb": round(limit / 1e9, 1),
        "workers": world,
        "workers_per_node": local,
        "tokens": asked.tokens,
        "adapter_parameters": asked.adapter,
        "alternatives": [_row(asked, placement, limit) for placement in found],
    }
    try:
        best = planner.decide(asked, limit)
    except UsageError as error:
        return result | {"refused": str(error)}
    better = found[: found.index(best)]
    reason = f"{best.total / 1e9:.1f} of {limit / 1e9:.1f} GB"
    if better:
        reason += f"; {better[0].settings()} would be better and takes {better[0].total / 1e9:.1f} GB"
    return result | {"chosen": _row(asked, best, limit), "reason": reason}


def _row(job: Job, placement: Placement, limit: float) -> dict[str, Any]:
    parts = {name: getattr(placement, name) for name in ("base", "activations", "adapter", "margin", "total")}
    return {
        "strategy": placement.strategy,
        "precision": placement.precision,
        "recompute": placement.recompute,
        **{f"{name}_gb": round(value / 1e9, 2) for name, value in parts.items()},
        "relative_time": round(planner.relative_time(job, placement), 2),
        "fits": placement.total <= limit,
    }
