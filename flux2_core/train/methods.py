"""What a step minimises: methods, known to the trainer by the protocol here and by nothing else.

A method names in `flux2_core.data.needs` what it takes from the cache; here, under the same name, it says what a batch
carries for it and gives its terms of the loss. One more method is one entry in each of the two tables.

Legend: B samples of one worker or of a part of them, S = h * w image tokens, c = 128, L text rows, D row width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from flux2_core.config.objective import Loss
from flux2_core.config.sections import Config
from flux2_core.data.needs import CLASS_ONLY, DOP, NULL_TEXT
from flux2_core.errors import choose
from flux2_core.model.flow import add_noise, velocity
from flux2_core.model.latents import to_tokens
from flux2_core.model.seeded import generator
from flux2_core.train.losses import loss_B, mse_B

Carried = Mapping[str, Tensor]


@dataclass(frozen=True)
class Draw:
    """What chance gave to one place of a step."""

    origin: tuple[int, str, int, int]
    """What it was drawn from; a method that draws too takes `generator(*origin, "its name")`."""
    row: Mapping[str, Any]
    """Of the samples table."""
    sigma: float
    counts: float
    """Weight of that noise level in the loss."""
    noise_chw: Tensor
    prompt: str
    """Key of the text that is trained on."""
    caption: int | None
    """Which caption that is; None: the empty one or the trigger alone stands in its place."""
    guidance: float
    """What the model is told."""


@dataclass(frozen=True)
class Batch:
    """One worker's part of a step; `total` is the size of the whole batch over all workers."""

    ids: list[str]
    latents_Bchw: Tensor
    noise_Bchw: Tensor
    sigma_B: Tensor
    prompts_BLD: Tensor
    total: int
    weight_B: Tensor
    """Factor on each sample's loss: of its data set, 0 for a filler."""
    counts_B: Tensor
    """Weight of each sample's noise level in what is learned."""
    guidance_B: Tensor
    """What the model is told."""
    mask_Bhw: Tensor | None = None
    """Share (0..1) of each token's loss that counts; None: all of all."""
    references_RBchw: tuple[Tensor, ...] = ()
    """Latents of the reference pictures, each of a shape of its own."""
    carried: Mapping[str, Carried] = field(default_factory=dict)
    """What is there for one method alone, by its name; B is the first dimension of each."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with each of its tensors changed: moved to a device, pinned, or cut to a part of the samples."""
        single: dict[str, Any] = {name: change(one) for name, one in vars(self).items() if torch.is_tensor(one)}
        carried = {of: {name: change(one) for name, one in own.items()} for of, own in self.carried.items()}
        return replace(self, references_RBchw=tuple(map(change, self.references_RBchw)), carried=carried, **single)

    def noisy_Bchw(self) -> Tensor:
        """What the model sees of the pictures."""
        return add_noise(self.latents_Bchw, self.noise_Bchw, self.sigma_B)


