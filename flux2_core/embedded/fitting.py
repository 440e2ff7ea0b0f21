"""The resumable training loop of the embedded model: AdamW, warm-up and cosine, a moving average, one file to resume.

The loss of a step is a function of the step's number, so a run that was killed ends as one that was not.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How long and how fast a part is trained."""

    steps: int
    batch: int
    learning_rate: float
    warmup: int = 100
    average: float = 0.998
    """Decay of the moving average that is shipped."""
    save_every: int = 250


def fit(model: torch.nn.Module, loss_at: Callable[[int], torch.Tensor], *, plan: Plan, file: Path) -> float:
    """Train until `plan.steps`, going on from `file` where it exists; the model ends with the averaged weights.

    Args:
        model: In training mode; every parameter is trained.
        loss_at: Loss of a step, a function of the step's number alone.
        plan: Sizes and rates.
        file: Safetensors file of weights, average, moments and step; a `.jsonl` of the same name takes the losses.

    Returns:
        Seconds spent in all, those before a restart included.
    """
    weights = dict(model.named_parameters())
    average = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=plan.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    step, before = _load(file, weights, average, optimizer)
    start, losses = time.monotonic(), []
    while step < plan.steps:
        optimizer.param_groups[0]["lr"] = plan.learning_rate * rate(step, plan)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_at(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        step += 1
        decay = min(plan.average, step / (step + 9))
        torch._foreach_lerp_(list(average.values()), [w.detach() for w in weights.values()], 1 - decay)
        losses.append(loss.item())
        if step % plan.save_every == 0 or step == plan.steps:
            seconds = before + time.monotonic() - start
            _save(file, weights, average, optimizer, step=step, seconds=seconds)
            _report(file, step=step, loss=sum(losses) / len(losses), seconds=seconds)
            losses.clear()
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(average[name])
    return before + time.monotonic() - start


def rate(step: int, plan: Plan) -> float:
    """Share of the peak learning rate: a linear rise, then half a cosine down to 2 %."""
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    done = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2


def _load(
    file: Path, weights: dict[str, torch.nn.Parameter], average: dict[str, torch.Tensor], optimizer: torch.optim.AdamW
) -> tuple[int, float]:
    if not file.exists():
        return 0, 0.0
    with safe_open(file, framework="pt") as stored, torch.no_grad():
        header = stored.metadata()
        for name, weight in weights.items():
            weight.copy_(stored.get_tensor(f"weight.{name}"))
            average[name].copy_(stored.get_tensor(f"average.{name}"))
            optimizer.state[weight] = {
                "step": torch.tensor(float(header["step"])),
                "exp_avg": stored.get_tensor(f"exp_avg.{name}"),
                "exp_avg_sq": stored.get_tensor(f"exp_avg_sq.{name}"),
            }
    return int(header["step"]), float(header["seconds"])


def _save(
    file: Path,
    weights: dict[str, torch.nn.Parameter],
    average: dict[str, torch.Tensor],
    optimizer: torch.optim.AdamW,
    *,
    step: int,
    seconds: float,
) -> None:
    tensors = {}
    for name, weight in weights.items():
        tensors[f"weight.{name}"] = weight.detach().contiguous()
        tensors[f"average.{name}"] = average[name].contiguous()
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = optimizer.state[weight][moment].contiguous()
    part = file.with_suffix(".part")
    save_file(tensors, part, metadata={"step": str(step), "seconds": f"{seconds:.1f}"})
    part.replace(file)


def _report(file: Path, *, step: int, loss: float, seconds: float) -> None:
    with file.with_suffix(".jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps({"step": step, "loss": round(loss, 6), "seconds": round(seconds, 1)}) + "\n")
    logger.info("%s: step %d, loss %.5f, %.0f s", file.stem, step, loss, seconds)
