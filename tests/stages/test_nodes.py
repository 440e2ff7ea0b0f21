"""Several nodes: work of a lost one moves on, and no row is lost or there twice."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from flux2_core.config.reading import dump_toml
from flux2_core.config.sections import Config
from flux2_core.store.table import Table
from tests.flows.command import Project
from tests.stages import nodes_process
from tests.warm import PROCESSES

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_lost_node(make_config: Callable[..., Config], tmp_path: Path) -> None:
    """Of two nodes one is lost while it encodes: the other does the rest, rows are there exactly once, and what was
    encoded twice is no more than a batch."""
    config = make_config(cluster={"encoders": 2})
    Path(config.output.root).mkdir()
    (tmp_path / "config.toml").write_text(dump_toml(config))
    process = PROCESSES.Process(target=nodes_process.show, args=(tmp_path / "config.toml", tmp_path / "told"))
    process.start()
    process.join()
    told = json.loads((tmp_path / "told").read_text())
    assert (told["encoded"], told["missing"], told["once"]) == (28, 0, True)
    assert (told["nodes"], told["alive"]) == (2, 2)
    assert told["tried"] <= 28 + 8 + 4, told  # a batch, and the item that it had


@pytest.mark.all_cases
@pytest.mark.parametrize("victim", ["ray::TextWorker", "ray::ImageWorker", "raylet", "driver"])
def test_killed_cache_command(tiny_model: Path, photos: Path, tmp_path: Path, victim: str) -> None:
    """`cacheloom cache` whose worker, whose Ray or which itself is killed while it encodes: it ends well by itself, or
    the same command again does; each row is there once, and what was committed is not encoded again."""
    project = Project(tmp_path, model=tiny_model, photos=photos)
    process = project.start("cache", "--json")
    driver = psutil.Process(process.pid)

    def found() -> list[psutil.Process]:
        if victim == "driver":
            tables = list((tmp_path / "cache").glob("*/*/_versions")) + list((tmp_path / "cache").glob("*/_versions"))
            return [driver] if tables else []
        return [one for one in driver.children(recursive=True) if one.name().startswith(victim[:15])]

    while process.poll() is None and not found():
        time.sleep(0.02)
    for one in found() if process.poll() is None else []:
        one.kill()
    process.wait(300)
    for told in (project.json("cache"), project.json("cache")):
        assert told["text"]["encoded"] + told["text"]["reused"] == 8  # six captions, the preview prompt, the empty one
    assert told["text"]["encoded"] == told["latents"]["encoded"] == 0
    for uri in (told["text"]["uri"], told["latents"]["uri"]):
        keys = list(Table.open(uri).keys())
        assert len(keys) == len(set(keys))
