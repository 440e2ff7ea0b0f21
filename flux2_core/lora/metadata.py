"""What a LoRA file says of itself: the base, the trigger, the lineage, and peft's configuration for diffusers."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flux2_core.config.sections import Config
from flux2_core.escape import visible
from flux2_core.lora.kinds import sides, widths
from flux2_core.lora.names import DIFFUSERS_PREFIX, DORA_SCALE, MAGNITUDE, A, from_bfl, modules, plain
from flux2_core.model.families import Published


@dataclass(frozen=True)
class Paths:
    """The two files of one adapter."""

    diffusers: Path
    comfyui: Path


def describe(
    config: Config, *, base: Published | None, steps: int, lineage: Mapping[str, str], date: str | None = None
) -> dict[str, str]:
    """Metadata of a run: `modelspec.*` and `ss_*` (what UIs show) and our lineage; nothing of the environment.

    Args:
        config: of the run; only named fields are used.
        base: the published model that it adapts; None: another one.
        steps: optimizer steps behind these weights.
        lineage: hashes, for instance `config_sha256`, `text_fingerprint`, `latents_fingerprint`.
        date: ISO 8601, of the run's end; left out, the file has none and stays reproducible.
    """
    rank = config.lora.rank
    known = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"Flux.2-{base.name}/lora" if base else "flux.2/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux2",
        "modelspec.title": config.run,
        "modelspec.resolution": f"{max(config.data[0].resolutions)}x{max(config.data[0].resolutions)}",
        "modelspec.trigger_phrase": config.trigger,
        "modelspec.date": date,
        "ss_output_name": config.run,
        "ss_base_model_version": f"flux2_{base.name.replace('-', '_')}" if base else "flux2",
        "ss_sd_model_name": Path(config.model.path).name,
        "ss_network_module": "networks.lora_flux_2",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,  # of the file; what was trained with is below
        "ss_steps": steps,
        "ss_max_train_steps": config.train.steps,
        "ss_learning_rate": config.train.learning_rate,
        "ss_total_batch_size": config.train.batch_size,
        "ss_seed": config.train.seed,
        "ss_resolution": str(max(config.data[0].resolutions)),
        "cacheloom.lora_kind": config.lora.kind,
        "cacheloom.min_rank": config.lora.min_rank,
        "cacheloom.lora_alpha": rank if config.lora.alpha is None else config.lora.alpha,
        **{f"cacheloom.{key}": value for key, value in lineage.items()},
    }
    return {key: visible(value) for key, value in known.items() if value is not None}


def peft_config(named: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """peft's configuration of a file with alpha = rank everywhere, keyed as diffusers expects it; empty: not for peft.

    ComfyUI's file has fused modules of rank 3r; without the two patterns diffusers would read them too weakly.
    """
    if any(key.endswith((DORA_SCALE, "oft_blocks", "hada_w1_a")) for key in named):
        return {}
    known = modules({plain(key): tensor for key, tensor in named.items()})
    ranks: dict[str, int] = {}
    for module, weights in known.items():
        rank = (
            max(weights["lokr_w2"].shape)
            if "lokr_w2" in weights
            else len(weights["lokr_w2_b" if A not in weights else A])
        )
        ranks.update(dict.fromkeys(from_bfl(module), rank))
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {"^" + re.escape(module): own for module, own in sorted(ranks.items()) if own != rank}
    config: dict[str, Any] = {
        "r": rank, "rank_pattern": others, "alpha_pattern": others, "target_modules": sorted(ranks)
    }  # fmt: skip
    if any("lokr_w1" in weights for weights in known.values()):
        config |= {"alpha": rank, "decompose_factor": _factor(known.values())}
    else:
        config |= {"lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "use_rslora": False}
        config["use_dora"] = any(MAGNITUDE in weights for weights in known.values())
    return {DIFFUSERS_PREFIX + key: value for key, value in config.items()}


def _factor(lokr: Iterable[Mapping[str, torch.Tensor]]) -> int:
    """The factor by which peft finds the sides of each left factor again."""
    found = [(widths(weights), tuple(weights["lokr_w1"].shape)) for weights in lokr]
    highest = max(side for _, left in found for side in left)

    def fits(factor: int) -> bool:
        each = ((width, side) for size, left in found for width, side in zip(size[::-1], left, strict=True))
        return all(width is not None and sides(width, factor)[0] == side for width, side in each)

    return next(factor for factor in itertools.count(highest) if fits(factor))
