"""Looks at the pixels of a picture and says what is drawn: colour, shape, background, and the two demo concepts.

No learned judge: the background is the nearest of six templates at the frame, the shape is what differs from it, and
its outline is compared with those that `shapes` would draw.

Legend: pictures are (64, 64, 3) uint8; masks are (64, 64) bool.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from flux2_core.embedded.shapes import (
    BACKGROUNDS,
    COLOURS,
    OWL_COLOURS,
    OWL_GROWTH,
    POLYGONS,
    SHAPES,
    SIZES,
    WORLD,
    Scene,
    background_pixels,
    draw_owl,
    hatch_lines,
)

FRAME = 3  # pixels at the edge that no shape reaches
DIFFERENT = 36  # mean grey levels from which a pixel is not background
FAR = 40  # mean grey levels of the frame above which no background is recognised
SMALLEST = 40  # pixels under which nothing is said to be drawn
COLOUR_REACH = 60.0  # largest distance in RGB to a named colour
LIKENESS = 0.6  # least overlap (intersection over union) with a named shape
BROWN_SHARE = 0.25  # least share of an owl that is brown (drawn: 0.6)
OWL_ERROR = 40.0  # largest mean error in grey levels inside an owl's disc (a plain brown disc: 53)
HATCH_CONTRAST = 0.25  # least share of brightness that the hatched style's bands lack (drawn: 0.55; plain: 0)


@dataclass(frozen=True)
class Seen:
    """What a picture shows; None where nothing fits."""

    background: str | None
    colour: str | None
    shape: str | None
    owl: bool
    hatched: bool


def look(picture: np.ndarray) -> Seen:
    """Say what a 64x64 picture shows."""
    picture = np.asarray(picture)
    assert picture.shape == (WORLD, WORLD, 3)
    background = find_background(picture)
    if background is None:
        return Seen(None, None, None, owl=False, hatched=False)
    mask = foreground(picture, background)
    if mask.sum() < SMALLEST:
        return Seen(background, None, None, owl=False, hatched=False)
    return Seen(
        background,
        find_colour(picture, mask),
        find_shape(picture, background, mask),
        owl=is_owl(picture, mask),
        hatched=is_hatched(picture, mask),
    )


def agrees(seen: Seen, scene: Scene) -> dict[str, bool]:
    """Which of colour, shape and background are as the scene says."""
    return {
        "colour": seen.colour == scene.colour,
        "shape": seen.shape == scene.shape,
        "background": seen.background == scene.background,
    }


def find_background(picture: np.ndarray) -> str | None:
    """The background whose frame is nearest, or None where none is near."""
    inner = slice(FRAME, -FRAME)
    frame = np.ones((WORLD, WORLD), dtype=bool)
    frame[inner, inner] = False
    errors = {
        name: np.abs(picture[frame].astype(int) - background_pixels(name, side=WORLD)[frame]).mean()
        for name in BACKGROUNDS
    }
    nearest = min(errors, key=lambda name: errors[name])
    return nearest if errors[nearest] < FAR else None


def foreground(picture: np.ndarray, background: str) -> np.ndarray:
    """The largest connected region that differs from the background, holes filled: a mask."""
    error = np.abs(picture.astype(int) - background_pixels(background, side=WORLD)).max(axis=2)
    different = error > DIFFERENT
    return _without_holes(_largest_region(different))


def find_colour(picture: np.ndarray, mask: np.ndarray) -> str | None:
    """The named colour nearest to the median inside a mask, or None where none is near."""
    inside = _shrunk(mask)
    pixels = picture[inside if inside.sum() > 20 else mask].astype(float)
    middle = np.median(pixels, axis=0)
    distances = {name: float(np.linalg.norm(middle - np.array(ink))) for name, ink in COLOURS.items()}
    nearest = min(distances, key=lambda name: distances[name])
    return nearest if distances[nearest] < COLOUR_REACH else None


def find_shape(picture: np.ndarray, background: str, mask: np.ndarray) -> str | None:
    """The named shape whose outline overlaps best with what is drawn, at the drawing's own place and size.

    Two outlines of the drawing are tried: `mask`, and the pixels in it that are nearer to its colour than to the
    background, which cuts soft edges at their middle.
    """
    inside = _shrunk(mask)
    ink = np.median(picture[inside if inside.any() else mask].astype(float), axis=0)
    ground = background_pixels(background, side=WORLD).astype(float)
    nearer = np.linalg.norm(picture - ink, axis=2) < np.linalg.norm(picture - ground, axis=2)
    cuts = [mask, _without_holes(_largest_region(nearer & mask))]
    likeness = {name: max(_likeness(name, cut) for cut in cuts) for name in SHAPES}
    best = max(likeness, key=lambda name: likeness[name])
    return best if likeness[best] > LIKENESS else None


def is_owl(picture: np.ndarray, mask: np.ndarray) -> bool:
    """Whether the demo subject, brown with white eyes and an orange beak, is where something is."""
    if _near(picture[mask], OWL_COLOURS[0]).mean() < BROWN_SHARE:
        return False
    top, bottom, left, right = _box(mask)
    x, y = (left + right) / 2, (top + bottom) / 2
    radii = [size * OWL_GROWTH for size in SIZES.values()]
    sizes = [radius for radius in radii if abs(2 * radius - max(bottom - top, right - left)) < 9]
    shifts = (-2, -1, 0, 1, 2)
    errors = (_owl_error(picture, x + dx, y + dy, size) for size in sizes for dx in shifts for dy in shifts)
    return min(errors, default=255.0) < OWL_ERROR


def is_hatched(picture: np.ndarray, mask: np.ndarray) -> bool:
    """Whether the shape is drawn in the demo style: dark diagonal bands over it."""
    inside = _shrunk(_shrunk(mask))
    if inside.sum() < 30:
        inside = _shrunk(mask)
    bright, lines = picture.max(axis=2).astype(float), hatch_lines(WORLD)
    on, off = inside & lines, inside & ~lines
    if min(on.sum(), off.sum()) < 8:
        return False
    return float(1 - bright[on].mean() / max(1.0, bright[off].mean())) > HATCH_CONTRAST


@cache
def _outline(name: str, shape: tuple[int, int]) -> np.ndarray:
    """A named shape stretched to fill a box."""
    corners = np.array(POLYGONS[name])
    low, high = corners.min(axis=0), corners.max(axis=0)
    size = np.array((shape[1], shape[0])) * 4
    canvas = Image.new("L", tuple(size.tolist()))
    ImageDraw.Draw(canvas).polygon([tuple(p) for p in ((corners - low) / (high - low) * (size - 1)).tolist()], fill=255)
    return np.asarray(canvas.resize((shape[1], shape[0]), Image.Resampling.BOX)) > 127


@cache
def _owl(size: float, x: float, y: float) -> tuple[np.ndarray, np.ndarray]:
    """An owl around a place, and its disc."""
    scale = 4
    canvas, disc = Image.new("RGB", (WORLD * scale,) * 2), Image.new("L", (WORLD * scale,) * 2)
    draw_owl(canvas, x * scale, y * scale, size * scale)
    r = size * scale
    ImageDraw.Draw(disc).ellipse((x * scale - r, y * scale - r, x * scale + r, y * scale + r), fill=255)
    side = (WORLD, WORLD)
    small = canvas.resize(side, Image.Resampling.BOX), disc.resize(side, Image.Resampling.BOX)
    return np.asarray(small[0]).astype(int), np.asarray(small[1]) > 127


def _owl_error(picture: np.ndarray, x: float, y: float, size: float) -> float:
    wanted, disc = _owl(size, x, y)
    return float(np.abs(picture[disc].astype(int) - wanted[disc]).mean())


def _near(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return np.linalg.norm(pixels.astype(float) - np.array(colour), axis=-1) < COLOUR_REACH


def _likeness(name: str, mask: np.ndarray) -> float:
    if mask.sum() < SMALLEST:
        return 0.0
    top, bottom, left, right = _box(mask)
    cut = mask[top:bottom, left:right]
    return _overlap(cut, _outline(name, cut.shape))


def _overlap(first: np.ndarray, second: np.ndarray) -> float:
    return float((first & second).sum() / max(1, (first | second).sum()))


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _shrunk(mask: np.ndarray) -> np.ndarray:
    """A mask less its outermost pixels."""
    wide = np.pad(mask, 1)
    return mask & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]


def _grown(mask: np.ndarray) -> np.ndarray:
    wide = np.pad(mask, 1)
    return mask | wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]


def _flood(seed: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Everything in `allowed` that is connected with `seed`."""
    while True:
        larger = _grown(seed) & allowed
        if (larger == seed).all():
            return seed
        seed = larger


def _largest_region(mask: np.ndarray) -> np.ndarray:
    best, rest = np.zeros_like(mask), mask.copy()
    while rest.sum() > best.sum():
        seed = np.zeros_like(mask)
        seed.flat[int(np.flatnonzero(rest)[0])] = True
        region = _flood(seed, rest)
        rest &= ~region
        if region.sum() > best.sum():
            best = region
    return best


def _without_holes(mask: np.ndarray) -> np.ndarray:
    outside = np.pad(~mask, 1, constant_values=True)
    corner = np.zeros_like(outside)
    corner[0, 0] = True
    return ~_flood(corner, outside)[1:-1, 1:-1]
