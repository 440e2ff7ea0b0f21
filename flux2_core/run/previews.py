"""Preview pictures on disk: one tile per prompt and step, and one labelled grid per step.

A grid has a row per prompt and a column per step: the base model first, then the steps drawn so far; on their left what
the model is shown. Tiles stay in `previews/tiles/`, so that a later step, or another process, can put together a new
grid.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from flux2_core.run.grid import label_grid
from flux2_core.store import atomic

BASE = 0
MOST_COLUMNS = 6


def tile_path(folder: Path, step: int, place: int) -> Path:
    """File of one tile."""
    return folder / "tiles" / f"step-{step:06d}" / f"{place:03d}.png"


def reference_path(folder: Path, place: int, number: int) -> Path:
    """File of a picture that the model is shown beside a prompt."""
    return folder / "tiles" / "references" / f"{place:03d}-{number}.png"


def drawn(folder: Path, step: int, *, prompts: int) -> bool:
    """Whether a step's tiles and grid are all there."""
    return grid_path(folder, step).is_file() and all(
        tile_path(folder, step, place).is_file() for place in range(prompts)
    )


def grid_path(folder: Path, step: int) -> Path:
    """File of one step's grid."""
    return folder / f"step-{step:06d}.png"


def write(folder: Path, step: int, prompts: Sequence[str], pictures_PHW3: np.ndarray, *, title: str) -> Path:
    """Write a step's tiles and its grid."""
    for place, picture in enumerate(pictures_PHW3):
        save(picture, tile_path(folder, step, place))
    return write_grid(folder, step, prompts, title=title)


def write_grid(folder: Path, step: int, prompts: Sequence[str], *, title: str) -> Path:
    """Put a grid together from the tiles of all steps up to this one; the middle ones are thinned out."""
    steps = sorted(int(path.name.removeprefix("step-")) for path in (folder / "tiles").glob("step-*"))
    shown = thin([s for s in steps if s <= step], most=MOST_COLUMNS)
    beside = [sorted((folder / "tiles" / "references").glob(f"{row:03d}-*.png")) for row in range(len(prompts))]
    first = max(map(len, beside), default=0)  # what is drawn stands behind what the model was shown
    tiles: dict[tuple[int, int], Image.Image] = {}
    for row, seen in enumerate(beside):
        drawn_ones = [(first + column, tile_path(folder, s, row)) for column, s in enumerate(shown)]
        for column, path in (*enumerate(seen), *drawn_ones):
            if path.is_file():
                tiles[row, column] = Image.open(path).convert("RGB")
    heads = [f"reference {number + 1}" for number in range(first)]
    heads += ["base model" if s == BASE else f"step {s}" for s in shown]
    path = grid_path(folder, step)
    _save(label_grid(list(prompts), heads, tiles, title=title), path)
    return path


def write_pictures(folder: Path, prompts: Sequence[str], pictures: Sequence[np.ndarray], *, title: str) -> list[Path]:
    """Write pictures of the `sample` verb and their grid; return all files, the grid last."""
    files = [folder / f"{place + 1:03d}.png" for place in range(len(pictures))]
    for path, picture in zip(files, pictures, strict=True):
        save(picture, path)
    tiles = {(place, 0): Image.fromarray(picture) for place, picture in enumerate(pictures)}
    _save(label_grid(list(prompts), [""], tiles, title=title), folder / "grid.png")
    return [*files, folder / "grid.png"]


def write_strip(path: Path, prompts: Sequence[str], strengths: Sequence[float], pictures_PNHW3: np.ndarray) -> None:
    """Write what a slider makes of each prompt, from its lowest strength to its highest."""
    tiles = {(row, place): one for row, strip in enumerate(pictures_PNHW3) for place, one in enumerate(strip)}
    heads = [f"strength {strength:g}" for strength in strengths]
    _save(label_grid(list(prompts), heads, tiles, title="from strength to strength"), path)


def small_png(path: Path, *, most_bytes: int) -> bytes:
    """A grid as PNG bytes, halved in size until it is small enough to travel inside a message."""
    data = path.read_bytes()
    image = Image.open(path).convert("RGB")
    while len(data) > most_bytes and min(image.size) > 1:
        image = image.reduce(2)
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        data = buffer.getvalue()
    return data


def thin(steps: list[int], *, most: int) -> list[int]:
    """At most `most` steps, evenly chosen, the first and the last always among them."""
    if len(steps) <= most:
        return steps
    places = np.linspace(0, len(steps) - 1, most).round().astype(int)
    return [steps[place] for place in places]


def save(picture_HW3: np.ndarray, path: Path) -> None:
    """Write one picture."""
    _save(Image.fromarray(picture_HW3), path)


def _save(image: Image.Image, path: Path) -> None:
    with atomic.writing(path) as stream:
        image.save(stream, format="PNG")
