"""The preview grid, read back pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from flux2_core.run.grid import label_grid, wrap

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def tile(colour, size=64):
    return Image.new("RGB", (size, size), colour)


def boxes(sheet, colour):
    """(left, top, right, bottom) of a colour's pixels."""
    ys, xs = np.nonzero((np.asarray(sheet) == colour).all(-1))
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


def test_tiles_stand_in_their_row_and_column():
    """Columns go right and rows go down in the order given; pictures and uint8 arrays are drawn alike."""
    tiles = {(0, 0): tile(RED), (0, 1): np.asarray(tile(GREEN)), (1, 0): tile(BLUE)}
    sheet = label_grid(["one", "two"], ["base", "step 5"], tiles, title="run")
    red, green, blue = (boxes(sheet, colour) for colour in (RED, GREEN, BLUE))
    assert red[1] == green[1]
    assert red[2] < green[0]
    assert red[0] == blue[0]
    assert red[3] < blue[1]


@pytest.mark.parametrize(("size", "shown"), [(64, 192), (100, 200), (128, 128), (512, 512)])
def test_small_tiles_are_enlarged_in_whole_steps(size, shown):
    """Tiles under 128 px become at least 192 px without smoothing; larger ones stay as drawn."""
    checker = np.kron(np.indices((2, 2)).sum(0) % 2, np.ones((size // 2, size // 2)))[..., None] * (255, 0, 255)
    sheet = label_grid(["p"], ["c"], {(0, 0): checker.astype(np.uint8)}, title="t")
    left, top, right, bottom = boxes(sheet, (255, 0, 255))
    assert (right - left, bottom - top) == (shown, shown)
    inside = np.asarray(sheet)[top:bottom, left:right].reshape(-1, 3)
    assert {tuple(map(int, pixel)) for pixel in np.unique(inside, axis=0)} == {(255, 0, 255), (0, 0, 0)}


def test_large_tiles_stay_as_they_are():
    """A large tile is neither enlarged nor reduced."""
    wide = Image.new("RGB", (1024, 512), RED)
    left, top, right, bottom = boxes(label_grid(["p"], ["c"], {(0, 0): wide}, title="t"), RED)
    assert (right - left, bottom - top) == (1024, 512)


def test_labels_are_drawn():
    """The title, every head and every row label leave ink, and a changed label changes the picture."""
    tiles = {(0, 0): tile(RED)}
    drawn = [
        np.asarray(label_grid([row], [head], tiles, title=title))
        for row, head, title in (("a", "b", "c"), ("x", "b", "c"), ("a", "x", "c"), ("a", "b", "x"))
    ]
    assert all(drawn[0].shape == other.shape and (drawn[0] != other).any() for other in drawn[1:])


def test_a_missing_tile_is_an_empty_frame():
    """A prompt that was not drawn at a step leaves its place visible, not shifted."""
    sheet = label_grid(["p"], ["a", "b"], {(0, 1): tile(RED)}, title="t")
    assert boxes(sheet, (0xEF, 0xED, 0xE7))[2] < boxes(sheet, RED)[0]


@pytest.mark.parametrize("text", ["a photo of a zwx teapot, morning light", "x" * 90, "one " * 200, "", "a  b\n\nc"])
def test_wrapping_stays_inside(text):
    """No line is wider than asked, none are more than asked, and short texts lose no word."""
    font = ImageFont.load_default(15)
    lines = wrap(text, font, width_px=120, lines=6)
    assert len(lines) <= 6
    assert all(font.getlength(line) <= 120 for line in lines)
    whole = "".join(lines).replace(" ", "") == "".join(text.split())
    assert whole or (len(lines) == 6 and lines[-1].endswith("..."))


@pytest.mark.parametrize("text", ["café — “zwx”", "чайник", "a\x00b\u202ec", "🫖"])
def test_any_text_can_be_a_prompt(text):
    """Letters that Pillow's font lacks, control characters and emoji do not stop a run at its first preview."""
    sheet = label_grid([text], [text], {(0, 0): tile(RED)}, title=text)
    assert boxes(sheet, RED)[2] > 0


def test_nothing_to_show():
    """Without tiles and rows there is still a picture with the title."""
    assert label_grid([], [], {}, title="empty").width > 0
