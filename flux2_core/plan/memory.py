"""The planner's table for `plan`: what could be chosen, how many bytes of each card it takes, what is, and why."""

from __future__ import annotations

import math
from typing import Any

from flux2_core import accelerator
from flux2_core.config.sections import Config
from flux2_core.errors import UsageError
from flux2_core.model.folder import ModelFolder
from flux2_core.placement import encoding, planner
from flux2_core.placement.encoding import Encoding
from flux2_core.placement.planner import Job, Placement

GPUS_PER_NODE = 8  # where the machine that plans has none: what H100 nodes are rented with


def here(config: Config, model: ModelFolder) -> dict[str, Any]:
    """The table for machines like this one; one without a GPU says nothing of the host memory that is beside them."""
    device, workers = accelerator.here(), config.cluster.workers
    host = float(accelerator.free_host_bytes()) if accelerator.is_gpu(device) else math.inf
    local = min(workers, accelerator.count() or GPUS_PER_NODE)
    memory = accelerator.free_bytes(device)
    encoders = config.cluster.encoders or accelerator.count() or local
    told = describe(config, model, memory=memory, world=workers, local=local, host=host)
    return told | {"encoders": describe_encoders(config, model, memory=memory, encoders=encoders, host=host)}


def describe_encoders(
    config: Config, model: ModelFolder, *, memory: float | None, encoders: int = 1, host: float = math.inf
) -> dict[str, Any]:
    """Where both encoders lie and what they take, with `encoders` of each in a node; empty where no card is known."""
    if (limit := planner.card(config, memory)) is None:
        return {}
    vae = encoding.pictures(config, limit)
    told: dict[str, Any] = {"latents": _encoding(vae, encoders)}
    if vae.total > limit:
        told["latents"]["refused"] = (
            f"the VAE takes {vae.total / 1e9:.1f} GB for one picture of the largest of data[].resolutions, and "
            f"{limit / 1e9:.1f} GB of a card may be filled: it will be tried; smaller resolutions, or a larger card"
        )
    try:
        chosen = encoding.text(config, model, limit, host=host, encoders=encoders)
    except UsageError as error:
        return {"text": {"refused": str(error)}} | told
    advice = encoding.advice(config, model, chosen, limit)
    return {"text": _encoding(chosen, encoders) | ({"advice": advice} if advice else {})} | told


def _encoding(placed: Encoding, encoders: int) -> dict[str, Any]:
    sizes = {"total_gb": round(placed.total / 1e9, 2), "host_gb": round(placed.host * encoders / 1e9, 2)}
    return {"strategy": placed.strategy, "per_pass": int(placed.most)} | sizes


def describe(
    config: Config, model: ModelFolder, *, memory: float | None, world: int, local: int, host: float = math.inf
) -> dict[str, Any]:
    """Every placement with its bytes; `memory` is what is free of a card, where none is configured."""
    limit = planner.card(config, memory)
    if limit is None:
        return {"card_gb": None, "reason": "no GPU is known: set cluster.gpu_memory (GiB) to plan for one"}
    asked = planner.job(config, model, world=world, local=local, host=host)
    found = planner.candidates(asked, limit)
    result = {
        "card_gb": round(limit / planner.FILLED / 1e9, 1),
        "limit_gb": round(limit / 1e9, 1),
        "host_gb": None if host == math.inf else round(host / 1e9, 1),
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
    reason = f"{_sizes(asked, best)}, of {limit / 1e9:.1f} GB"
    if better:
        reason += f"; {better[0].settings()} would be better and takes {_sizes(asked, better[0])}"
    return result | {"chosen": _row(asked, best, limit), "reason": reason}


def _row(job: Job, placement: Placement, limit: float) -> dict[str, Any]:
    parts = {name: getattr(placement, name) for name in ("base", "activations", "adapter", "margin", "total")}
    return {
        "strategy": placement.strategy,
        "precision": placement.precision,
        "recompute": placement.recompute,
        **{f"{name}_gb": round(value / 1e9, 2) for name, value in parts.items()},
        "host_gb": round(placement.host * job.local / 1e9, 2),
        "relative_time": round(planner.relative_time(job, placement), 2),
        "decodes": placement.decodes,
        "fits": planner.fits(job, placement, limit),
    }


def _sizes(job: Job, placement: Placement) -> str:
    host = f" and {placement.host * job.local / 1e9:.1f} GB of a node's host memory" if placement.host else ""
    return f"{placement.total / 1e9:.1f} GB{host}"
