"""The pool: work is pulled, dead actors are replaced, poisoned items stop the run."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import ray

from flux2_core.errors import CacheloomError, DataError, SetupError
from stages import pool

pytestmark = pytest.mark.ray
QUICK = 8  # items beside a slow one


def wait_for(holds: Callable[[], bool]) -> None:
    """Wait until something holds, a minute at most."""
    deadline = time.monotonic() + 60
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)


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
        if item == "die" or (isinstance(item, list) and "die" in item):
            os._exit(1)
        if item == "stumble":
            raise LookupError("nothing there")
        if item == "refuse":
            raise DataError("picture.png: refused; mend it")
        if item == "slow":
            wait_for(lambda: len(list(self.folder.glob("quick-*"))) == QUICK)
            time.sleep(0.5)  # the last of them has still to be told
        if isinstance(item, int):
            (self.folder / f"quick-{item}").touch()
        if item == "moment":
            time.sleep(0.2)
            with (self.folder / "log").open("a") as stream:
                stream.write(f"{type(self).__name__} {time.monotonic()}\n")
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


class Stillborn:
    """Ends while it begins."""

    def __init__(self) -> None:
        os._exit(1)

    def ready(self) -> None:
        pass


def maker(folder: Path) -> Callable[[], object]:
    actor = ray.remote(num_cpus=0)(Worker)
    return lambda: actor.remote(str(folder))


def run(items: list[object], folder: Path, actors: int = 2) -> list[object]:
    return list(pool.run(maker(folder), items, actors=actors))


def test_slow_item_holds_nobody(ray_runtime: str, tmp_path: Path) -> None:
    """While one actor is busy with a slow item, the other does all the rest; every actor is closed."""
    results = run(["slow", *range(QUICK)], tmp_path)
    assert results[-1] == "slow"
    assert sorted(results[:-1], key=int) == list(range(QUICK))
    assert (tmp_path / "closed").read_text() == "xx"


def test_dead_actor_is_replaced(ray_runtime: str, tmp_path: Path) -> None:
    """An item whose actor died is done by another one; nothing is lost and nothing done twice."""
    results = run(["die once", 1, 2, 3], tmp_path)
    assert sorted(map(str, results)) == ["1", "2", "3", "die once"]


def test_poisoned_thing_is_named_after_the_rest(ray_runtime: str, tmp_path: Path) -> None:
    """A thing that ends every actor is found among its item's; all else is done before the error that names it."""
    done: list[str] = []
    results = pool.run(maker(tmp_path), [["a", "die", "b"], ["c", "d"]], actors=2, ahead=2)
    with pytest.raises(SetupError, match=r"ended every worker that had them, alone too: 'die'[;(]"):
        done.extend(thing for result in results for thing in result)
    assert sorted(done) == ["a", "b", "c", "d"]


def test_where_everything_ends_its_actor(ray_runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one item after the other ends its actors the run stops early, and says which and how they ended."""
    monkeypatch.setattr(pool, "SET_ASIDE", 2)
    with pytest.raises(SetupError, match=r"'die', 'die'.*(exit|died)"):
        run(["die"] * 20, tmp_path, actors=1)


def test_actors_that_cannot_begin(ray_runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Actors that end before they have done anything are not replaced for ever."""
    monkeypatch.setattr(pool, "IN_A_ROW", 2)
    broken = ray.remote(num_cpus=0)(Stillborn)
    with pytest.raises(SetupError, match="2 workers in a row ended before they finished anything"):
        list(pool.run(broken.remote, [1, 2], actors=1))


def test_foreign_errors_come_with_the_item(ray_runtime: str, tmp_path: Path) -> None:
    """An exception that is not ours ends the run as one line with the item's name, the kind and its message."""
    with pytest.raises(CacheloomError, match="'stumble': LookupError: nothing there; this is unexpected"):
        run([1, "stumble"], tmp_path)


class Other(Worker):
    """The other kind of worker that wants the same devices."""


@pytest.mark.parametrize("devices", [1, 2])
def test_two_kinds_share_devices(ray_runtime: str, tmp_path: Path, devices: int) -> None:
    """Two pools that run at once take turns on one device, and are side by side from the start on two."""
    cores = int(ray.cluster_resources()["CPU"]) // devices  # of one actor: only so many fit

    def use(kind: type) -> list[object]:
        actor = ray.remote(num_cpus=cores)(kind)
        return list(pool.run(lambda: actor.remote(str(tmp_path)), ["moment"] * 6, actors=devices))

    with ThreadPoolExecutor(2) as threads:
        assert all(len(done) == 6 for done in threads.map(use, (Worker, Other)))
    order = [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()]
    changes = sum(a != b for a, b in pairwise(order))
    assert changes == 1 if devices == 1 else changes > 1


def test_our_errors_arrive_as_they_were(ray_runtime: str, tmp_path: Path) -> None:
    """An error of ours, raised in an actor, reaches the driver with its type and message."""
    with pytest.raises(DataError, match=r"picture\.png: refused; mend it"):
        run(["refuse"], tmp_path)


def test_actor_without_a_device_holds_no_work(ray_runtime: str, tmp_path: Path) -> None:
    """Where the cluster has room for one actor only, it does all the work and nobody waits for the other."""
    actor = ray.remote(num_cpus=0)(Late)
    began = time.monotonic()
    assert sorted(pool.run(lambda: actor.remote(str(tmp_path)), range(4), actors=2)) == [0, 1, 2, 3]
    assert time.monotonic() - began < 60
