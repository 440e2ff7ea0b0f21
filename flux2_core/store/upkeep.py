"""Upkeep of a table: drop rows, merge small files, remove old versions, and pin those that runs read."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

from flux2_core.store.faults import explained
from flux2_core.store.schemas import KEY
from flux2_core.store.table import ROWS_PER_FRAGMENT, Table


def drop(uri: str, keys: Iterable[str]) -> int:
    """Delete rows (their bytes go with `merge`, then `clean`); returns how many were there."""
    dataset = Table.open(uri).dataset
    before = dataset.count_rows()
    todo = sorted(set(keys))
    for start in range(0, len(todo), 1_000):
        quoted = ", ".join("'" + key.replace("'", "''") + "'" for key in todo[start : start + 1_000])
        with explained(uri):
            dataset.delete(f"{KEY} IN ({quoted})")
    return int(before - dataset.count_rows())


def merge(uri: str) -> None:
    """Rewrite small fragments, and those with dropped rows, as large ones; stable row ids survive."""
    dataset = Table.open(uri).dataset
    with explained(uri):
        dataset.optimize.compact_files(
            target_rows_per_fragment=ROWS_PER_FRAGMENT,
            materialize_deletions_threshold=0.0,
            num_threads=1,
            batch_size=16,
        )


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
