"""What preference pairs and a slider do to the embedded model, as its pixels say: the sizes of what is drawn.

Each effect is `data(folder)`, which writes its pictures, `settings(folder)`, and `measure(adapter)` of what training
gave; `python -m bench.effects_pairs NAME [SEED]` runs one of them and prints its figures.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from flux2_core.config.reading import parse
from flux2_core.config.sections import Config, Model
from flux2_core.embedded import MODEL_FOLDER
from flux2_core.embedded.checker import SMALLEST, agrees, find_background, find_shape, foreground, look
from flux2_core.embedded.score import draw_prompts, held_out_prompts, load_transformer
from flux2_core.embedded.shapes import POLYGONS, SIZES, WORLD, Scene, all_scenes, caption, draw
from flux2_core.lora.adapter import attach
from flux2_core.model.folder import resolve
from flux2_core.train.loop import run
from flux2_core.train.trainer import Trainer
from tests.in_process import PARTS, fill_cache, process_group

PAIRS = 48
PROMPTS = 50
Adapter = dict[str, torch.Tensor]


def sizeless(scenes: Sequence[Scene], *, seed: int) -> list[str]:
    """A caption for each scene that leaves its size open."""
    texts = (caption(scene, seed=seed * 1_000_003 + place, full=True) for place, scene in enumerate(scenes))
    return [text.replace(f"{scene.size} ", "") for text, scene in zip(texts, scenes, strict=True)]


@cache
def unit_area(shape: str) -> float:
    """Area of a shape of radius 1."""
    canvas = Image.new("L", (1000, 1000))
    ImageDraw.Draw(canvas).polygon([(500 + 400 * u, 500 + 400 * v) for u, v in POLYGONS[shape]], fill=1)
    return float(np.asarray(canvas).sum()) / 400**2


def area(picture: np.ndarray) -> float:
    """Pixels of what is drawn; 0 where there is nothing to see."""
    background = find_background(picture)
    found = 0.0 if background is None else float(foreground(picture, background).sum())
    return found if found >= SMALLEST else 0.0


def size(picture: np.ndarray) -> str | None:
    """The size's word that is nearest to what is drawn; None where no shape is recognised."""
    background = find_background(picture)
    if background is None or not (found := area(picture)):
        return None
    shape = find_shape(picture, background, foreground(picture, background))
    if shape is None:
        return None
    radius = (found / unit_area(shape)) ** 0.5
    return min(SIZES, key=lambda name: abs(SIZES[name] - radius))


def drawn(prompts: Sequence[str], adapter: Adapter | None, *, seed: int, strength: float = 1.0) -> np.ndarray:
    """Pictures (P, 64, 64, 3) of the embedded model, with an adapter at a strength or without."""
    model = resolve(Model(path=str(MODEL_FOLDER)), parts=PARTS)
    transformer = load_transformer(model)
    if adapter is not None:
        scaled = {name: value * (strength if "lora_B" in name else 1) for name, value in adapter.items()}
        attach(transformer, scaled, device=torch.device("cpu"))
    return draw_prompts(model, transformer, prompts, seed=seed)


def drift(adapter: Adapter | None, *, seed: int = 5) -> dict[str, float]:
    """Share of 50 scenes, told in full, that are drawn in their colour, shape, background and size."""
    scenes, prompts = zip(*held_out_prompts(PROMPTS, seed=seed), strict=True)
    pictures = drawn(prompts, adapter, seed=seed)
    found = [
        agrees(look(picture), scene) | {"size": size(picture) == scene.size}
        for picture, scene in zip(pictures, scenes, strict=True)
    ]
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]}


def common(folder: Path, *, seed: int) -> dict[str, Any]:
    """What the configurations of both effects share."""
    return {
        "model": {"path": str(MODEL_FOLDER)},
        "text": {"max_length": 32},
        "lora": {"rank": 16, "alpha": 16},
        "noise": {"distribution": "linear"},
        "validate": {"every": 0, "steps": 20},
        "output": {"root": str(folder / "runs"), "cache": str(folder / "cache")},
        "train": {"batch_size": 8, "learning_rate": 1e-3, "schedule": "cosine", "seed": seed},
    }


