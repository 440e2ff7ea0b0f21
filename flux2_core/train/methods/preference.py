"""Preference: of a preferred and a rejected picture with one caption, the model is to prefer the first.

Legend: B samples of one worker or of a part of them, S = h * w image tokens, c = 128, L text rows, D row width;
2B: the preferred pictures, then the rejected ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from flux2_core.model.flow import add_noise, velocity
from flux2_core.model.latents import to_tokens
from flux2_core.store.schemas import REJECTED
from flux2_core.train.losses import loss_B
from flux2_core.train.methods.protocol import Batch, Caches, Carried, Draw, Model


def carry(caches: Caches, draws: Sequence[Draw]) -> Carried:
    """Rejected latents, and which samples have them; of another data set's samples their own stand in for them."""
    rows = [draw.row for draw in draws]
    paired = [row.get(REJECTED) is not None for row in rows]
    worse = [row[REJECTED] if pair else row for row, pair in zip(rows, paired, strict=True)]
    return {"rejected_Bchw": torch.stack(caches.latent_rows(worse)), "paired_B": torch.tensor(paired)}


def terms(model: Model, batch: Batch, own: Carried) -> Iterator[Tensor]:
    """-log sigmoid(-beta / 2 * ((e_w - e_w of the base) - (e_l - e_l of the base))), at one noise and level for both.

    Both pictures go through the model together, first without the adapter. Reference: Diffusion-DPO (arXiv 2311.12908)
    with flow matching's errors, beta the same at all levels, as Flow-DPO found best (arXiv 2501.13918).
    """
    section, height = model.config.loss, batch.latents_Bchw.shape[2]
    clean, noise = torch.cat([batch.latents_Bchw, own["rejected_Bchw"]]), _twice(batch.noise_Bchw)
    sigma_2B, references = _twice(batch.sigma_B), tuple(map(_twice, batch.references_RBchw))
    noisy = add_noise(clean, noise, sigma_2B)
    seen = noisy, _twice(batch.prompts_BLD), sigma_2B, references, _twice(batch.guidance_B)
    target_BSc = to_tokens(velocity(clean, noise))
    mask = None if batch.mask_Bhw is None else _twice(batch.mask_Bhw)

    def errors() -> Tensor:
        return loss_B(section, model.predict(*seen), target_BSc, sigma_B=sigma_2B, mask_Bhw=mask, height=height)

    with model.base():
        base_2B = errors()
    preferred_B, rejected_B = (errors() - base_2B).chunk(2)
    lost_B = -F.logsigmoid(-section.preference_beta / 2 * (preferred_B - rejected_B))
    yield (own["paired_B"] * batch.weight_B * batch.counts_B * lost_B).sum() / batch.total


def _twice(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor])
