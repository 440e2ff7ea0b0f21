"""The pool: work is pulled, dead actors are replaced, poisoned items stop the run."""

import os
import time
from pathlib import Path

import pytest
import ray

from flux2_core.errors import DataError, SetupError
from stages import pool

pytestmark = pytest.mark.ray


class Worker:
    """Doubles numbers; text items make it misbehave."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def ready(self) -> None:
        pass

    def work(self, item: object) -> object:
        if item == "die once" and not (self.folder / "died").exists():
            (self.folder / "died").touch()
            os._exit(1)
        if item == "die":
            os._exit(1)
        if item == "refuse":
            raise DataError("picture.png: refused; mend it")
        if item == "slow":
            time.sleep(3)
        return item

    def close(self) -> None:
        with (self.folder / "closed").open("a") as stream:
            stream.write("x")


class Late(Worker):
    """One actor of two is first; the other never gets its device."""

    def ready(self) -> None:
        try:
            (self.folder / "first").touch(exist_ok=False)
        except FileExistsError:
            time.sleep(600)


def run(items: list[object], folder: Path, actors: int = 2) -> list[object]:
    actor = ray.remote(num_cpus=0)(Worker)
    return list(pool.run(lambda: actor.remote(str(folder)), items, actors=actors))


def test_slow_item_holds_nobody(ray_runtime: None, tmp_path: Path) -> None:
    """While one actor is busy with a slow item, the other does all the rest; every actor is closed."""
    results = run(["slow", *range(8)], tmp_path)
    assert results[-1] == "slow"
    assert sorted(results[:-1], key=int) == list(range(8))
    assert (tmp_path / "closed").read_text() == "xx"


def test_dead_actor_is_replaced(ray_runtime: None, tmp_path: Path) -> None:
    """An item whose actor died is done by another one; nothing is lost and nothing done twice."""
    results = run(["die once", 1, 2, 3], tmp_path)
    assert sorted(map(str, results)) == ["1", "2", "3", "die once"]


def test_poisoned_item_stops_the_run(ray_runtime: None, tmp_path: Path) -> None:
    """An item that ends three actors stops the run with an error that names it."""
    with pytest.raises(SetupError, match="3 workers ended while they had 'die'"):
        run(["die", 1], tmp_path)


def test_our_errors_arrive_as_they_were(ray_runtime: None, tmp_path: Path) -> None:
    """An error of ours, raised in an actor, reaches the driver with its type and message."""
    with pytest.raises(DataError, match=r"picture\.png: refused; mend it"):
        run(["refuse"], tmp_path)


def test_actor_without_a_device_holds_no_work(ray_runtime: None, tmp_path: Path) -> None:
    """Where the cluster has room for one actor only, it does all the work and nobody waits for the other."""
    actor = ray.remote(num_cpus=0)(Late)
    began = time.monotonic()
    assert sorted(pool.run(lambda: actor.remote(str(tmp_path)), range(4), actors=2)) == [0, 1, 2, 3]
    assert time.monotonic() - began < 60
