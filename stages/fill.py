"""Fill a tensor table: find what is missing, have it encoded, look again.

The table is the truth: what a lost worker had not committed is missing in the next round and encoded then, so nothing
rests on what a worker said before it died.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from flux2_core import objects
from flux2_core.cache import TableRef
from flux2_core.errors import DataError
from flux2_core.rates import Rate, Stopwatch
from flux2_core.store import Table, Writer
from stages import cluster, pool

ROUNDS = 3
# What a killed worker loses at most: rows not committed yet, half of them on their way. A commit takes 10-30 ms in a
# folder and 0.3-0.5 s on object storage, where all writers together reach 3 to 6 a second: fewer and larger ones there.
BATCH_ROWS, BATCH_BYTES = 128, 128 * 2**20
BATCH_ROWS_REMOTE, BATCH_BYTES_REMOTE = 512, 512 * 2**20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Filled:
    """What was done: the table, rows encoded now, rows found there, and what failed, by key with its reason."""

    table: TableRef
    encoded: int
    reused: int
    failed: dict[str, str]
    rate: Rate | None = None
    """How fast; None where nothing was encoded."""


def writer(table: Table) -> Writer:
    """What commits a worker's rows in the background."""
    if objects.is_remote(table.uri):
        return Writer(table, batch_rows=BATCH_ROWS_REMOTE, batch_bytes=BATCH_BYTES_REMOTE)
    return Writer(table, batch_rows=BATCH_ROWS, batch_bytes=BATCH_BYTES)


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
    ahead: int = 1,
) -> Filled:
    """Have every wanted row encoded, each once.

    Args:
        table: where rows go.
        wanted: what to encode, by key.
        divide: cuts missing things into items of work.
        make: starts an actor with `work(item) -> (count, failed)` and `close()`.
        actors: how many at most.
        progress: told (rows there, rows wanted).
        ahead: items that an actor has at a time.

    Raises:
        DataError: rows are still missing after several rounds.
    """
    failed: dict[str, str] = {}
    known, watch = table.present(wanted), Stopwatch(actors)
    for _ in range(ROUNDS):
        there = table.present(wanted)
        missing = [item for key, item in wanted.items() if key not in there and key not in failed]
        done = len(wanted) - len(missing)
        progress(done, len(wanted))
        if not missing:
            reference = TableRef(table.uri, table.version, table.fingerprint)
            fresh = wanted.keys() - known - failed.keys()
            sizes = table.attributes(fresh).values() if fresh else ()
            rate = Rate.of(watch, sizes, device=cluster.device_kind(), now=datetime.now(UTC).isoformat())
            return Filled(reference, len(fresh), len(known), failed, rate if fresh else None)
        for count, broken in pool.run(make, divide(missing), actors=actors, ahead=ahead):
            failed |= broken
            done += count + len(broken)
            watch.lap(count)
            progress(done, len(wanted))
        table.checkout_latest()
    raise DataError(f"{table.uri}: rows are still missing after {ROUNDS} rounds; look at Ray's logs for lost workers")
