"""Preview files: tiles, grids, thinning."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux2_core.run import previews


def pictures(count: int, value: int) -> np.ndarray:
    return np.full((count, 16, 16, 3), value, dtype=np.uint8)


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What each grid was made of: rows, heads, the shade of every tile."""
    made: list[tuple] = []

    def grid(rows: list[str], columns: list[str], tiles: dict, *, title: str) -> Image.Image:
        made.append((rows, columns, {place: tile.getpixel((0, 0))[0] for place, tile in tiles.items()}, title))
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr(previews, "label_grid", grid)
    return made


def test_a_grid_has_the_base_model_and_every_step(tmp_path: Path, grids: list[tuple]) -> None:
    """Columns are the base model and the steps so far, rows the prompts; each tile is that step's and prompt's."""
    for step, value in ((0, 10), (250, 20), (500, 30)):
        stack = np.concatenate([pictures(1, value), pictures(1, value + 5)])
        path = previews.write(tmp_path, step, ["one", "two"], stack, title="run")
        assert path == tmp_path / f"step-{step:06d}.png"
        assert path.is_file()
    assert grids[-1] == (
        ["one", "two"],
        ["base model", "step 250", "step 500"],
        {(0, 0): 10, (0, 1): 20, (0, 2): 30, (1, 0): 15, (1, 1): 25, (1, 2): 35},
        "run",
    )


def test_an_earlier_grid_shows_no_later_step(tmp_path: Path, grids: list[tuple]) -> None:
    """Drawn again after a restart, step 250's grid has no column of step 500; a lost tile leaves a gap."""
    for step in (0, 250, 500):
        previews.write(tmp_path, step, ["one"], pictures(1, step // 10), title="run")
    previews.tile_path(tmp_path, 0, 0).unlink()
    previews.write_grid(tmp_path, 250, ["one"], title="run")
    assert grids[-1][1:3] == (["base model", "step 250"], {(0, 1): 25})


def test_drawn_means_all_of_it(tmp_path: Path, grids: list[tuple]) -> None:
    """A step is drawn when its grid and every prompt's tile are there."""
    assert not previews.drawn(tmp_path, 0, prompts=1)
    previews.write(tmp_path, 0, ["one", "two"], pictures(2, 0), title="run")
    assert previews.drawn(tmp_path, 0, prompts=2)
    assert not previews.drawn(tmp_path, 0, prompts=3)
    assert not previews.drawn(tmp_path, 250, prompts=2)
    previews.grid_path(tmp_path, 0).unlink()
    assert not previews.drawn(tmp_path, 0, prompts=2)
    assert not list(tmp_path.rglob(".*"))


def test_thinning_keeps_first_and_last() -> None:
    """At most `most` of any number of steps, in order, each once, the first and the last among them."""
    for count in range(1, 60):
        steps = list(range(0, count * 250, 250))
        for most in range(2, 8):
            kept = previews.thin(steps, most=most)
            assert len(kept) == len(set(kept)) == min(most, count)
            assert kept == sorted(kept)
            assert (kept[0], kept[-1]) == (steps[0], steps[-1])
            assert set(kept) <= set(steps)


def test_pictures_of_sample(tmp_path: Path, grids: list[tuple]) -> None:
    """One file per prompt as drawn, and their grid last."""
    files = previews.write_pictures(tmp_path / "new", ["a", "b"], list(pictures(2, 77)), title="t")
    assert [file.name for file in files] == ["001.png", "002.png", "grid.png"]
    assert np.array_equal(np.asarray(Image.open(files[1])), pictures(1, 77)[0])


@pytest.mark.parametrize("most_bytes", [30_000, 2_000, 1])
def test_small_png(tmp_path: Path, most_bytes: int) -> None:
    """A grid is halved until it fits a message; a limit that nothing meets ends at one pixel instead of never."""
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "grid.png")
    data = previews.small_png(tmp_path / "grid.png", most_bytes=most_bytes)
    assert len(data) <= max(most_bytes, 100)
    assert Image.open(io.BytesIO(data)).format == "PNG"


def test_a_small_grid_stays_as_it_is(tmp_path: Path) -> None:
    """What is small enough is handed on byte for byte."""
    Image.new("RGB", (4, 4)).save(tmp_path / "grid.png")
    whole = (tmp_path / "grid.png").read_bytes()
    assert previews.small_png(tmp_path / "grid.png", most_bytes=10_000) == whole
