"""Fill a tensor table: find what is missing, have it encoded, look again.

The table is the truth: what a lost worker had not committed is missing in the next round and encoded then, so nothing
rests on what a worker said before it died.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from flux2_core.cache import TableRef
from flux2_core.errors import DataError
from flux2_core.store import Table
from stages import pool

ROUNDS = 3
BATCH_ROWS = 64
BATCH_BYTES = 64 * 2**20  # of one commit: a commit takes 0.3-0.5 s on object storage at 30 ms round trip

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Filled:
    """What was done: the table, rows encoded now, rows found there, and what failed, by key with its reason."""

    table: TableRef
    encoded: int
    reused: int
    failed: dict[str, str]


def silent(_done: int, _total: int) -> None:
    """Progress that nobody watches."""


def fill(
    table: Table,
    wanted: dict[str, Any],
    *,
    divide: Callable[[list[Any]], Iterator[list[Any]]],
    make: Callable[[], Any],
    actors: int,
    progress: Progress,
) -> Filled:
    """Have every wanted row encoded, each once.

    Args:
        table: where rows go.
        wanted: what to encode, by key.
        divide: cuts missing things into items of work.
        make: starts an actor with `work(item) -> (count, failed)` and `close()`.
        actors: how many at most.
        progress: told (rows there, rows wanted).

    Raises:
        DataError: rows are still missing after several rounds.
    """
    failed: dict[str, str] = {}
    reused = len(table.present(wanted))
    for _ in range(ROUNDS):
        there = table.present(wanted)
        missing = [item for key, item in wanted.items() if key not in there and key not in failed]
        done = len(wanted) - len(missing)
        progress(done, len(wanted))
        if not missing:
            reference = TableRef(table.uri, table.version, table.fingerprint)
            return Filled(reference, len(wanted) - reused - len(failed), reused, failed)
        for count, broken in pool.run(make, divide(missing), actors=actors):
            failed |= broken
            done += count + len(broken)
            progress(done, len(wanted))
        table.checkout_latest()
    raise DataError(f"{table.uri}: rows are still missing after {ROUNDS} rounds; look at Ray's logs for lost workers")
