"""Measures the embedded model: does it draw what a held-out caption says, and what does its VAE lose?

Legend: B pictures, uint8 (B, 64, 64, 3).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flux2_core.embedded.checker import agrees, look
from flux2_core.embedded.shapes import WORLD, Scene, all_scenes, caption, draw, is_held_out
from flux2_core.embedded.train_model import prompt_rows
from flux2_core.embedded.train_vae import pictures, psnr
from flux2_core.model.folder import ModelFolder
from flux2_core.model.sampler import draw as sample
from flux2_core.model.transformer import build, load_weights
from flux2_core.model.vae import Vae

STEPS = 20
AT_ONCE = 50


def load_transformer(model: ModelFolder) -> Any:
    """The embedded model's transformer in fp32, frozen."""
    transformer = build(model, dtype=torch.float32)
    load_weights(transformer, model, device=torch.device("cpu"))
    return transformer.eval()


def held_out_prompts(count: int, *, seed: int) -> list[tuple[Scene, str]]:
    """Scenes that training never saw, with captions that name all five words."""
    scenes = random.Random(f"held out {seed}").sample([s for s in all_scenes() if is_held_out(s)], count)
    return [(scene, caption(scene, seed=seed * 1_000_003 + number, full=True)) for number, scene in enumerate(scenes)]


def draw_prompts(
    model: ModelFolder, transformer: Any, prompts: Sequence[str], *, seed: int, steps: int = STEPS
) -> np.ndarray:
    """Draw one picture per prompt with the product's own sampler, 64 x 64."""
    vae, rows = Vae(model), prompt_rows(model, list(prompts))
    drawn = []
    for start in range(0, len(prompts), AT_ONCE):
        part = rows[start : start + AT_ONCE].float()
        latents = sample(
            transformer,
            part,
            [seed * 1_000_003 + start + number for number in range(len(part))],
            size=(WORLD, WORLD),
            steps=steps,
            guidance=1.0,
        )
        drawn.append(vae.decode(latents).numpy())
    return np.concatenate(drawn)


def score_drawings(model: ModelFolder, transformer: Any, *, count: int = 200, seed: int = 0) -> dict[str, float]:
    """Share of held-out prompts whose colour, shape and background are drawn, as the pixel checker sees them."""
    wanted = held_out_prompts(count, seed=seed)
    drawn = draw_prompts(model, transformer, [text for _, text in wanted], seed=seed)
    verdicts = [agrees(look(picture), scene) for picture, (scene, _) in zip(drawn, wanted, strict=True)]
    return {what: sum(verdict[what] for verdict in verdicts) / count for what in verdicts[0]}


def score_vae(model: ModelFolder, *, count: int = 100, seed: int = 999) -> dict[str, float]:
    """PSNR in dB of what comes back of pictures never seen: scenes, doodles, the demo subject and style."""
    scenes = [s for s in all_scenes() if is_held_out(s)][:count]
    owls = [Scene("owl", s.colour, s.size, s.place, s.background) for s in scenes]
    kinds = {
        "scenes": [draw(s, seed=seed + n) for n, s in enumerate(scenes)],
        "doodles": list(pictures(count, seed=seed, doodles=1.0)),
        "owls": [draw(s, seed=seed + n) for n, s in enumerate(owls)],
        "hatched": [draw(s, seed=seed + n, hatched=True) for n, s in enumerate(scenes)],
    }
    vae = Vae(model)
    return {
        kind: psnr(np.stack(drawn), vae.decode(vae.encode(torch.from_numpy(np.stack(drawn)))).numpy())
        for kind, drawn in kinds.items()
    }
