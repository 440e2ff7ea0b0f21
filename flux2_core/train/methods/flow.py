"""Flow matching, as FLUX.2 was trained, and the targets that `[loss]` puts in its place.

Legend: B samples of one worker or of a part of them, S = h * w image tokens, c = 128, L text rows, D row width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flux2_core.config.objective import Loss
from flux2_core.data.needs import NULL_TEXT
from flux2_core.model.flow import velocity
from flux2_core.model.latents import to_tokens
from flux2_core.model.seeded import generator
from flux2_core.store.schemas import REJECTED
from flux2_core.train.losses import loss_B, mse_B, reflexflow
from flux2_core.train.methods.protocol import Batch, Caches, Carried, Draw, Model


def terms(model: Model, batch: Batch, own: Carried) -> Iterator[Tensor]:
    """Flow matching: the velocity from noise to picture, as FLUX.2 was trained, or what `[loss]` puts in its place."""
    section, seen = model.config.loss, batch.seen()
    target_BSc = to_tokens(velocity(batch.latents_Bchw, batch.noise_Bchw))
    if "factor_B" in own:
        with model.base():  # with all tokens: what routes make it err by would be learned factor times
            empty_BSc = model.predict(*replace(batch, routes_RBk=()).seen(own["empty_BLD"]))
        target_BSc = _apart(section, target_BSc, empty_BSc.float(), own["factor_B"], batch.sigma_B)
    if "prior_B" in own:
        with model.base():
            prior_BSc = model.predict(*seen).float()
        target_BSc = torch.where(own["prior_B"].view(-1, 1, 1), prior_BSc, target_BSc)
    predicted_BSc = model.predict(*seen)
    if (beyond := section.differential_guidance) != 1:
        target_BSc = predicted_BSc.detach() + beyond * (target_BSc - predicted_BSc.detach())
    height, shares, drift_B = batch.latents_Bchw.shape[2], batch.mask_Bhw, torch.zeros_like(batch.sigma_B)
    if "exact_BSc" in own:
        shares, drift_B = reflexflow(predicted_BSc, target_BSc, own["exact_BSc"], shares)
        drift_B = own["rolled_B"] * drift_B
    off_B = loss_B(section, predicted_BSc, target_BSc, sigma_B=batch.sigma_B, mask_Bhw=shares, height=height)
    off_B = batch.counts_B * (off_B + drift_B)
    if section.masked_prior and batch.mask_Bhw is not None:
        off_B = off_B + section.masked_prior * mse_B(predicted_BSc, prior_BSc, 1 - batch.mask_Bhw)
    weight_B = batch.weight_B * own["single_B"] if "single_B" in own else batch.weight_B
    yield (weight_B * off_B).sum() / batch.total


def carry(caches: Caches, draws: Sequence[Draw]) -> Carried:
    """What moves the target: the empty caption and its factor, and which samples take the base model's prediction.

    Beside pairs also which samples are none. That depends on the configuration alone: a sharded base needs every worker
    in each pass.
    """
    config, found = caches.config, {}
    if (scale := config.loss.contrastive_guidance) != 1:
        low, high = scale if isinstance(scale, tuple) else (scale, scale)
        drawn = torch.stack([torch.rand((), generator=generator(*draw.origin, "contrast")) for draw in draws])
        empty = caches.prompt_rows([caches.key(NULL_TEXT)])
        found = {"empty_BLD": empty.expand(len(draws), -1, -1), "factor_B": low + (high - low) * drawn}
    if config.takes_prior:
        found["prior_B"] = torch.tensor([config.data[draw.row["dataset"]].regularisation == "prior" for draw in draws])
    if config.pairs:
        found["single_B"] = torch.tensor([draw.row[REJECTED] is None for draw in draws])
    return found


def _apart(section: Loss, target_BSc: Tensor, empty_BSc: Tensor, factor_B: Tensor, sigma_B: Tensor) -> Tensor:
    """The target moved away from the empty caption's prediction: e + f (t - e).

    Reference: AI Toolkit's contrastive guidance loss; CFG-Zero* is arXiv 2503.18886.
    """
    if section.contrastive_zero_star:
        along_B = (target_BSc * empty_BSc).sum((1, 2)) / empty_BSc.square().sum((1, 2)).clamp_min(1e-8)
        empty_BSc = along_B.view(-1, 1, 1) * empty_BSc
    if section.contrastive_schedule == "sigma":
        factor_B = 1 + (factor_B - 1) * sigma_B
    return empty_BSc + factor_B.view(-1, 1, 1) * (target_BSc - empty_BSc)
