"""Upkeep of a table: drop rows, merge small files, remove old versions, and pin those that runs read."""

from __future__ import annotations

from datetime import timedelta

import lance
import numpy as np

from flux2_core.errors import SetupError
from flux2_core.store import keyset
from flux2_core.store.faults import CONFLICT, RETRY_WAITS_S, explained, patiently
from flux2_core.store.keyset import Some
from flux2_core.store.schemas import ROW_ADDRESS
from flux2_core.store.table import ROWS_PER_FRAGMENT, Table, options


def drop(uri: str, keys: Some) -> int:
    """Delete rows, in one commit (their bytes go with `merge`, then `clean`); returns how many were there.

    One scan finds them, and each fragment is told its own by their places: no predicate of a million keys is read.
    """
    wanted = keyset.of(keys)

    def once() -> int:
        table = Table.open(uri)
        places = np.sort(table.select(wanted, [])[1].column(ROW_ADDRESS).to_numpy())
        numbers, starts = np.unique(places >> np.uint64(32), return_index=True)
        changed, emptied = [], []
        for number, part in zip(numbers.tolist(), np.split(places, starts[1:]), strict=False):  # nothing splits in one
            left = table.dataset.get_fragment(number).delete_rows((part & np.uint64(2**32 - 1)).tolist())
            if left is None:
                emptied.append(number)
            else:
                changed.append(left)
        if places.size:
            deletion = lance.LanceOperation.Delete(changed, emptied, "false")
            lance.LanceDataset.commit(uri, deletion, table.version, storage_options=options(uri))
        return int(places.size)

    return patiently(once, uri=uri, waits_s=RETRY_WAITS_S)


def merge(uri: str) -> bool:
    """Rewrite small fragments, and those with dropped rows, as large ones; stable row ids survive.

    Returns:
        Whether that is done: rows that are committed meanwhile make it void, and it is left to another time.
    """
    dataset = Table.open(uri).dataset
    try:
        with explained(uri):
            dataset.optimize.compact_files(
                target_rows_per_fragment=ROWS_PER_FRAGMENT,
                materialize_deletions_threshold=0.0,
                num_threads=1,
                batch_size=16,
            )
    except SetupError as error:
        if not CONFLICT.search(str(error.__cause__)):
            raise
        return False
    return True


def clean(uri: str, *, keep: timedelta) -> None:
    """Remove files that only untagged versions older than `keep` need.

    Safe beside live writers: files of unfinished commits stay for Lance's seven days.
    """
    dataset = Table.open(uri).dataset
    with explained(uri):
        dataset.cleanup_old_versions(older_than=keep, error_if_tagged_old_versions=False)


def tag(uri: str, name: str, version: int) -> None:
    """Pin a version under a name (moved if it exists), so that `clean` keeps what a run reads."""
    dataset = Table.open(uri).dataset
    with explained(uri):
        (dataset.tags.update if name in dataset.tags.list() else dataset.tags.create)(name, version)


def tags(uri: str) -> dict[str, int]:
    """Pinned versions by name."""
    with explained(uri):
        return {name: int(entry["version"]) for name, entry in Table.open(uri).dataset.tags.list().items()}


def versions(uri: str) -> set[int]:
    """Versions of a table that can still be opened."""
    with explained(uri):
        return {int(each["version"]) for each in Table.open(uri).dataset.versions()}


def untag(uri: str, name: str) -> None:
    """Forget a pin; nothing happens where there is none."""
    dataset = Table.open(uri).dataset
    with explained(uri):
        if name in dataset.tags.list():
            dataset.tags.delete(name)
