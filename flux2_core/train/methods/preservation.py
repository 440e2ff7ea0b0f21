"""Preservation: what the base model does without the concept stays.

Legend: B samples of one worker or of a part of them, S = h * w image tokens, c = 128, L text rows, D row width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from flux2_core.data.needs import CLASS_ONLY, DOP, NULL_TEXT
from flux2_core.train.losses import mse_B
from flux2_core.train.methods.protocol import Batch, Caches, Carried, Draw, Model


def carry(text: Callable[[Caches, Draw], str], caches: Caches, draws: Sequence[Draw]) -> Carried:
    """Prompts on which the base model is preserved, and which samples have one: regularisation pictures have none."""
    kept = [not draw.row["regularisation"] for draw in draws]
    keys = [text(caches, draw) if keep else draw.prompt for draw, keep in zip(draws, kept, strict=True)]
    return {"prompts_BLD": caches.prompt_rows(keys), "kept_B": torch.tensor(kept)}


def terms(model: Model, batch: Batch, own: Carried) -> Iterator[Tensor]:
    """What the adapter changes where it should not: with against without it, at the same noise, in fp32.

    Reference: AI Toolkit's Differential Output Preservation; with the empty caption Blank Prompt Preservation.
    """
    seen = batch.seen(own["prompts_BLD"])
    with model.base():
        base_BSc = model.predict(*seen)
    weight_B = own["kept_B"] * batch.weight_B * model.config.train.preservation_weight
    yield (weight_B * mse_B(model.predict(*seen), base_BSc)).sum() / batch.total


def exchanged(caches: Caches, draw: Draw) -> str:
    """The drawn caption with the class in the trigger's place; the class alone where no caption was drawn."""
    role = CLASS_ONLY if draw.caption is None else DOP
    return [part["key"] for part in draw.row["roles"] if part["role"] == role][draw.caption or 0]


def empty(caches: Caches, draw: Draw) -> str:
    """The empty caption, whatever was drawn."""
    return caches.key(NULL_TEXT)
