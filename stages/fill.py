"""Fill a tensor table: find what is missing, have it encoded, look again.

The table is the truth: what a lost worker had not committed is missing in the next round and encoded then, so nothing
rests on what a worker said before it died.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from flux2_core.cache.index import TableRef
from flux2_core.errors import DataError
from flux2_core.plan.rates import Rate, Stopwatch
from flux2_core.store import keyset
from flux2_core.store.table import Table
from flux2_core.store.writer import Writer
from stages import cluster, pool

# What a killed worker loses at most: rows not committed yet, half of them on their way. Every commit writes the list of
# all before it, 0.024 ms and 370 bytes each, so n of them cost n * n: few and large ones (decision 0034). Bytes end
# a batch of a fast encoder (3 s of text on an H200), seconds one of a slow encoder. A worker takes three times as much
# memory: rows that are collected, rows that are committed, and Lance's copies of these.
BATCH_ROWS, BATCH_BYTES, BATCH_S = 8_192, 2**29, 300.0

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
    return Writer(table, batch_rows=BATCH_ROWS, batch_bytes=BATCH_BYTES, batch_s=BATCH_S)


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
        DataError: rows are missing, and a round brought none of them.
    """
    failed: dict[str, str] = {}
    keys, watch = keyset.array(wanted), Stopwatch(actors)
    there = known = table.holds(keys)
    left = len(wanted) + 1
    while True:
        rows = zip(wanted.items(), there.tolist(), strict=True)
        missing = [item for (key, item), is_there in rows if not is_there and key not in failed]
        done = len(wanted) - len(missing)
        progress(done, len(wanted))
        if not missing:
            reference = TableRef(table.uri, table.version, table.fingerprint)
            fresh = keys[~known & ~keyset.find(keys, keyset.of(failed))[1]]
            sizes, now = table.attributes(fresh), datetime.now(UTC).isoformat()
            rate = Rate.of(watch, sizes, device=cluster.device_kind(), now=now) if fresh.size else None
            return Filled(reference, fresh.size, int(known.sum()), failed, rate)
        if len(missing) == left:  # workers that end late lose what they held, and the next round encodes it
            raise DataError(
                f"{table.uri}: {left} rows are still missing after a round that brought none; look at Ray's logs for "
                "lost workers, then run the same again"
            )
        left = len(missing)
        for count, broken in pool.run(make, divide(missing), actors=actors, ahead=ahead):
            failed |= broken
            done += count + len(broken)
            watch.lap(count)
            progress(done, len(wanted))
        table.checkout_latest()
        there = table.holds(keys)
