"""Trains the embedded transformer from cached latents and prompt rows, as the product does: no encoder in the loop.

Legend: N pictures, T texts, B batch, S = 16 image tokens, c = 128 channels, L text rows, D row width.
Guidance is drawn at random and means nothing to this model, so that any value draws alike.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from flux2_core.config.sections import Text
from flux2_core.embedded.fitting import Plan, fit
from flux2_core.embedded.shapes import WORLD, all_scenes, caption, draw, is_held_out
from flux2_core.model.flow import add_noise, velocity
from flux2_core.model.folder import ModelFolder
from flux2_core.model.latents import PIXELS_PER_TOKEN, image_ids, text_ids, to_tokens
from flux2_core.model.text_encoder import TextEncoder
from flux2_core.model.vae import Vae

PLAN = Plan(steps=8000, batch=32, learning_rate=1.2e-3, warmup=200, save_every=150)
TEXT = Text(max_length=32, pads="stored")  # template 8 tokens, longest caption 12: the rest is for a user's words
PICTURES = 16000
ENCODED_AT_ONCE = 50
EMPTY_CAPTIONS = 0.05  # share of draws without a caption
SIGMA_CENTRE, SIGMA_SPREAD = 1.5, 1.3  # of the normal below the sigmoid: half of the 20 steps lie above 0.86
GUIDANCE = (1.0, 5.0)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lesson:
    """What the transformer is trained on."""

    latents_NSc: torch.Tensor
    texts_N: torch.Tensor
    rows_TLD: torch.Tensor
    """Prompt rows of each distinct caption; the first is the empty one."""


def training_pairs(*, seed: int) -> tuple[np.ndarray, list[str]]:
    """Draw the training pictures, each scene as often as any other, none of them held out, with their captions."""
    rng = random.Random(f"pairs {seed}")
    scenes = [scene for scene in all_scenes() if not is_held_out(scene)]
    chosen = [scene for _ in range(-(-PICTURES // len(scenes))) for scene in rng.sample(scenes, len(scenes))][:PICTURES]
    own = [seed * 1_000_003 + number for number in range(PICTURES)]
    pictures = np.stack([draw(scene, seed=number) for scene, number in zip(chosen, own, strict=True)])
    return pictures, [caption(scene, seed=number) for scene, number in zip(chosen, own, strict=True)]


def cache_lesson(model: ModelFolder, *, file: Path, seed: int) -> Lesson:
    """Encode all pictures and captions once, or read them from `file`."""
    if not file.exists():
        pictures, captions = training_pairs(seed=seed)
        vae = Vae(model)
        parts = np.array_split(pictures, -(-PICTURES // ENCODED_AT_ONCE))
        latents = torch.cat([to_tokens(vae.encode(torch.from_numpy(part))).half() for part in parts])
        texts = ["", *sorted(set(captions))]
        places = {text: place for place, text in enumerate(texts)}
        tensors = {
            "latents": latents.contiguous(),
            "texts": torch.tensor([places[text] for text in captions]),
            "rows": prompt_rows(model, texts),
        }
        save_file(tensors, file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)
        logger.info("%d pictures and %d captions are cached", len(pictures), len(texts))
    stored = load_file(file)
    return Lesson(stored["latents"], stored["texts"], stored["rows"])


def prompt_rows(model: ModelFolder, texts: list[str]) -> torch.Tensor:
    """The full prompt embeddings (T, L, D) of texts, pads and template included."""
    encoder = TextEncoder(model, TEXT)
    return torch.cat([torch.stack(encoder.encode(texts[at : at + 64])) for at in range(0, len(texts), 64)])


@torch.no_grad()
def quieten(transformer: Any) -> None:
    """Scale a random transformer's modulations and output down, so that training starts near the identity."""
    for name, parameter in transformer.named_parameters():
        if "modulation" in name or name.startswith(("norm_out", "proj_out")):
            parameter.mul_(0.1)


def train_transformer(transformer: Any, lesson: Lesson, *, work: Path, seed: int, plan: Plan = PLAN) -> float:
    """Train with the flow-matching loss; returns the seconds that it took."""
    side = WORLD // PIXELS_PER_TOKEN
    ids = {"img_ids": image_ids(side, side), "txt_ids": text_ids(TEXT.max_length)}
    quieten(transformer.train())

    def loss_at(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 10_000_019 + step)
        chosen = torch.randint(len(lesson.texts_N), (plan.batch,), generator=generator)
        clean_BSc = lesson.latents_NSc[chosen].float()
        empty = torch.rand(plan.batch, generator=generator) < EMPTY_CAPTIONS
        texts_B = torch.where(empty, 0, lesson.texts_N[chosen])
        sigma_B = torch.sigmoid(SIGMA_CENTRE + SIGMA_SPREAD * torch.randn(plan.batch, generator=generator))
        guidance_B = GUIDANCE[0] + (GUIDANCE[1] - GUIDANCE[0]) * torch.rand(plan.batch, generator=generator)
        noise_BSc = torch.randn(clean_BSc.shape, generator=generator)
        # on a CPU the fused attention's backward pass in bf16 takes 10x the plain one's time at 48 tokens
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            prediction_BSc = transformer(
                hidden_states=add_noise(clean_BSc, noise_BSc, sigma_B),
                encoder_hidden_states=lesson.rows_TLD[texts_B].float(),
                timestep=sigma_B,
                guidance=guidance_B,
                return_dict=False,
                **ids,
            )[0]
        return (prediction_BSc.float() - velocity(clean_BSc, noise_BSc)).square().mean()

    return fit(transformer, loss_at, plan=plan, file=work / "transformer.safetensors")