class Pairs:
    """Preference pairs: the same scene large and small, under a caption that names no size."""

    @staticmethod
    def data(folder: Path) -> None:
        """Write both folders."""
        scenes = random.Random("pairs").sample([one for one in all_scenes() if one.size == "large"], PAIRS)
        for number, (scene, text) in enumerate(zip(scenes, sizeless(scenes, seed=1), strict=True)):
            for name, word in (("better", "large"), ("worse", "small")):
                (folder / name).mkdir(exist_ok=True)
                sized = Scene(scene.shape, scene.colour, word, scene.place, scene.background)
                Image.fromarray(draw(sized, seed=number)).save(folder / name / f"{number:02d}.png")
            (folder / "better" / f"{number:02d}.txt").write_text(text, encoding="utf-8")

    @staticmethod
    def settings(folder: Path, *, seed: int = 42) -> dict[str, Any]:
        """The configuration as a tree."""
        tree = common(folder, seed=seed)
        pairs = {"preferred": str(folder / "better"), "rejected": str(folder / "worse"), "resolutions": [WORLD]}
        tree["train"] |= {"steps": 150}
        return tree | {"run": "pairs", "data": [pairs], "loss": {"preference_beta": 500.0}}

    @staticmethod
    def measure(adapter: Adapter | None) -> dict[str, float]:
        """Share of 50 prompts without a size whose shape is large, and what full prompts keep."""
        scenes = random.Random("unseen pairs").sample(all_scenes(), PROMPTS)
        sizes = [size(picture) for picture in drawn(sizeless(scenes, seed=2), adapter, seed=3)]
        return {name: float(np.mean([one == name for one in sizes])) for name in SIZES} | {
            f"kept {name}": share for name, share in drift(adapter).items()
        }


class Slider:
    """A size slider, learned from three prompts of one scene and no picture."""

    STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)

    @staticmethod
    def data(folder: Path) -> None:
        """No picture is needed."""

    @staticmethod
    def settings(folder: Path, *, seed: int = 42) -> dict[str, Any]:
        """The configuration as a tree."""
        tree = common(folder, seed=seed)
        scene = "red circle on a white background"
        told = {"target": f"a {scene}", "positive": f"a large {scene}", "negative": f"a small {scene}"}
        tree["train"] |= {"steps": 120, "batch_size": 4, "learning_rate": 2e-3}
        return tree | {"run": "slider", "data": [{"resolutions": [WORLD]}], "slider": told}

    @staticmethod
    def measure(adapter: Adapter | None) -> dict[str, float]:
        """Share of 50 prompts without a size whose shape grows from each strength to the next, and the mean sizes."""
        scenes = random.Random("unseen slider").sample(all_scenes(), PROMPTS)
        prompts = sizeless(scenes, seed=2)
        strips = [drawn(prompts, adapter, seed=3, strength=strength) for strength in Slider.STRENGTHS]
        sides = np.array([[area(picture) ** 0.5 for picture in pictures] for pictures in strips])
        found = {"monotonic": float(np.mean((np.diff(sides, axis=0) >= 0).all(0)))}
        found |= {
            f"side at {s:g}": round(float(each.mean()), 2) for s, each in zip(Slider.STRENGTHS, sides, strict=True)
        }
        for strength, pictures in zip(Slider.STRENGTHS, strips, strict=True):
            verdicts = [agrees(look(picture), scene) for picture, scene in zip(pictures, scenes, strict=True)]
            found[f"colour at {strength:g}"] = float(np.mean([each["colour"] for each in verdicts]))
            found[f"shape at {strength:g}"] = float(np.mean([each["shape"] for each in verdicts]))
        return found


EFFECTS = {"pairs": Pairs, "slider": Slider}


def trained(config: Config, folder: Path) -> Adapter:
    """The adapter that a configuration gives, in this process."""
    fill_cache(config)
    with process_group(folder):
        trainer = Trainer(config)
        run(trainer, lambda record: None)
    return trainer.weights()


def main(name: str, seed: int = 42) -> None:
    """Run one effect."""
    effect = EFFECTS[name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        effect.data(folder)
        adapter = trained(parse(effect.settings(folder, seed=seed)), folder)
        base = {} if name == "slider" else {"base": effect.measure(None)}  # whose size no strength changes
        print(json.dumps(base | {"lora": effect.measure(adapter)}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
