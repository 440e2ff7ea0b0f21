"""The protocol by which alone the trainer knows what a step minimises.

A method names in `flux2_core.data.needs` what it takes from the cache; under the same name, in `methods.table`, it says
what a batch carries for it and gives its terms of the loss. One more method is one entry in each of the two tables.

Legend: B samples of one worker or of a part of them, S = h * w image tokens, c = 128, L text rows, D row width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from flux2_core.config.sections import Config
from flux2_core.model.flow import add_noise

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
    dropped_BR: Tensor | None = None
    """Of an adapter with dropout: what each rank of its Linears counts in this sample (`lora.told`)."""
    routes_RBk: tuple[Tensor, ...] = ()
    """Of each of `tread.routes` the places of the picture's tokens that stay in it; k differs between routes."""
    carried: Mapping[str, Carried] = field(default_factory=dict)
    """What is there for one method alone, by its name; B is the first dimension of each."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with each of its tensors changed: moved to a device, pinned, or cut to a part of the samples."""
        single: dict[str, Any] = {name: change(one) for name, one in vars(self).items() if torch.is_tensor(one)}
        carried = {of: {name: change(one) for name, one in own.items()} for of, own in self.carried.items()}
        for name in ("references_RBchw", "routes_RBk"):
            single[name] = tuple(map(change, getattr(self, name)))
        return replace(self, carried=carried, **single)

    def seen(self, prompts_BLD: Tensor | None = None) -> tuple[Any, ...]:
        """What a pass over it is told (`Model.predict`), with other prompts where some are given."""
        prompts_BLD = self.prompts_BLD if prompts_BLD is None else prompts_BLD
        told = self.noisy_Bchw(), prompts_BLD, self.sigma_B, self.references_RBchw, self.guidance_B
        return *told, self.routes_RBk

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
        routes_RBk: Sequence[Tensor] = (),
    ) -> Tensor:
        """Predicted velocity (B, S, c); of unsaid guidance by the mean of what is drawn, of no routes with all tokens.

        Two passes that are compared take the same routes: what differs between them is then what they are told.
        """

    def base(self) -> AbstractContextManager[None]:
        """Have the base model's own predictions inside, without a gradient."""

    def at(self, strength: float) -> AbstractContextManager[None]:
        """Have the adapter at a strength inside; 1 is its own."""


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
