"""flux2_core.store.seals: one flipped bit in any file of a table is found."""

import random
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from flux2_core.errors import DataError
from flux2_core.store import objects, seals, upkeep
from flux2_core.store.reader import Reader
from flux2_core.store.table import Table
from flux2_core.store.writer import Writer
from tests.flux2_core.store_writers import assert_exactly, create, fill, row


def test_seal_is_quiet_on_a_good_table(root):
    """A sealed table is undamaged, also after more commits, compaction and clean-up; sealing twice adds nothing."""
    table = create(root)
    fill(table, range(20))
    assert seals.seal(table.uri) > 0
    assert seals.seal(table.uri) == 0
    fill(table, range(40))
    upkeep.merge(table.uri)
    upkeep.clean(table.uri, keep=timedelta(0))
    assert seals.damaged(table.uri) == []
    seals.seal(table.uri)
    upkeep.merge(table.uri)
    upkeep.clean(table.uri, keep=timedelta(0))
    assert seals.damaged(table.uri) == []
    assert_exactly(table.uri, range(40))


@pytest.mark.s3
def test_new_files_are_read_side_by_side(s3_root, proxy, monkeypatch):
    """Sealing n commits asks three small files of each, several at a time, and at most seven times more."""
    table = create(s3_root)
    fill(table, range(10))
    seals.seal(table.uri)
    before = Table.open(table.uri).version
    fill(table, range(10, 90))
    commits = Table.open(table.uri).version - before
    reads, at_once, real = [], set(), objects.read

    def read(uri: str) -> bytes:
        reads.append(uri)
        time.sleep(0.02)  # the others of a round have come by then
        at_once.add(threading.active_count())
        return real(uri)

    monkeypatch.setattr(objects, "read", read)
    proxy.asked.clear()
    alone = threading.active_count()
    assert seals.seal(table.uri) == 3 * commits
    assert len(proxy.asked) <= 3 * commits + 7
    assert max(at_once) >= alone + 10
    assert seals.damaged(table.uri) == []


def _finds(uri: str) -> bool:
    """What `verify` does: seals first, then every row."""
    try:
        if seals.damaged(uri):
            return True
        table = Table.open(uri)
        keys = [row(number).key for number in range(12)]
        reader = Reader(table, keys)
        if reader.missing:
            return True
        reader.fetch(keys)
    except DataError:
        return True
    return False


@pytest.mark.parametrize("seed", range(5))
def test_every_flip_is_found(tmp_path, seed):
    """One bit or 200 bytes flipped in data, blob or manifest files: all of them found (reliability R8, 60 of 60)."""
    table = create(str(tmp_path))
    with Writer(table, batch_rows=6, batch_bytes=1 << 30) as writer:
        for number in range(12):
            writer.add(row(number, size=80_000 if number % 2 else 300))
    seals.seal(table.uri)
    assert not _finds(table.uri)
    dice = random.Random(seed)
    files = [Path(path) for path, _ in objects.listing(table.uri)]
    kinds = {kind: [path for path in files if path.name.endswith(kind)] for kind in (".manifest", ".lance", ".blob")}
    for number in range(12):
        path = dice.choice(kinds[dice.choice(list(kinds))])
        good = path.read_bytes()
        data = bytearray(good)
        start = dice.randrange(len(data))
        for place in range(start, min(len(data), start + (200 if number % 2 else 1))):
            data[place] ^= 1 << dice.randrange(8)
        path.write_bytes(data)
        assert _finds(table.uri), f"{path} at {start}"
        path.write_bytes(good)


def test_damaged_seal(tmp_path):
    """A flipped bit in the list of hashes itself is damage too; nothing is sealed on top of it."""
    table = create(str(tmp_path))
    seals.seal(table.uri)
    (path,) = Path(table.uri, seals.FOLDER).iterdir()
    path.write_bytes(path.read_bytes().replace(b"0", b"1", 1))
    assert seals.damaged(table.uri) == [str(path)]
    with pytest.raises(DataError, match="list of hashes is damaged"):
        seals.seal(table.uri)


def test_files_that_change(tmp_path):
    """The hint at the newest version and tags change with good reason; a flipped bit in either is found."""
    table = create(str(tmp_path))
    upkeep.tag(table.uri, "run", 1)
    seals.seal(table.uri)
    fill(table, range(3))
    upkeep.tag(table.uri, "run", 2)
    upkeep.tag(table.uri, "another", 1)
    assert seals.damaged(table.uri) == []
    seals.seal(table.uri)
    for path in (Path(table.uri, "_versions", "latest_version_hint.json"), Path(table.uri, "_refs/tags/run.json")):
        good = path.read_bytes()
        for bad in (good.replace(b"2", b"1", 1), good.replace(b"2", b"7", 1), good[:-1], good + b" "):
            path.write_bytes(bad)
            assert seals.damaged(table.uri) == [str(path)]
        path.write_bytes(good)
    assert seals.damaged(table.uri) == []
