"""Draws the embedded model's world: one coloured shape on a background, with its caption, as pure functions of a seed.

Legend: side = pixels of a square picture; the world is 64 units wide whatever the side. Pictures are (side, side, 3)
uint8 arrays. A scene is five words; what a seed adds (a shift of up to 1.5 units, a shade, the caption's wording) is
what the words leave open. The two demo concepts are drawn here too; the embedded model never saw them.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

WORLD = 64
OVERSAMPLING = 4
JITTER = 1.5  # units that a shape is shifted by, each way
SHADE = 10  # grey levels that a colour is shifted by, each way
HELD_OUT = 0.1  # share of all scenes that training never sees

COLOURS = {
    "red": (215, 35, 40),
    "orange": (245, 135, 25),
    "yellow": (245, 220, 35),
    "green": (40, 160, 65),
    "cyan": (60, 205, 220),
    "blue": (40, 75, 215),
    "purple": (130, 50, 175),
    "pink": (250, 135, 190),
}
BACKGROUNDS = {  # two tones and the pattern that lays them out
    "white": ((248, 248, 248), (248, 248, 248), "plain"),
    "black": ((14, 14, 14), (14, 14, 14), "plain"),
    "grey": ((128, 128, 128), (128, 128, 128), "plain"),
    "beige": ((228, 208, 172), (228, 208, 172), "plain"),
    "striped": ((70, 74, 84), (196, 200, 206), "stripes"),
    "checkered": ((246, 246, 246), (172, 172, 172), "checks"),
}
SIZES = {"small": 10.5, "medium": 15.0, "large": 20.0}  # radius in units
PLACES = {"centre": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
MARGIN = 5  # units between a shape and the edge, before the shift
TILE = 8  # units of a stripe, a check, or (along a row) of a band of the hatched style

PLACE_WORDS = {"centre": "in the centre", **{side: f"at the {side}" for side in ("left", "right", "top", "bottom")}}
FULL_CAPTIONS = (
    "a {size} {colour} {shape} {place} on a {background} background",
    "a {size} {colour} {shape} on a {background} background, {place}",
    "a {background} background with a {size} {colour} {shape} {place}",
)
SHORT_CAPTIONS = (
    "a {colour} {shape} on a {background} background",
    "a {colour} {shape} {place} on a {background} background",
    "a {size} {colour} {shape} on a {background} background",
)
EXTRA_WORDS = "a photo of the drawing in style painting picture with two three owl face hatched lines and , . on at"


def _star() -> tuple[tuple[float, float], ...]:
    angles = [(math.pi * k / 5, 1.0 if k % 2 == 0 else 0.42) for k in range(10)]
    return tuple((r * math.sin(a), -r * math.cos(a)) for a, r in angles)


POLYGONS: dict[str, tuple[tuple[float, float], ...]] = {  # corners for a radius of one, y down
    "circle": tuple((math.sin(math.pi * k / 32), math.cos(math.pi * k / 32)) for k in range(64)),
    "square": ((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)),
    "triangle": ((0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)),
    "star": _star(),
    "cross": ((-0.34, -1), (0.34, -1), (0.34, -0.34), (1, -0.34), (1, 0.34), (0.34, 0.34), (0.34, 1), (-0.34, 1),
              (-0.34, 0.34), (-1, 0.34), (-1, -0.34), (-0.34, -0.34)),
    "diamond": ((0.0, -1.0), (0.85, 0.0), (0.0, 1.0), (-0.85, 0.0)),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross")  # those of scenes; doodles have the others too
OWL_GROWTH = 1.25  # an owl is larger than a shape of its size, for its eyes to be seen at 64 pixels
OWL_COLOURS = ((120, 72, 34), (250, 250, 245), (20, 20, 20), (245, 150, 20))  # disc, eyes, pupils, beak
OWL_DISCS = (  # centre x, centre y, radius of disc, eyes and pupils, for a radius of one
    (0.0, 0.0, 1.0),
    (-0.43, -0.18, 0.42),
    (0.43, -0.18, 0.42),
    (-0.4, -0.18, 0.21),
    (0.4, -0.18, 0.21),
)
OWL_BEAK = ((-0.28, 0.22), (0.28, 0.22), (0.0, 0.78))
HATCH = 0.42  # brightness of a hatch line against the shape's colour: dark, and still seen on black


@dataclass(frozen=True)
class Scene:
    """What a caption says: five words, keys of the tables above (`shape` may also be "owl", the demo subject)."""

    shape: str
    colour: str
    size: str
    place: str
    background: str


def all_scenes() -> list[Scene]:
    """Every scene of the world, in a fixed order."""
    words = itertools.product(SHAPES, COLOURS, SIZES, PLACES, BACKGROUNDS)
    return [Scene(*five) for five in words]


def is_held_out(scene: Scene) -> bool:
    """Whether training never sees this combination of words."""
    words = " ".join((scene.shape, scene.colour, scene.size, scene.place, scene.background))
    return hashlib.sha256(words.encode()).digest()[0] < HELD_OUT * 256


def caption(scene: Scene, *, seed: int, full: bool = False) -> str:
    """A sentence for a scene; `full` ones name all five words, others may leave size or place open."""
    rng = random.Random(f"caption {seed}")
    forms = FULL_CAPTIONS if full or rng.random() < 0.7 else SHORT_CAPTIONS
    return rng.choice(forms).format(
        shape=scene.shape,
        colour=scene.colour,
        size=scene.size,
        place=PLACE_WORDS[scene.place],
        background=scene.background,
    )


def tokenizer_corpus() -> list[str]:
    """Sentences that hold every word of the captions often enough to become one token each."""
    scenes = all_scenes()
    return [caption(scene, seed=number, full=True) for number, scene in enumerate(scenes)] + [EXTRA_WORDS] * 200


def draw(scene: Scene, *, seed: int, side: int = WORLD, hatched: bool = False) -> np.ndarray:
    """Draw a scene.

    Args:
        scene: What is seen.
        seed: Of the shift and the shade.
        side: Pixels.
        hatched: The demo style: dark diagonal bands over the shape and a dark outline.
    """
    rng = random.Random(f"draw {seed}")
    scale = side * OVERSAMPLING / WORLD
    x, y, radius = place_shape(scene, shift=(rng.uniform(-JITTER, JITTER), rng.uniform(-JITTER, JITTER)))
    canvas = Image.fromarray(background_pixels(scene.background, side=side * OVERSAMPLING))
    if scene.shape == "owl":
        draw_owl(canvas, x * scale, y * scale, radius * scale)
    else:
        shift = rng.randint(-SHADE, SHADE)
        ink = tuple(min(255, max(0, level + shift)) for level in COLOURS[scene.colour])
        corners = [((x + radius * u) * scale, (y + radius * v) * scale) for u, v in POLYGONS[scene.shape]]
        _draw_shape(canvas, corners, ink, line=2.5 * scale if hatched else 0)
    return np.asarray(canvas.resize((side, side), Image.Resampling.BOX))


def place_shape(scene: Scene, *, shift: tuple[float, float] = (0.0, 0.0)) -> tuple[float, float, float]:
    """Centre and radius of a scene's shape, in units."""
    radius = SIZES[scene.size] * (OWL_GROWTH if scene.shape == "owl" else 1)
    room = WORLD / 2 - radius - MARGIN
    right, down = PLACES[scene.place]
    return WORLD / 2 + right * room + shift[0], WORLD / 2 + down * room + shift[1], radius


