"""What a run begins with: each goal on each card is accepted, and fits the card at the real sizes."""

import shutil
import tomllib
from pathlib import Path

import pytest

from flows import moving_in
from flows.verb import read
from flows.verbs import VERBS
from flux2_core.config.reading import parse
from flux2_core.moving.starting import CARDS, GOALS, begin
from flux2_core.placement import planner
from tests.flux2_core.jobs import described


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("goal", GOALS)
def test_it_fits_the_card(goal: str, card: int) -> None:
    """FLUX.2-dev's own sizes, with 128 GB of host memory, are placed on the card that was named."""
    config = parse(tomllib.loads("\n".join(begin(goal, card, "photos"))))
    job = planner.job(config, described("dev"), world=1, local=1, host=128e9)
    placed = planner.decide(job, planner.card(config, None))
    assert placed.total <= 0.94 * card * 2**30


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("goal", GOALS)
def test_plan_accepts_it(
    goal: str, card: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, photos: Path
) -> None:
    """`plan` accepts the file that `init` writes, for each goal and card, beside a folder of pictures; the model and
    the sizes are those of the tests."""
    monkeypatch.chdir(tmp_path)
    for folder in ("mine/after", "mine/before") if goal == "edit" else ("mine",):
        shutil.copytree(photos, folder)
        for caption in Path(folder).glob("*.txt"):
            caption.write_text("paint it blue" if goal == "edit" else "[trigger], on a table")
    VERBS["init"].run(read(["init", "--goal", goal, "--card", str(card), "--data", "mine", "--out", "my.toml"], VERBS))
    small = [f"model.path={tiny_model}", "data.0.resolutions=[64]", "validate.size=64"]
    planned = VERBS["plan"].run(read(["plan", "my.toml", *small], VERBS))
    assert "refused" not in planned
    assert planned["samples"]["kept"] == 6


def test_a_dozen_lines() -> None:
    """Fifteen settings at most, each section with a comment on what a person must know."""
    for goal in GOALS:
        lines = begin(goal, 24, "photos")
        assert sum("=" in line.partition("#")[0] for line in lines) <= 15
        assert sum("#" in line for line in lines) >= 5


def test_the_command_names_the_same() -> None:
    """What `init` offers is what there is."""
    assert (tuple(GOALS), tuple(CARDS)) == (moving_in.GOALS, moving_in.CARDS)


def test_a_folder_with_quotes(tmp_path: Path) -> None:
    """Whatever a folder is called, the file says it."""
    for goal in GOALS:
        tree = tomllib.loads("\n".join(begin(goal, 48, f'{tmp_path}/a "b" \\c')))
        assert tree["data"][0]["path"].startswith(f'{tmp_path}/a "b" \\c')