class Caches(Protocol):
    """What a method may ask of the open caches."""

    config: Config

    def key(self, text: str) -> str:
        """Key of a text."""

    def prompt_rows(self, keys: list[str]) -> Tensor:
        """Prompts (B, L, D)."""

    def latent_rows(self, parts: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """Latents (c, h, w) of samples, or of parts of them that have a latent key."""


class Model(Protocol):
    """What a method may ask of the model."""

    config: Config

    def predict(
        self,
        noisy_Bchw: Tensor,
        prompts_BLD: Tensor,
        sigma_B: Tensor,
        references_RBchw: Sequence[Tensor] = (),
        guidance_B: Tensor | None = None,
    ) -> Tensor:
        """Predicted velocity (B, S, c); of unsaid guidance by the mean of what is drawn."""

    def base(self) -> AbstractContextManager[None]:
        """Have the base model's own predictions inside, without a gradient."""


@dataclass(frozen=True)
class Method:
    """One thing that a step minimises."""

    label: str | None
    """What the records call its part of the loss; None: it has no field of its own beside the whole loss."""
    carry: Callable[[Caches, Sequence[Draw]], Carried]
    """What a batch of these draws carries for it."""
    terms: Callable[[Model, Batch, Carried], Iterator[Tensor]]
    """Its terms of a part of a batch, each over `batch.total`, so that parts and workers add up to the batch's mean.

    Each is differentiated and freed before the next one is asked for. Every worker must make the same passes, whatever
    its samples are: a sharded base needs all workers in each.
    """


def _flow(model: Model, batch: Batch, own: Carried) -> Iterator[Tensor]:
    """Flow matching: the velocity from noise to picture, as FLUX.2 was trained, or what `[loss]` puts in its place."""
    section, noisy_Bchw = model.config.loss, batch.noisy_Bchw()
    seen = noisy_Bchw, batch.prompts_BLD, batch.sigma_B, batch.references_RBchw, batch.guidance_B
    target_BSc = to_tokens(velocity(batch.latents_Bchw, batch.noise_Bchw))
    if "factor_B" in own:
        with model.base():
            empty_BSc = model.predict(noisy_Bchw, own["empty_BLD"], *seen[2:])
        target_BSc = _apart(section, target_BSc, empty_BSc.float(), own["factor_B"], batch.sigma_B)
    if "prior_B" in own:
        with model.base():
            prior_BSc = model.predict(*seen).float()
        target_BSc = torch.where(own["prior_B"].view(-1, 1, 1), prior_BSc, target_BSc)
    predicted_BSc = model.predict(*seen)
    if (beyond := section.differential_guidance) != 1:
        target_BSc = predicted_BSc.detach() + beyond * (target_BSc - predicted_BSc.detach())
    height = batch.latents_Bchw.shape[2]
    off_B = loss_B(section, predicted_BSc, target_BSc, sigma_B=batch.sigma_B, mask_Bhw=batch.mask_Bhw, height=height)
    off_B = batch.counts_B * off_B
    if section.masked_prior and batch.mask_Bhw is not None:
        off_B = off_B + section.masked_prior * mse_B(predicted_BSc, prior_BSc, 1 - batch.mask_Bhw)
    yield (batch.weight_B * off_B).sum() / batch.total


def _beside(caches: Caches, draws: Sequence[Draw]) -> Carried:
    """What moves the target: the empty caption and its factor, and which samples take the base model's prediction.

    That depends on the configuration alone: a sharded base needs every worker in each pass.
    """
    config, found = caches.config, {}
    if (scale := config.loss.contrastive_guidance) != 1:
        low, high = scale if isinstance(scale, tuple) else (scale, scale)
        drawn = torch.stack([torch.rand((), generator=generator(*draw.origin, "contrast")) for draw in draws])
        empty = caches.prompt_rows([caches.key(NULL_TEXT)])
        found = {"empty_BLD": empty.expand(len(draws), -1, -1), "factor_B": low + (high - low) * drawn}
    if config.takes_prior:
        found["prior_B"] = torch.tensor([config.data[draw.row["dataset"]].prior for draw in draws])
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


def _preserved(text: Callable[[Caches, Draw], str], caches: Caches, draws: Sequence[Draw]) -> Carried:
    """Prompts on which the base model is preserved, and which samples have one: regularisation pictures have none."""
    kept = [not draw.row["regularisation"] for draw in draws]
    keys = [text(caches, draw) if keep else draw.prompt for draw, keep in zip(draws, kept, strict=True)]
    return {"prompts_BLD": caches.prompt_rows(keys), "kept_B": torch.tensor(kept)}


def _change(model: Model, batch: Batch, own: Carried) -> Iterator[Tensor]:
    """What the adapter changes where it should not: with against without it, at the same noise, in fp32.

    Reference: AI Toolkit's Differential Output Preservation; with the empty caption Blank Prompt Preservation.
    """
    seen = batch.noisy_Bchw(), own["prompts_BLD"], batch.sigma_B, batch.references_RBchw, batch.guidance_B
    with model.base():
        base_BSc = model.predict(*seen)
    weight_B = own["kept_B"] * batch.weight_B * model.config.train.preservation_weight
    yield (weight_B * mse_B(model.predict(*seen), base_BSc)).sum() / batch.total


def _exchanged(caches: Caches, draw: Draw) -> str:
    """The drawn caption with the class in the trigger's place; the class alone where no caption was drawn."""
    role = CLASS_ONLY if draw.caption is None else DOP
    return [part["key"] for part in draw.row["roles"] if part["role"] == role][draw.caption or 0]


METHODS: dict[str, Method] = {
    "flow": Method(None, _beside, _flow),
    "dop": Method("preservation", partial(_preserved, _exchanged), _change),
    "blank": Method("preservation", partial(_preserved, lambda caches, draw: caches.key(NULL_TEXT)), _change),
}


def of(config: Config) -> dict[str, Method]:
    """The methods of a configuration by name, in the order of their passes."""
    return {name: choose(METHODS, name, setting="method") for name in config.methods}
