"""Drawing pictures from cached prompt embeddings: FLUX.2's Euler sampler, without any text encoder.

Legend: B prompts, L text rows, D row width, S = h * w image tokens, c = 128 channels.
Reference: diffusers `Flux2Pipeline.__call__` and `Flux2KleinPipeline.__call__` with `FlowMatchEulerDiscreteScheduler`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from flux2_core.config.sections import Validate
from flux2_core.errors import UsageError
from flux2_core.model.flow import predict, sampling_sigmas
from flux2_core.model.folder import ModelFolder
from flux2_core.model.latents import CHANNELS, PIXELS_PER_TOKEN, from_tokens, position_ids, to_tokens
from flux2_core.model.seeded import generator


def guidance_of(validate: Validate, model: ModelFolder) -> float | None:
    """What `draw` takes as guidance: told to a model that embeds it, the scale of two passes where it does not.

    Raises:
        UsageError: the settings mean nothing to this model.
    """
    if model.guided:
        if validate.negative is not None:
            raise UsageError(
                f"validate.negative={validate.negative!r}: {model.family.name} embeds its guidance and takes no "
                "negative prompt; remove it, and set validate.guidance alone"
            )
        return validate.guidance
    if model.distilled and (validate.negative is not None or validate.guidance != 1):
        raise UsageError(
            f"{model.path}: a distilled {model.family.name} draws without guidance; remove validate.negative and "
            "validate.guidance, and set validate.steps to the few that it was distilled to (4 is usual)"
        )
    if (validate.negative is None) != (validate.guidance == 1):
        raise UsageError(
            f"validate.guidance={validate.guidance:g} and validate.negative={validate.negative!r}: {model.family.name} "
            'has no guidance embedding; set both (negative may be ""; 4 is usual), or neither'
        )
    return None if validate.negative is None else validate.guidance


@torch.no_grad()
def draw(
    transformer: Any,
    prompts_BLD: torch.Tensor,
    seeds: list[int],
    *,
    size: tuple[int, int],
    steps: int,
    guidance: float | None,
    negative_1LD: torch.Tensor | None = None,
    references_RBchw: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """Denoise one picture per prompt and seed; return normalised latents (B, 128, h, w), fp32.

    Args:
        transformer: the model, with or without its adapter.
        prompts_BLD: prompt embeddings, all rows, where the transformer is.
        seeds: one per prompt; a picture depends on its own seed alone.
        size: height and width in pixels, multiples of 16.
        steps: Euler steps.
        guidance: what the model is told, or the scale of what the negative prompt is left behind by; None: neither.
        negative_1LD: embedding of the negative prompt, for a model without guidance embedding: two passes a step.
        references_RBchw: latents of the pictures that are seen beside the prompt, in order, free of noise.
    """
    device = prompts_BLD.device
    h, w = (side // PIXELS_PER_TOKEN for side in size)
    noise = [torch.randn(CHANNELS, h, w, generator=generator(seed, "preview")) for seed in seeds]
    x_BSc = to_tokens(torch.stack(noise)).to(device)
    beside = [to_tokens(one).to(device) for one in references_RBchw]
    ids = position_ids(device, prompts_BLD.shape[1], (h, w), *(tuple(one.shape[2:]) for one in references_RBchw))

    def seen(x_BSc: torch.Tensor, told_BLD: torch.Tensor, sigma_B: torch.Tensor, told: float | None) -> torch.Tensor:
        whole = torch.cat([x_BSc, *beside], dim=1) if beside else x_BSc
        return predict(transformer, whole, told_BLD, sigma_B, guidance=told, **ids)[:, : x_BSc.shape[1]].float()

    def velocity(x_BSc: torch.Tensor, sigma_B: torch.Tensor) -> torch.Tensor:
        if negative_1LD is None or guidance is None:
            return seen(x_BSc, prompts_BLD, sigma_B, guidance)
        away = seen(x_BSc, negative_1LD.expand_as(prompts_BLD), sigma_B, None)
        return away + guidance * (seen(x_BSc, prompts_BLD, sigma_B, None) - away)

    sigmas = sampling_sigmas(h * w, steps)
    for now, then in itertools.pairwise(sigmas):
        sigma_B = now.expand(len(seeds)).to(device)
        x_BSc = x_BSc + (then - now).to(device) * velocity(x_BSc, sigma_B)
    return from_tokens(x_BSc, height=h, width=w).cpu()
