"""A picture of pictures: prompts down the left, steps along the top, readable without opening anything else."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, MUTED, EMPTY, EDGE = "#fbfaf7", "#1d1d1f", "#6e6d70", "#efede7", "#dcd9d1"
SMALL_PX, READABLE_PX = 128, 192  # tiles under the first are enlarged, in whole steps, to at least the second
PLAIN = str.maketrans({"–": "-", "—": "-", "‘": "'", "“": '"', "”": '"', "„": '"', "…": "...", "\xa0": " "})
FALLBACKS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "arial.ttf")
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Tile = Image.Image | np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class _Layout:
    """Sizes in pixels, all derived from the tile."""

    tile_width: int
    tile_height: int
    text: int
    gap: int
    margin: int
    label: int


def label_grid(
    rows: Sequence[str],
    columns: Sequence[str],
    tiles: Mapping[tuple[int, int], Tile],
    *,
    title: str,
) -> Image.Image:
    """Lay out tiles under column heads and beside wrapped row labels.

    Args:
        rows: labels, for instance prompts; wrapped at words, cut with an ellipsis where a tile is too low for them.
        columns: heads, for instance `base`, `step 250`.
        tiles: by (row index, column index), pictures or uint8 (H, W, 3); an absent one is drawn as an empty frame.
            Tiles under 128 px are enlarged without smoothing, so that what is seen is what was drawn.
        title: one line on top.
    """
    pictures = {place: _enlarged(tile) for place, tile in tiles.items()}
    layout = _layout([picture.size for picture in pictures.values()], labelled=any(rows))
    title, rows, columns = _drawable(title), [_drawable(row) for row in rows], [_drawable(column) for column in columns]
    letters = "".join((title, *rows, *columns))
    body, heading = _font(layout.text, letters), _font(round(layout.text * 1.45), letters)
    top = layout.margin + round(layout.text * 3.2)
    left = layout.margin + layout.label
    head = round(layout.text * 1.9)
    width = left + len(columns) * (layout.tile_width + layout.gap) - layout.gap + layout.margin
    width = max(width, math.ceil(heading.getlength(title)) + 2 * layout.margin)
    height = top + head + len(rows) * (layout.tile_height + layout.gap) - layout.gap + layout.margin
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((layout.margin, layout.margin), title, font=heading, fill=INK)
    for column, text in enumerate(columns):
        place = (left + column * (layout.tile_width + layout.gap), top)
        pen.text(place, _fitted(text, body, layout.tile_width), font=body, fill=MUTED)
    for row, text in enumerate(rows):
        y = top + head + row * (layout.tile_height + layout.gap)
        _draw_label(pen, text, body, layout=layout, y=y)
        for column in range(len(columns)):
            x = left + column * (layout.tile_width + layout.gap)
            _draw_tile(sheet, pen, pictures.get((row, column)), layout=layout, at=(x, y))
    return sheet


def wrap(text: str, font: Font, *, width_px: float, lines: int) -> list[str]:
    """Break text at words (inside a word only where it alone is too wide); at most `lines`, the last with `...`."""
    broken: list[str] = []
    line = ""
    for word in text.split():
        candidate = f"{line} {word}" if line else word
        if font.getlength(candidate) <= width_px:
            line = candidate
            continue
        if line:
            broken.append(line)
        while font.getlength(word) > width_px and len(word) > 1:
            cut = max(n for n in range(1, len(word)) if n == 1 or font.getlength(word[:n]) <= width_px)
            broken.append(word[:cut])
            word = word[cut:]
        line = word
    broken += [line] if line else []
    if len(broken) <= lines:
        return broken
    return [*broken[: lines - 1], _fitted(broken[lines - 1] + " " + broken[lines], font, width_px)]


def _layout(sizes: Sequence[tuple[int, int]], *, labelled: bool) -> _Layout:
    tile_width = max((width for width, _ in sizes), default=READABLE_PX)
    tile_height = max((height for _, height in sizes), default=READABLE_PX)
    text = max(15, round(tile_width / 26))
    label = text * 14 if labelled else 0
    return _Layout(tile_width, tile_height, text, gap=max(8, text // 2), margin=round(text * 1.6), label=label)


def _enlarged(tile: Tile) -> Image.Image:
    picture = (tile if isinstance(tile, Image.Image) else Image.fromarray(tile)).convert("RGB")
    longer = max(picture.size)
    factor = -(-READABLE_PX // longer) if longer < SMALL_PX else 1
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _draw_label(pen: ImageDraw.ImageDraw, text: str, font: Font, *, layout: _Layout, y: int) -> None:
    step = round(layout.text * 1.4)
    space = layout.label - step
    for number, line in enumerate(wrap(text, font, width_px=space, lines=max(1, layout.tile_height // step))):
        pen.text((layout.margin, y + number * step), line, font=font, fill=INK)


def _draw_tile(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, picture: Image.Image | None, *, layout: _Layout, at: tuple[int, int]
) -> None:
    x, y = at
    if picture is None:
        pen.rectangle((x, y, x + layout.tile_width - 1, y + layout.tile_height - 1), fill=EMPTY)
        return
    offset = ((layout.tile_width - picture.width) // 2, (layout.tile_height - picture.height) // 2)
    place = (x + offset[0], y + offset[1])
    sheet.paste(picture, place)
    pen.rectangle((place[0] - 1, place[1] - 1, place[0] + picture.width, place[1] + picture.height), outline=EDGE)


def _font(size: int, letters: str) -> Font:
    """Pillow's own font, which is ASCII only; for other letters the first installed font that has them all."""
    if letters.isascii():
        return ImageFont.load_default(size)
    for name in FALLBACKS:
        try:
            font = ImageFont.truetype(name, size)
        except OSError:
            continue  # not installed here
        missing = bytes(font.getmask("\U0010ffff"))
        if all(bytes(font.getmask(letter)) != missing for letter in set(letters) if not letter.isspace()):
            return font
    return ImageFont.load_default(size)


def _fitted(text: str, font: Font, width_px: float) -> str:
    if font.getlength(text) <= width_px:
        return text
    while text and font.getlength(text.rstrip() + "...") > width_px:
        text = text[:-1]
    return text.rstrip() + "..."


def _drawable(text: str) -> str:
    """One line of visible characters; typographic dashes and quotes, which Pillow's font lacks, become plain."""
    plain = " ".join(text.translate(PLAIN).split())
    return "".join(c for c in unicodedata.normalize("NFC", plain) if c.isprintable())