def background_pixels(name: str, *, side: int) -> np.ndarray:
    """A background without a shape, (side, side, 3) uint8."""
    first, second, pattern = BACKGROUNDS[name]
    tile = np.arange(side) * WORLD // (side * TILE)
    odd = {
        "plain": np.zeros((side, side), dtype=bool),
        "stripes": np.broadcast_to((tile % 2 == 1)[:, None], (side, side)),
        "checks": (tile[:, None] + tile[None, :]) % 2 == 1,
    }[pattern]
    return np.where(odd[..., None], np.array(second, np.uint8), np.array(first, np.uint8))


def hatch_lines(side: int) -> np.ndarray:
    """Where the hatched style is dark: (side, side) bool, diagonal, fixed to the picture."""
    axis = (np.arange(side) + 0.5) * WORLD / side
    return (axis[:, None] + axis[None, :]) % (2 * TILE) < TILE


def doodle(*, seed: int, side: int = WORLD) -> np.ndarray:
    """Random shapes, lines and patterns in any colours: what the VAE learns beside scenes, so that it can also
    carry what a user will teach."""
    rng = random.Random(f"doodle {seed}")
    wide = side * OVERSAMPLING
    canvas = Image.fromarray(background_pixels(rng.choice(list(BACKGROUNDS)), side=wide))
    if rng.random() < 0.5:
        canvas.paste(_any_colour(rng), (0, 0, wide, wide))
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.randint(1, 6)):
        x, y, radius = rng.uniform(0, wide), rng.uniform(0, wide), rng.uniform(0.03, 0.35) * wide
        box = (x - radius, y - radius, x + radius, y + radius)
        line = round(rng.uniform(0.02, 0.08) * wide)
        match rng.randrange(5):
            case 0:
                pen.ellipse(box, fill=_any_colour(rng), outline=_any_colour(rng), width=line)
            case 1:
                corners = [(x + radius * u, y + radius * v) for u, v in POLYGONS[rng.choice(list(POLYGONS))]]
                _draw_shape(canvas, corners, _any_colour(rng), line=rng.choice((0, line)))
            case 2:
                pen.line((x, y, rng.uniform(0, wide), rng.uniform(0, wide)), fill=_any_colour(rng), width=line)
            case 3:
                pen.ellipse(box, outline=_any_colour(rng), width=line)
            case _:
                draw_owl(canvas, x, y, radius, colours=[_any_colour(rng) for _ in range(4)])
    return np.asarray(canvas.resize((side, side), Image.Resampling.BOX))


