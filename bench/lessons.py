"""Lessons for the embedded model, each learned within a minute, and what the pixel checker says of what was learned.

A new word is taught by pictures of what the model can draw: a `rook` is a purple cross. 60 steps of four pictures do
that; the demo's owl, which it never saw, takes 700 steps of eight. What is measured is a share of `COUNT` drawings of
scenes that no lesson shows, in `STEPS` steps, on noise that follows from the run's seed.

Legend: B drawings, uint8 (B, 64, 64, 3).
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from bench import effects_pairs, recolour
from flux2_core.config.reading import apply_override
from flux2_core.config.sections import Model
from flux2_core.embedded import MODEL_FOLDER
from flux2_core.embedded.checker import Seen, agrees, look
from flux2_core.embedded.demo_data import DEMO_SIZES
from flux2_core.embedded.score import held_out_prompts, load_transformer
from flux2_core.embedded.shapes import BACKGROUNDS, PLACES, WORLD, Scene, all_scenes, caption, draw, place_shape
from flux2_core.embedded.train_model import prompt_rows
from flux2_core.lora import adapter
from flux2_core.lora.names import B
from flux2_core.model import sampler
from flux2_core.model.folder import ModelFolder, resolve
from flux2_core.model.vae import Vae
from flux2_core.run import metrics
from flux2_core.train.trainer import Trainer

SHAPES = Path(__file__).parents[1] / "examples" / "shapes"  # the demos' regularisation set
PICTURES, COUNT, STEPS = 24, 36, 8
WORDS = {"rook": ("cross", "purple"), "knight": ("circle", "orange")}
Tree = dict[str, Any]  # sections of a configuration


def scenes(word: str) -> tuple[list[Scene], list[Scene]]:
    """Those that a word is taught by, and as many others that it is asked for in, in a fixed random order."""
    shape, colour = WORDS[word]
    every = [Scene(shape, colour, *rest) for rest in _layouts()]
    random.Random(word).shuffle(every)
    return every[:PICTURES], every[PICTURES : PICTURES + COUNT]


def _layouts() -> list[tuple[str, str, str]]:
    return [(size, place, ground) for size in DEMO_SIZES for place in PLACES for ground in BACKGROUNDS]


def wording(word: str, scene: Scene, *, seed: int, called: str) -> str:
    """A caption that names all but shape and colour, which `called` stands for."""
    return caption(scene, seed=seed, full=True).replace(" ".join(WORDS[word][::-1]), called)


def teach(folder: Path, word: str, *, change: Callable[[Image.Image, Scene, int], Image.Image] | None = None) -> Any:
    """Write a word's pictures and captions; returns its `[[data]]`."""
    target = folder / f"{word}s"
    target.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes(word)[0]):
        picture = Image.fromarray(draw(scene, seed=number))
        (change(picture, scene, number) if change else picture).save(target / f"{number:02d}.png")
        text = wording(word, scene, seed=number, called="[trigger]")
        (target / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    return {"path": str(target), "trigger": word, "class_name": "circle", "resolutions": [WORLD]}


def ordinary() -> dict[str, Any]:
    """The demos' regularisation set."""
    return {"path": str(SHAPES), "regularisation": True, "resolutions": [WORLD]}


def odd_looking(folder: Path) -> dict[str, Any]:
    """Ordinary scenes and captions, drawn in the hatched style: a regularisation set with a look of its own."""
    target = folder / "hatched"
    target.mkdir(parents=True, exist_ok=True)
    for number, (scene, text) in enumerate(held_out_prompts(PICTURES, seed=77)):
        Image.fromarray(draw(scene, seed=number, hatched=True)).save(target / f"{number:02d}.png")
        (target / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    return {"path": str(target), "regularisation": True, "resolutions": [WORLD]}


def cluttered(folder: Path) -> dict[str, Any]:
    """Rooks cut out by masks of pictures whose background is not the caption's: stripes, wherever they stand."""
    masks = folder / "masks"
    masks.mkdir(parents=True, exist_ok=True)

    def clutter(picture: Image.Image, scene: Scene, number: int) -> Image.Image:
        other = Scene(scene.shape, scene.colour, scene.size, scene.place, "striped")
        x, y, radius = place_shape(scene)
        mask = Image.new("L", picture.size)
        ImageDraw.Draw(mask).ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        mask.save(masks / f"{number:02d}.png")
        return Image.fromarray(draw(other, seed=number))

    return teach(folder, "rook", change=clutter) | {"masks": str(masks)}


def pairs(folder: Path) -> Tree:
    """The same scenes large and small, under captions that name no size: the large ones are preferred."""
    folder.mkdir(parents=True, exist_ok=True)
    effects_pairs.Pairs.data(folder)
    told = effects_pairs.Pairs.settings(folder)
    return {"data": told["data"], "loss": told["loss"]}


def slider(folder: Path) -> Tree:
    """A slider of size, told by three prompts, at its own settings."""
    told = effects_pairs.Slider.settings(folder)
    return {name: told[name] for name in ("data", "slider", "lora", "train")} | {"noise": {"shift": "none"}}


def recolouring(folder: Path) -> Tree:
    """An edit: the shape of a reference in the colour that the caption says, at its own settings."""
    recolour.data(folder)
    tree: Tree = {"data": [{}], "noise": {"shift": "none"}}
    for key, value in recolour.settings(folder).items():
        apply_override(tree, f"{key}={json.dumps(value)}")
    return tree


LESSONS: dict[str, Callable[[Path], Tree]] = {
    "rooks": lambda folder: {"data": [teach(folder, "rook"), ordinary()]},
    "rooks alone": lambda folder: {"data": [teach(folder, "rook")]},
    "rooks beside hatched pictures": lambda folder: {"data": [teach(folder, "rook"), odd_looking(folder)]},
    "rooks by masks": lambda folder: {"data": [cluttered(folder)]},
    "pairs of sizes": pairs,
    "a slider of size": slider,
    "recolouring": recolouring,
    "rooks and knights": lambda folder: {"data": [teach(folder, "rook"), teach(folder, "knight"), ordinary()]},
}


@cache
def embedded() -> ModelFolder:
    """The embedded model."""
    return resolve(Model(path=str(MODEL_FOLDER)), parts=("text_encoder", "tokenizer", "vae", "transformer"))


@cache
def _rows(prompts: tuple[str, ...]) -> torch.Tensor:
    return prompt_rows(embedded(), list(prompts)).float()


@cache
def _vae() -> Vae:
    return Vae(embedded())


def drawings(
    transformer: Any, prompts: Sequence[str], *, seed: int, steps: int = STEPS, guidance: float = 1.0
) -> np.ndarray:
    """A picture of each prompt, as a transformer draws it."""
    seeds = [seed * 1_000_003 + number for number in range(len(prompts))]
    how: Any = {"size": (WORLD, WORLD), "steps": steps, "guidance": guidance}
    return _vae().decode(sampler.draw(transformer, _rows(tuple(prompts)), seeds, **how)).numpy()


@dataclass(frozen=True)
class Pupil:
    """What has been trained, ready to draw."""

    trainer: Trainer

    @property
    def seed(self) -> int:
        """Of the training, and of the noise of its drawings."""
        return self.trainer.config.train.seed

    def draw(self, prompts: Sequence[str], *, base: bool = False, **how: Any) -> np.ndarray:
        """Drawings with what was learned, or of the base model (with its presets)."""
        weights = self.trainer.ema or self.trainer.weights()
        with self.trainer.wearing(weights) as worn, adapter.switched_off(worn) if base else nullcontext():
            return drawings(worn, prompts, seed=self.seed, **how)

    def at(self, strength: float, prompts: Sequence[str]) -> np.ndarray:
        """Drawings with what was learned at a strength."""
        scaled = {name: one * strength if B in name else one for name, one in self.trainer.weights().items()}
        with self.trainer.wearing(scaled) as worn:
            return drawings(worn, prompts, seed=self.seed)

    def apart(self, prompts: Sequence[str]) -> np.ndarray:
        """Drawings of the base model without presets and what was learned alone."""
        transformer = load_transformer(embedded())
        adapter.attach(transformer, self.trainer.weights(), device=torch.device("cpu"))
        return drawings(transformer, prompts, seed=self.seed)


def asked(word: str) -> list[str]:
    """Prompts for a word, in scenes that it was not taught in."""
    return [wording(word, scene, seed=1000 + number, called=word) for number, scene in enumerate(scenes(word)[1])]


def share_of(word: str, pictures: np.ndarray) -> float:
    """Share of the drawings that show what a word is."""
    return float(np.mean([(seen.shape, seen.colour) == WORDS[word] for seen in map(look, pictures)]))


def others() -> tuple[list[Scene], list[str]]:
    """Ordinary scenes, and prompts for them without any new word."""
    wanted, prompts = zip(*held_out_prompts(COUNT, seed=5), strict=True)
    return list(wanted), list(prompts)


def as_before(pupil: Pupil, prompts: Sequence[str]) -> float:
    """Share of prompts that still show what the base model draws for them on the same noise."""
    now, before = (pupil.draw(prompts, base=base) for base in (False, True))
    return float(np.mean([look(one) == look(other) for one, other in zip(now, before, strict=True)]))


def as_asked(pupil: Pupil) -> float:
    """Share of prompts without a new word whose colour, shape and background are drawn."""
    wanted, prompts = others()
    drawn = pupil.draw(prompts)
    return float(np.mean([all(agrees(look(one), scene).values()) for one, scene in zip(drawn, wanted, strict=True)]))


def _seen(true: Callable[[Seen], bool], pictures: np.ndarray) -> float:
    return float(np.mean([true(look(picture)) for picture in pictures]))


def grounds(pupil: Pupil) -> float:
    """Share of prompts for a rook whose background is drawn as it is asked for."""
    drawn = zip(pupil.draw(asked("rook")), scenes("rook")[1], strict=True)
    return float(np.mean([look(picture).background == scene.background for picture, scene in drawn]))


def purple(pupil: Pupil, prompt: str) -> float:
    """Share of drawings of one prompt that have a rook's colour."""
    return _seen(lambda seen: seen.colour == WORDS["rook"][1], pupil.draw([prompt] * COUNT))


def large(pupil: Pupil) -> float:
    """Share of prompts that name no size whose shape is drawn large."""
    return float(np.mean([effects_pairs.size(picture) == "large" for picture in pupil.draw(sizeless())]))


def growing(pupil: Pupil) -> float:
    """Share of prompts that name no size whose shape never shrinks from strength -2 to 2, and is larger at the end."""
    strips = [pupil.at(strength, sizeless()) for strength in effects_pairs.Slider.STRENGTHS]
    areas = np.array([[effects_pairs.area(picture) or 0.0 for picture in pictures] for pictures in strips])
    return float(np.mean((np.diff(areas, axis=0) >= 0).all(0) & (areas[-1] > areas[0])))


def sizeless() -> list[str]:
    """Prompts that name no size."""
    return effects_pairs.sizeless(random.Random("sizes").sample(all_scenes(), COUNT), seed=2)


def away(pupil: Pupil) -> float:
    """How far drawings of rooks are from what the base model draws without a prompt on the same noise, of 255."""
    here, there = pupil.draw(asked("rook")), pupil.draw([""] * COUNT, base=True)
    return float(np.abs(here.astype(float) - there).mean() / 255)


def unrest(pupil: Pupil) -> float:
    """How far one step's loss is from the next one's, as a share of the mean loss."""
    losses = [record["loss"] for record in metrics.read(pupil.trainer.folder.metrics)]
    return statistics.fmean(abs(b - a) for a, b in itertools.pairwise(losses)) / statistics.fmean(losses)


MEASURES: dict[str, Callable[[Pupil], float]] = {
    "rooks": lambda pupil: share_of("rook", pupil.draw(asked("rook"))),
    "rooks in 4 steps": lambda pupil: share_of("rook", pupil.draw(asked("rook"), steps=4)),
    "rooks at guidance 10": lambda pupil: share_of("rook", pupil.draw(asked("rook"), guidance=10.0)),
    "purple of the word alone": lambda pupil: purple(pupil, "rook"),
    "purple of no prompt": lambda pupil: purple(pupil, ""),
    "rooks without the preset": lambda pupil: share_of("rook", pupil.apart(asked("rook"))),
    "large shapes": large,
    "sizes that grow with strength": growing,
    "recoloured references": lambda pupil: recolour.measure(embedded(), pupil.trainer.weights(), seed=pupil.seed),
    "knights": lambda pupil: share_of("knight", pupil.draw(asked("knight"))),
    "others as before": lambda pupil: as_before(pupil, others()[1]),
    "no prompt as before": lambda pupil: as_before(pupil, [""] * COUNT),
    "others as asked": as_asked,
    "others hatched": lambda pupil: _seen(lambda seen: seen.hatched, pupil.draw(others()[1])),
    "backgrounds of rooks": grounds,
    "rooks' distance from no prompt": away,
    "unrest of the loss": unrest,
}
