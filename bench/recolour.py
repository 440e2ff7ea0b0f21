"""What an edit LoRA of the embedded model learns: the shape of its reference in another colour.

Data, settings and measure as plain functions, for whoever trains it; figures are in docs/methods.md.
Legend: pictures are (64, 64, 3) uint8.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flux2_core.embedded.checker import find_background, find_colour, foreground
from flux2_core.embedded.score import load_transformer
from flux2_core.embedded.shapes import COLOURS, WORLD, Scene, all_scenes, draw
from flux2_core.embedded.train_model import prompt_rows
from flux2_core.lora.adapter import attach
from flux2_core.model import sampler
from flux2_core.model.folder import ModelFolder
from flux2_core.model.vae import Vae

PAIRS, UNSEEN, STEPS = 400, 50, 20
OVERLAP = 0.6  # least intersection over union with the reference's shape: place, size and outline in one figure
Pair = tuple[Scene, Scene]


def pairs(count: int, *, seed: int, taken: Sequence[Scene] = ()) -> list[Pair]:
    """(reference, target): scenes that differ in colour alone; small ones, of a token or two, are left out."""
    rng = random.Random(f"edit {seed}")
    chosen = rng.sample([one for one in all_scenes() if one.size != "small" and one not in taken], count)
    colours = [rng.choice([name for name in COLOURS if name != one.colour]) for one in chosen]
    return [
        (one, Scene(one.shape, to, one.size, one.place, one.background))
        for one, to in zip(chosen, colours, strict=True)
    ]


def caption(target: Scene) -> str:
    """What is asked for: where and how large it is, and on what, the reference alone says."""
    return f"a {target.colour} {target.shape}"


def data(folder: Path) -> None:
    """Write `after/` with captions, and `before/` with the references."""
    for number, (before, after) in enumerate(pairs(PAIRS, seed=1)):
        for name, scene in (("before", before), ("after", after)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw(scene, seed=number)).save(folder / name / f"{number:03d}.png")
        (folder / "after" / f"{number:03d}.txt").write_text(caption(after))


def settings(folder: Path) -> dict[str, object]:
    """Overrides of a configuration for the embedded model; noise levels are those that its base was trained with."""
    return {
        "data.0.path": str(folder / "after"), "data.0.references": [str(folder / "before")],
        "data.0.resolutions": [WORLD], "text.max_length": 32, "lora.rank": 64, "lora.alpha": 64,
        "train.steps": 500, "train.batch_size": 8, "train.learning_rate": 3e-3, "train.schedule": "cosine",
        "noise.distribution": "logit-normal", "noise.parameters": [1.5, 1.3],
    }  # fmt: skip


def right(drawn: np.ndarray, before: np.ndarray, pair: Pair) -> bool:
    """Whether a picture has the asked-for colour where the reference has its shape, on the reference's background."""
    if find_background(drawn) != pair[0].background:
        return False
    ours, theirs = (foreground(one, pair[0].background) for one in (drawn, before))
    overlap = (ours & theirs).sum() / max(1, (ours | theirs).sum())
    return bool(overlap > OVERLAP) and find_colour(drawn, ours) == pair[1].colour


@torch.no_grad()
def measure(model: ModelFolder, adapter: dict[str, torch.Tensor] | None, *, seed: int = 3) -> float:
    """Share of 50 references that training never saw which come out right; without an adapter that of the base."""
    unseen = pairs(UNSEEN, seed=1000 + seed, taken=[before for before, _ in pairs(PAIRS, seed=1)])
    transformer, vae = load_transformer(model), Vae(model)
    if adapter is not None:
        attach(transformer, adapter, device=torch.device("cpu"))
    shown = np.stack([draw(before, seed=50_000 + number) for number, (before, _) in enumerate(unseen)])
    latents = sampler.draw(
        transformer,
        prompt_rows(model, [caption(after) for _, after in unseen]).float(),
        [seed * 1_000_003 + number for number in range(UNSEEN)],
        size=(WORLD, WORLD),
        steps=STEPS,
        guidance=1.0,
        references_RBchw=[vae.encode(torch.from_numpy(shown))],
    )
    found = zip(vae.decode(latents).numpy(), shown, unseen, strict=True)
    return sum(right(*each) for each in found) / UNSEEN