def _any_colour(rng: random.Random) -> tuple[int, ...]:
    known = rng.choice((*COLOURS.values(), (20, 20, 20), (250, 250, 250)))
    return known if rng.random() < 0.5 else tuple(rng.randint(0, 255) for _ in range(3))


def _draw_shape(canvas: Image.Image, corners: list[tuple[float, float]], ink: tuple[int, ...], *, line: float) -> None:
    """Fill a polygon; with a `line` width also hatch it and draw its outline, both dark."""
    if line == 0:
        ImageDraw.Draw(canvas).polygon(corners, fill=ink)
        return
    dark = tuple(round(level * HATCH) for level in ink)
    mask = Image.new("L", canvas.size)
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    filling = np.where(hatch_lines(canvas.width)[..., None], np.array(dark, np.uint8), np.array(ink, np.uint8))
    canvas.paste(Image.fromarray(filling), (0, 0), mask)
    ImageDraw.Draw(canvas).line([*corners, corners[0], corners[1]], fill=dark, width=round(line), joint="curve")


def draw_owl(
    canvas: Image.Image, x: float, y: float, radius: float, *, colours: Sequence[tuple[int, ...]] = OWL_COLOURS
) -> None:
    """Draw a face; doodles have the same in other colours."""
    pen = ImageDraw.Draw(canvas)
    disc, eye, pupil, beak = colours
    for colour, (u, v, part) in zip((disc, eye, eye, pupil, pupil), OWL_DISCS, strict=True):
        cx, cy, r = x + u * radius, y + v * radius, part * radius
        pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=colour)
    pen.polygon([(x + u * radius, y + v * radius) for u, v in OWL_BEAK], fill=beak)
