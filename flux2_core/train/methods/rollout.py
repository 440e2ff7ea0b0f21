"""Rollout (scheduled sampling): flow matching from where the sampler gets by itself, not from picture and noise mixed.

While drawing, the model sees what it made of a noisier level; while training, a picture and noise mixed exactly. Here k
steps of the sampler are made from a noisier mixture, by the model as it is and without gradient, and the target leads
from the point x that they reach at sigma to the picture: (x - x0) / sigma. That is flow matching with other noise,
(x - (1 - sigma) x0) / sigma in the drawn one's place, and so it is computed: what `flow` can do it does from there.

References: scheduled sampling (arXiv 1506.03099), for flow matching ReflexFlow (arXiv 2512.04904); AI Toolkit's
`next_sample` is one step of it.

Legend: B samples of one worker or of a part of them, K = k + 1 levels from the start of a rollout to its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flux2_core.config.objective import Noise
from flux2_core.config.routing import SAMPLER_STEPS
from flux2_core.config.sections import Config
from flux2_core.model.flow import add_noise
from flux2_core.model.latents import from_tokens
from flux2_core.model.seeded import numpy_generator
from flux2_core.noise import factor
from flux2_core.train.methods import flow
from flux2_core.train.methods.protocol import Batch, Caches, Carried, Draw, Model


def carry(caches: Caches, draws: Sequence[Draw]) -> Carried:
    """What flow matching carries, and in a step that is rolled out the levels of each sample's way."""
    found, config = flow.carry(caches, draws), caches.config
    seed, _, step, _ = draws[0].origin
    if not (steps := length(config, seed, step)):
        return found
    ways = []
    for draw in draws:
        grid = sampler(config.noises[draw.row["dataset"]], tokens=draw.noise_chw[0].numel())
        ways.append(way(draw.sigma, steps, grid).tolist())
    return {**found, "levels_BK": torch.tensor(ways)}


def terms(model: Model, batch: Batch, own: Carried) -> Iterator[Tensor]:
    """Flow matching from the point that is reached; for `rollout.reflexflow` with the prediction at the exact one."""
    if "levels_BK" in own:
        levels_BK = own["levels_BK"]
        if model.config.rollout.reflexflow:
            with torch.no_grad():
                exact_BSc = model.predict(*batch.seen()).float()
            own = {**own, "exact_BSc": exact_BSc, "rolled_B": _rolled(levels_BK)}
        batch = reached(model, batch, levels_BK)
    yield from flow.terms(model, batch, own)


@torch.no_grad()
def reached(model: Model, batch: Batch, levels_BK: Tensor) -> Batch:
    """The batch with the noise that what the sampler reaches has; the drawn noise, to the bit, where there is no way.

    The steps are made with all tokens, whatever `tread.routes` says, as pictures are drawn.
    """
    x_Bchw = add_noise(batch.latents_Bchw, batch.noise_Bchw, levels_BK[:, 0])
    whole, (height, width) = replace(batch, routes_RBk=()), batch.latents_Bchw.shape[2:]
    for now_B, then_B in zip(levels_BK.T[:-1], levels_BK.T[1:], strict=True):
        velocity_BSc = model.predict(x_Bchw, *replace(whole, sigma_B=now_B).seen()[1:]).float()
        x_Bchw = x_Bchw + _each(then_B - now_B) * from_tokens(velocity_BSc, height=height, width=width)
    noise_Bchw = (x_Bchw - _each(1 - batch.sigma_B) * batch.latents_Bchw) / _each(batch.sigma_B)
    return replace(batch, noise_Bchw=torch.where(_each(_rolled(levels_BK)), noise_Bchw, batch.noise_Bchw))


def length(config: Config, seed: int, step: int) -> int:
    """Steps of a rollout in this optimizer step, 0: none. All workers draw the same: each of their passes needs all."""
    rng, (first, last) = numpy_generator(seed, "rollout", step), config.rollout.ends
    share = first + (last - first) * step / max(config.train.steps - 1, 1)
    return int(rng.integers(1, config.rollout.steps, endpoint=True)) if rng.random() < share else 0


def sampler(noise: Noise, *, tokens: int) -> NDArray[np.float64]:
    """A sampler's levels from 0 to 1: those of `distribution = "levels"`, else of FLUX.2's with 50 steps."""
    own = noise.distribution == "levels"
    plain = np.asarray(noise.grid) if own else np.arange(1, SAMPLER_STEPS + 1) / SAMPLER_STEPS
    by = factor(noise.shift if own else "flux2", tokens)
    return np.unique([0.0, *(by * plain / (1 + (by - 1) * plain)), 1.0])


def way(sigma: float, steps: int, grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """Levels from so many sampler's steps before sigma to it; all sigma behind the last level, where no sampler is.

    Between two levels of the grid a step is as long as in between; before pure noise there is nothing, and steps of no
    length stand in their place, so that all samples of a batch make the same number of them.
    """
    if sigma < grid[1]:
        return np.full(steps + 1, sigma)
    places = np.arange(len(grid))
    levels = np.interp(np.interp(sigma, grid, places) + np.arange(steps, -1, -1), places, grid)
    levels[-1] = sigma
    return levels


def _rolled(levels_BK: Tensor) -> Tensor:
    return levels_BK[:, 0] > levels_BK[:, -1]


def _each(number_B: Tensor) -> Tensor:
    return number_B.view(-1, 1, 1, 1)
