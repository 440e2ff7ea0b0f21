"""Slider: the adapter's strength turns something up and down, told in prompts alone; no picture is needed.

Legend: B samples of one worker or of a part of them, S = h * w image tokens, c = 128, L text rows, D row width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flux2_core.config.slider import SLIDER_STEPS
from flux2_core.model.latents import from_tokens
from flux2_core.model.seeded import generator
from flux2_core.train.losses import loss_B
from flux2_core.train.methods.protocol import Batch, Caches, Carried, Draw, Model

STRENGTHS = 1.0, -1.0
BEYOND = 0.5  # so that strength 1 is about what the positive prompt says, where the target lies between both


def carry(caches: Caches, draws: Sequence[Draw]) -> Carried:
    """The prompts of a slider, each for every sample; of several anchors one is drawn."""
    slider, many = caches.config.slider, len(draws)
    told = {"target": slider.target, "positive": slider.positive, "negative": slider.negative}
    keys = {name: [caches.key(text or "")] * many for name, text in told.items()}
    if anchors := slider.anchor:
        drawn = [int(torch.randint(len(anchors), (), generator=generator(*draw.origin, "anchor"))) for draw in draws]
        keys["anchor"] = [caches.key(anchors[place]) for place in drawn]
    return {f"{name}_BLD": caches.prompt_rows(each) for name, each in keys.items()}


def terms(model: Model, batch: Batch, own: Carried) -> Iterator[Tensor]:
    """At strength 1 v(target) + (v(positive) - v(negative)) / 2 of the base, at -1 the opposite; anchors stay at both.

    At noisy pictures that the base model itself makes of the target prompt: a few steps from pure noise to the level.
    Reference: Concept Sliders (arXiv 2311.12092), with a velocity in place of the noise.
    """
    noisy_Bchw = _made(model, batch, own["target_BLD"])
    with model.base():
        middle, more, less = (_velocity(model, batch, noisy_Bchw, own[f"{name}_BLD"]) for name in PROMPTS)
    away_BSc = BEYOND * (more - less)
    for strength in STRENGTHS:
        with model.at(strength):  # until the term is differentiated, for blocks that are computed again
            yield _term(model, batch, noisy_Bchw, own["target_BLD"], middle + strength * away_BSc)
    if "anchor_BLD" not in own:
        return
    with model.base():
        kept_BSc = _velocity(model, batch, noisy_Bchw, own["anchor_BLD"])
    for strength in STRENGTHS:
        with model.at(strength):
            yield _term(model, batch, noisy_Bchw, own["anchor_BLD"], kept_BSc)


PROMPTS = "target", "positive", "negative"


def _made(model: Model, batch: Batch, prompts_BLD: Tensor) -> Tensor:
    """What the base model makes of noise under a prompt, down to each sample's level, in steps of equal length."""
    noisy_Bchw, height, width = batch.noise_Bchw, *batch.noise_Bchw.shape[2:]
    step_B = (1 - batch.sigma_B) / SLIDER_STEPS
    with model.base():
        for taken in range(SLIDER_STEPS):
            found = model.predict(noisy_Bchw, prompts_BLD, 1 - taken * step_B, guidance_B=batch.guidance_B).float()
            noisy_Bchw = noisy_Bchw - step_B.view(-1, 1, 1, 1) * from_tokens(found, height=height, width=width)
    return noisy_Bchw


def _velocity(model: Model, batch: Batch, noisy_Bchw: Tensor, prompts_BLD: Tensor) -> Tensor:
    return model.predict(noisy_Bchw, prompts_BLD, batch.sigma_B, guidance_B=batch.guidance_B).float()


def _term(model: Model, batch: Batch, noisy_Bchw: Tensor, prompts_BLD: Tensor, target_BSc: Tensor) -> Tensor:
    predicted_BSc, height = _velocity(model, batch, noisy_Bchw, prompts_BLD), noisy_Bchw.shape[2]
    off_B = loss_B(model.config.loss, predicted_BSc, target_BSc, sigma_B=batch.sigma_B, height=height)
    return (batch.weight_B * batch.counts_B * off_B).sum() / batch.total
