"""flux2_core.store under several processes at once: creation races, overlapping writers, SIGKILL."""

import contextlib
import multiprocessing
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from flux2_core import objects, store
from flux2_core.errors import DataError
from flux2_core.store import Table
from flux2_core.store_reader import Reader
from tests.flux2_core.store_writers import assert_exactly, create, fill, race_to_create, write_share, write_until_killed

SPAWN = multiprocessing.get_context("spawn")  # Lance is not fork-safe


def test_exactly_once_under_four_writers(root):
    """Four processes that create one table at once and write overlapping keys leave each row exactly once."""
    uri = objects.join(root, "text.lance")
    barrier, results = SPAWN.Barrier(4), SPAWN.SimpleQueue()
    writers = [SPAWN.Process(target=write_share, args=(uri, 30 * n, barrier, results)) for n in range(4)]
    for process in writers:
        process.start()
    for process in writers:
        process.join(60)
    assert [process.exitcode for process in writers] == [0] * 4
    assert sum(results.get() for _ in writers) == 120
    assert_exactly(uri, range(120))


def test_creation_race(tmp_path):
    """Of two processes that create one table with different fingerprints, one wins and the other is refused."""
    uri = str(tmp_path / "text.lance")
    barrier, results = SPAWN.Barrier(2), SPAWN.SimpleQueue()
    racers = [SPAWN.Process(target=race_to_create, args=(uri, name, barrier, results)) for name in "ab"]
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
    late = store._create(table.uri, "text", {"template": "another"})
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


def _kill_writers(root: str, *, rounds: int, writers: int) -> None:
    uri = objects.join(root, "text.lance")
    dice, killed_at_work = random.Random(rounds), 0
    for _ in range(rounds):
        flags = [SPAWN.Event() for _ in range(writers)]
        processes = [SPAWN.Process(target=write_until_killed, args=(uri, flag)) for flag in flags]
        for process in processes:
            process.start()
        for process, flag in zip(processes, flags, strict=True):
            assert flag.wait(60)
            time.sleep(dice.uniform(0.02, 0.15))
            killed_at_work += process.is_alive()
            os.kill(process.pid, signal.SIGKILL)
        for process in processes:
            process.join(60)
        if table := _open_or_none(uri):
            found = list(table.keys())
            assert len(found) == len(set(found))
            assert len(Reader(table, found).fetch(found)) == len(found)
    assert killed_at_work > 0
    fill(Table.open(uri), range(400), batch_rows=200)
    assert_exactly(uri, range(400))


def _open_or_none(uri: str) -> Table | None:
    with contextlib.suppress(DataError):
        return Table.open(uri)
    return None


def test_killed_writers(tmp_path):
    """Writers killed at random points leave a readable table without duplicates; a later run completes it."""
    _kill_writers(str(tmp_path), rounds=2, writers=2)


@pytest.mark.slow
@pytest.mark.all_cases
def test_killed_writers_thirty_times(root):
    """The same at 30 points and with 2, 4 and 8 writers at once (reliability R7)."""
    for rounds, writers in ((3, 2), (2, 4), (2, 8)):
        _kill_writers(objects.join(root, str(writers)), rounds=rounds, writers=writers)
