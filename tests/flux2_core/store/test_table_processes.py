"""flux2_core.store.table under several processes at once: creation races, overlapping writers, SIGKILL."""

import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from flux2_core.store import objects
from flux2_core.store.table import Table, _create
from tests.flux2_core.store_writers import (
    SMALL,
    assert_exactly,
    create,
    encoded,
    fill,
    like_text,
    race_to_create,
    reaching,
    row,
    write_into_little,
    write_until_killed,
)
from tests.warm import PROCESSES

BATCH = SMALL["batch_rows"]


def test_creation_race(tmp_path):
    """Of two processes that create one table with different fingerprints, one wins and the other is refused."""
    uri = str(tmp_path / "text.lance")
    barrier, results = PROCESSES.Barrier(2), PROCESSES.SimpleQueue()
    racers = [PROCESSES.Process(target=race_to_create, args=(uri, name, barrier, results)) for name in "ab"]
    for process in racers:
        process.start()
    said = {results.get(), results.get()}
    for process in racers:
        process.join(60)
    winner = Table.open(uri).fingerprint["template"]
    assert winner in said
    (refusal,) = said - {winner}
    assert f'found "{winner}"' in refusal


def test_late_creator_keeps_the_rows(root):
    """A process that still thinks the table is missing gets the other's table, rows included; Lance would empty it."""
    table = create(root)
    fill(table, range(5))
    late = _create(table.uri, "text", {"template": "another"})
    assert late.version == Table.open(table.uri).version == 2
    assert_exactly(table.uri, range(5))


def test_storage_format(tmp_path):
    """Blob v2 needs file format 2.2; readers hold row ids across compaction only when those are stable."""
    dataset = create(str(tmp_path)).dataset
    assert dataset.data_storage_version == "2.2"
    assert dataset.has_stable_row_ids


def test_creation_race_on_threads(root):
    """Eight threads that create one table at once all get the same table."""
    for attempt in range(3):
        place = objects.join(root, str(attempt))
        with ThreadPoolExecutor(8) as pool:
            tables = list(pool.map(create, [place] * 8))
        assert {table.version for table in tables} == {1}


def run_all(target, arguments: list[tuple]) -> list[int]:
    """Run one process per tuple of arguments, all at once; their exit codes."""
    storage = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    processes = [PROCESSES.Process(target=reaching, args=(storage, target, *given)) for given in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def spread(cases: list, kept: set) -> list:
    return [pytest.param(*case, marks=() if case in kept else pytest.mark.all_cases) for case in cases]


KILLS = [(writers, seed) for writers, seeds in ((1, 12), (2, 8), (4, 6), (8, 4)) for seed in range(seeds)]


@pytest.mark.parametrize(("writers", "seed"), spread(KILLS, {(1, 0), (1, 7), (2, 3), (4, 1), (8, 2)}))
def test_killed_writers(tmp_path, writers, seed):
    """Reliability R7, 30 points: writers of one table that are killed while they encode and commit have lost one batch
    each at most, the table is whole, and a second run encodes just what is missing."""
    uri, rows, dice = str(tmp_path / "text.lance"), 60, random.Random(100 * writers + seed)
    orders = [dice.sample(range(rows), rows) for _ in range(writers)]
    logs = [str(tmp_path / f"{place}.log") for place in range(writers)]
    deaths = [(dice.randrange(rows), dice.uniform(0, 0.04)) for _ in range(writers)]
    given = list(zip([uri] * writers, orders, logs, *zip(*deaths, strict=True), strict=True))
    assert set(run_all(write_until_killed, given)) <= {-signal.SIGKILL, 0}
    table = create(str(tmp_path))
    there = set(table.keys())
    for log in logs:
        lost = {number for number in encoded(log) if row(number).key not in there}
        assert len(lost) <= BATCH
    assert len(list(table.keys())) == len(there)
    before = sum(row(number).key in there for number in range(rows))
    again = str(tmp_path / "again.log")
    write_until_killed(uri, list(range(rows)), again, -1, 0.0)
    assert len(encoded(again)) == rows - before
    assert_exactly(uri, range(rows), make=like_text)


PLACES = [(place, writers) for place in ("local", "s3") for writers in (2, 4, 8)]


@pytest.mark.s3
@pytest.mark.parametrize(("place", "writers"), spread(PLACES, {("local", 8), ("s3", 2)}))
def test_writers_at_once(request, tmp_path, place, writers):
    """Reliability R7, 6 cases: two, four and eight processes that create one table at once and write the same rows in
    orders of their own leave each row exactly once, in a folder and on object storage."""
    root = str(tmp_path) if place == "local" else request.getfixturevalue("s3_root")
    uri, dice = objects.join(root, "text.lance"), random.Random(writers)
    given = [(uri, dice.sample(range(40), 40), str(tmp_path / f"{n}.log"), -1, 0.0) for n in range(writers)]
    assert run_all(write_until_killed, given) == [0] * writers
    assert_exactly(uri, range(40), make=like_text)


@pytest.mark.parametrize("limit", spread([(1_000,), (40_000,), (120_000,), (200_000,)], {(1_000,), (200_000,)}))
def test_full_disk(tmp_path, limit):
    """Reliability R7, 4 cases: where the disk is full before or while the table grows, the writer says so and how to go
    on; what was committed is whole, and with room again the rest follows."""
    uri, results = str(tmp_path / "text.lance"), PROCESSES.SimpleQueue()
    run_all(write_into_little, [(uri, limit, results)])
    assert "free space and run" in results.get()
    table = create(str(tmp_path))
    there = list(table.keys())
    assert len(there) == len(set(there)) < 40
    write_until_killed(uri, list(range(40)), str(tmp_path / "log"), -1, 0.0)
    assert len(encoded(str(tmp_path / "log"))) == 40 - len(there)
    assert_exactly(uri, range(40), make=like_text)
