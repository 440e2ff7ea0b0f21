"""Filling a table: as long as rounds bring rows they go on, and one that brings none ends with what is missing."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from flux2_core.errors import DataError
from flux2_core.store.table import Table
from stages import cluster, fill, pool
from tests.flux2_core.store_writers import create, keys_of
from tests.flux2_core.store_writers import fill as write


class Losing:
    """In the place of actors on Ray: of each round only so many items reach the table, as when workers die late."""

    def __init__(self, table: Table, *rounds: int) -> None:
        self.table, self.rounds = table, list(rounds)

    def run(self, _make: object, items: Iterator[list[int]], **_: object) -> Iterator[tuple[int, dict[str, str]]]:
        numbers = [number for item in items for number in item]
        write(self.table, numbers[: self.rounds.pop(0)])
        yield len(numbers), {}


@pytest.mark.parametrize(("rounds", "ends"), [((1, 1, 1, 1, 4), True), ((3, 0), False), ((0,), False)])
def test_rounds_go_on_while_they_bring_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: tuple[int, ...], ends: bool
) -> None:
    """Five rounds of a few rows each fill a table of eight; a round without any is the last."""
    table = create(str(tmp_path))
    losing = Losing(table, *rounds)
    monkeypatch.setattr(pool, "run", losing.run)
    monkeypatch.setattr(cluster, "device_kind", lambda: "cpu")
    wanted = dict(zip(keys_of(range(8)), range(8), strict=True))

    def filled() -> fill.Filled:
        return fill.fill(
            table, wanted, divide=lambda missing: iter([missing]), make=object, actors=1, progress=fill.silent
        )

    if ends:
        assert (filled().encoded, losing.rounds) == (8, [])
    else:
        with pytest.raises(DataError, match=rf"{8 - rounds[0]} rows are still missing after a round that brought none"):
            filled()
