"""flux2_core.store.table: rows exist exactly once, come back bit for bit, and damage is named."""

import hashlib
import itertools
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import lance
import numpy as np
import pytest

from flux2_core.errors import DataError, SetupError
from flux2_core.store import objects, upkeep
from flux2_core.store import writer as store_writer
from flux2_core.store.reader import Reader
from flux2_core.store.row import Row
from flux2_core.store.table import BORN, Table
from flux2_core.store.writer import Writer
from tests.flux2_core.store_writers import (
    FINGERPRINT,
    SMALL,
    assert_exactly,
    create,
    fill,
    keys_of,
    row,
)


def test_round_trip(root):
    """Rows come back bit for bit, in the order asked for, repeats included; a second writer inserts nothing."""
    table = create(root)
    assert fill(table, range(25)) == 25
    assert fill(table, range(20, 30)) == 5
    table.checkout_latest()
    assert table.rows() == 30
    assert sum(size for _, size in objects.listing(table.uri)) > 30 * 50
    assert table.present([*keys_of(range(28, 40)), "no"]) == set(keys_of((28, 29)))
    assert list(table.attributes(keys_of((3, 99)))) == [{"key": row(3).key, "text": "caption 3 ü", "tokens": 3}]
    asked = keys_of((7, 3, 7, 29))
    rows = Reader(table, asked).fetch(asked)
    assert [one.key for one in rows] == asked
    assert [bytes(one.payload) for one in rows] == [row(number).payload for number in (7, 3, 7, 29)]
    assert_exactly(table.uri, range(30))


def test_large_and_empty_payloads(tmp_path):
    """Payloads that Lance packs into shared blob files, and empty ones, come back as they were."""
    table = create(str(tmp_path))
    sizes = {0: 0, 1: 1, 2: 70_000, 3: 3 << 20}
    with Writer(table, batch_rows=100, batch_bytes=1 << 30) as writer:
        for number, size in sizes.items():
            writer.add(row(number, size=size))
    table.checkout_latest()
    for one, (number, size) in zip(Reader(table, keys_of(sizes)).fetch(keys_of(sizes)), sizes.items(), strict=True):
        assert one.payload == row(number, size=size).payload


def test_places_of_payloads(tmp_path, monkeypatch):
    """Local payloads are read straight from the files that Lance's descriptions name: small and large ones, in one
    fragment or several, before and after compaction; Lance itself is asked where a description is of another kind."""
    table = create(str(tmp_path))
    sizes = dict(enumerate([0, 1, 300, 65_536, 65_537, 70_000, 300_000, 5] * 3))
    with Writer(table, batch_rows=8, batch_bytes=1 << 30) as writer:
        for number, size in sizes.items():
            writer.add(row(number, size=size))
    asked, through = keys_of(reversed(sizes)), []
    monkeypatch.setattr(Table, "payloads", lambda _self, ids: through.append(ids))
    for compacted in (False, True):
        if compacted:
            upkeep.drop(table.uri, keys_of([5]))
            upkeep.merge(table.uri)
            upkeep.clean(table.uri, keep=timedelta(0))
            asked.remove(row(5).key)
        reader = Reader(Table.open(table.uri), asked)
        numbers = [number for number in reversed(sizes) if row(number).key in asked]
        assert [reader.size(key) for key in asked] == [sizes[number] for number in numbers]
        for one, number in zip(reader.fetch(asked), numbers, strict=True):
            assert one == row(number, size=sizes[number])
        assert {Path(reader.where(key)[0]).suffix for key in asked} == {".lance", ".blob"}
    assert not through
    monkeypatch.undo()
    monkeypatch.setattr("flux2_core.store.reader.PACKED", 9)
    with monkeypatch.context() as context:
        context.setattr(Table, "payloads", lambda self, ids: through.append(ids) or real_payloads(self, ids))
        reader = Reader(Table.open(table.uri), asked)
        assert [bytes(one.payload) for one in reader.fetch(asked)] == [row(n, size=sizes[n]).payload for n in numbers]
    assert len(through) == sum(sizes[number] > 65_536 for number in numbers)


real_payloads = Table.payloads


def test_fetch_into(root):
    """Rows are read into the caller's memory, verified there; a buffer of another size is refused."""
    table = create(root)
    fill(table, range(5))
    reader = Reader(Table.open(table.uri), keys_of(range(5)))
    memory = np.zeros(250, np.uint8)
    buffers = [memory[at : at + 50].data for at in range(0, 250, 50)]
    rows = reader.fetch_into(keys_of((4, 0, 4, 1, 2)), buffers)
    assert memory.tobytes() == b"".join(row(number).payload for number in (4, 0, 4, 1, 2))
    assert [one.payload.obj is buffer.obj for one, buffer in zip(rows, buffers, strict=True)] == [True] * 5
    assert reader.attributes(row(3).key) == row(3).attributes
    with pytest.raises(ValueError, match="has 50 bytes, its buffer 49"):
        reader.fetch_into(keys_of([1]), [memory[:49].data])


def test_a_place_outside_its_file(tmp_path):
    """A file that was cut off, or a description that points beyond it, is a corrupt row by name, not a crash."""
    table = create(str(tmp_path))
    with Writer(table, **SMALL) as writer:
        for number in range(3):
            writer.add(row(number, size=100_000))
    (path,) = Path(table.uri, "data").rglob("*.blob")
    reader = Reader(Table.open(table.uri), keys_of(range(3)))
    path.write_bytes(path.read_bytes()[:150_000])
    with pytest.raises(DataError, match=f"row {row(1).key} is corrupt .*ends too early"):
        reader.fetch(keys_of(range(3)))
    again = Reader(Table.open(table.uri), keys_of(range(3)))
    assert again.fetch(keys_of([0]))[0].payload == row(0, size=100_000).payload
    with pytest.raises(DataError, match=f"row {row(1).key} is corrupt .*outside"):
        again.fetch(keys_of(range(3)))


def test_duplicates_in_one_batch(tmp_path):
    """The same key twice in one batch is one row: Lance alone would insert both."""
    table = create(str(tmp_path))
    assert fill(table, [1, 2, 1, 1, 2], batch_rows=100) == 2
    assert_exactly(table.uri, [1, 2])


def test_payload_is_copied(tmp_path):
    """A buffer that the encoder uses again after `add` does not change the row."""
    table = create(str(tmp_path))
    buffer = np.frombuffer(row(1).payload, np.uint8).copy()
    with Writer(table, **SMALL) as writer:
        writer.add(Row(row(1).key, memoryview(buffer), row(1).attributes))
        buffer[:] = 0
    assert_exactly(table.uri, [1])


def test_wrong_attributes(tmp_path):
    """A latents row in a text table is refused at `add`."""
    with pytest.raises(ValueError, match="attributes of a text row"), Writer(create(str(tmp_path)), **SMALL) as writer:
        writer.add(Row("k", b"", {"height": 1, "width": 2}))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # nobody writes to it
def test_zero_copy_to_torch(tmp_path):
    """torch.frombuffer reads a payload where it lies: same address, right values."""
    torch = pytest.importorskip("torch")
    values = torch.arange(64, dtype=torch.bfloat16).reshape(4, 16)
    uri = str(tmp_path / "latents.lance")
    table = Table.open_or_create(uri, kind="latents", fingerprint={})
    with Writer(table, **SMALL) as writer:
        writer.add(Row("k", values.view(torch.uint8).numpy().data, {"height": 4, "width": 16}))
    table.checkout_latest()
    payload = Reader(table, ["k"]).fetch(["k"])[0].payload
    assert isinstance(payload, memoryview)
    tensor = torch.frombuffer(payload, dtype=torch.bfloat16).reshape(4, 16)
    assert torch.equal(tensor, values)
    assert tensor.data_ptr() == np.frombuffer(payload, np.uint8).ctypes.data


def test_version_is_pinned(root):
    """A table opened at a version does not see later rows, not even after compaction; checkout_latest does."""
    table = create(root)
    fill(table, range(10))
    pinned = Table.open(table.uri)
    version = pinned.version
    upkeep.tag(table.uri, "run-a", version)
    fill(table, range(20))
    upkeep.merge(table.uri)
    upkeep.clean(table.uri, keep=timedelta(0))
    for old in (pinned, Table.open(table.uri, version=version)):
        assert old.rows() == 10
        assert old.present(keys_of(range(20))) == set(keys_of(range(10)))
        assert len(Reader(old, keys_of(range(10))).fetch(keys_of(range(10)))) == 10
    pinned.checkout_latest()
    assert pinned.rows() == 20
    assert_exactly(table.uri, range(20))
    assert upkeep.tags(table.uri) == {"run-a": version}
    upkeep.untag(table.uri, "run-a")
    assert upkeep.tags(table.uri) == {}


def test_drop(tmp_path):
    """Dropped rows are gone and can be written again; the others stay."""
    table = create(str(tmp_path))
    fill(table, range(10))
    assert upkeep.drop(table.uri, [*keys_of((1, 2)), "it's absent"]) == 2
    assert_exactly(table.uri, [0, *range(3, 10)])
    assert fill(table, range(10)) == 2
    assert_exactly(table.uri, range(10))


def test_a_drop_is_one_commit(root):
    """Rows of all fragments, some of which lose all, go in one commit, without a read of any payload's row; what was
    written beside it stays, and dropping nothing commits nothing."""
    table = create(root)
    fill(table, range(100), batch_rows=20)
    before = Table.open(table.uri).version
    gone = [*range(20), *range(25, 90, 3)]
    assert upkeep.drop(table.uri, keys_of([*gone, *range(500, 1_600)])) == len(gone)
    assert Table.open(table.uri).version == before + 1
    assert upkeep.drop(table.uri, keys_of(gone)) == 0
    assert Table.open(table.uri).version == before + 1
    assert upkeep.drop(table.uri, keys_of([22, 24])) == 2, "of a fragment that had lost rows before"
    assert_exactly(table.uri, [number for number in range(100) if number not in {*gone, 22, 24}])


def test_other_fingerprint_refused(root):
    """An existing table with another fingerprint or kind is refused with the field and both values."""
    table = create(root)
    assert create(root).fingerprint == FINGERPRINT
    with pytest.raises(DataError, match=r"layers: wanted \[10, 20\], found \[10, 20, 30\]"):
        Table.open_or_create(table.uri, kind="text", fingerprint={**FINGERPRINT, "layers": [10, 20]})
    with pytest.raises(DataError, match="holds text rows"):
        Table.open_or_create(table.uri, kind="latents", fingerprint=FINGERPRINT)


def test_other_contract_refused(tmp_path, monkeypatch):
    """A table of an unknown contract version is refused with the command that rewrites it, never misread."""
    monkeypatch.setattr("flux2_core.store.schemas.CONTRACT_VERSION", 3)
    monkeypatch.setattr("flux2_core.store.schemas.SAME_ROWS", ("3",))
    table = create(str(tmp_path))
    monkeypatch.undo()
    for attempt in (lambda: Table.open(table.uri), lambda: create(str(tmp_path))):
        with pytest.raises(DataError, match=r"contract version is 3, this cacheloom reads 2; .* run `cacheloom cache`"):
            attempt()


def test_rows_of_the_first_contract_are_used_on(tmp_path, monkeypatch):
    """Contract 2 changed the samples table only: tensor tables of contract 1 are read and added to as they are."""
    monkeypatch.setattr("flux2_core.store.schemas.CONTRACT_VERSION", 1)
    fill(create(str(tmp_path)), range(3))
    monkeypatch.undo()
    table = create(str(tmp_path))
    assert fill(table, range(5)) == 2
    assert_exactly(table.uri, range(5))


def test_absent(root):
    """No table, no such version, no such row: DataErrors that say which."""
    with pytest.raises(DataError, match="no table there"):
        Table.open(objects.join(root, "no.lance"))
    table = create(root)
    with pytest.raises(DataError, match="at version 7"):
        Table.open(table.uri, version=7)
    reader = Reader(table, keys_of([1]))
    assert reader.missing == keys_of([1])
    with pytest.raises(DataError, match=f"text.lance: no row {row(1).key}"):
        reader.fetch(keys_of([1]))


def flip(path: Path, needle: bytes) -> None:
    """Flip one bit in the middle of the only place where `needle` stands."""
    data = bytearray(path.read_bytes())
    assert data.count(needle) == 1
    data[data.index(needle) + len(needle) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("size", [200, 100_000], ids=["in the data file", "in a blob file"])
def test_flipped_bit(tmp_path, size):
    """One flipped bit in a payload is a DataError with key and table; the neighbours still read."""
    table = create(str(tmp_path))
    with Writer(table, **SMALL) as writer:
        for number in range(5):
            writer.add(row(number, size=size))
    needle = row(3, size=size).payload[100:150]
    (path,) = (path for path in Path(table.uri, "data").rglob("*.*") if needle in path.read_bytes())
    flip(path, needle)
    reader = Reader(Table.open(table.uri), keys_of(range(5)))
    with pytest.raises(DataError, match=rf"text\.lance: row {row(3).key} is corrupt"):
        reader.fetch(keys_of(range(5)))
    assert len(reader.fetch(keys_of((0, 1, 2, 4)))) == 4


def test_flipped_attribute(tmp_path):
    """The checksum covers attributes too: another letter in the stored text is a corrupt row."""
    table = create(str(tmp_path))
    with Writer(table, **SMALL) as writer:
        writer.add(Row("k", b"payload", {"text": "an unusual caption", "tokens": 3}))
    (path,) = Path(table.uri, "data").glob("*.lance")
    flip(path, b"unusual")
    with pytest.raises(DataError, match="row k is corrupt"):
        Reader(Table.open(table.uri), ["k"]).fetch(["k"])


def test_lost_file(tmp_path):
    """A data file that is gone is a DataError with key and table, not a stack trace from Lance."""
    table = create(str(tmp_path))
    with Writer(table, **SMALL) as writer:
        writer.add(row(1, size=100_000))
    table.checkout_latest()
    reader = Reader(table, keys_of([1]))
    for path in Path(table.uri, "data").rglob("*.blob"):
        path.unlink()
    with pytest.raises(DataError, match=f"text.lance/data/.* gone, with row {row(1).key} in it"):
        reader.fetch(keys_of([1]))


@pytest.mark.parametrize("cut", [0, 100])
def test_damaged_manifest(tmp_path, cut):
    """A manifest that is cut off is a DataError with the table's URI."""
    table = create(str(tmp_path))
    (manifest,) = Path(table.uri, "_versions").glob("*.manifest")
    manifest.write_bytes(manifest.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"text\.lance"):
        Table.open(table.uri)


def test_present_is_fast(tmp_path):
    """Presence of 100,000 keys takes well under seconds (0.1 s here; the payloads are not read)."""
    table = create(str(tmp_path))
    wanted = keys_of_many(100_000)
    with Writer(table, batch_rows=20_000, batch_bytes=1 << 30) as writer:
        for key in wanted[::2]:
            writer.add(Row(key, b"x", {"text": "", "tokens": 0}))
    table.checkout_latest()
    start = time.perf_counter()
    assert table.present(iter(wanted)) == set(wanted[::2])
    assert time.perf_counter() - start < 3


def keys_of_many(count: int) -> list[str]:
    return [hashlib.sha256(str(number).encode()).hexdigest() for number in range(count)]


def test_readers_on_threads(root):
    """One reader serves several threads at once."""
    table = create(root)
    fill(table, range(40), batch_rows=40)
    table.checkout_latest()
    reader = Reader(table, keys_of(range(40)))
    orders = [random.Random(seed).sample(range(40), 16) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for order, rows in zip(orders, pool.map(lambda order: reader.fetch(keys_of(order)), orders), strict=True):
            assert [bytes(one.payload) for one in rows] == [row(number).payload for number in order]


def test_slow_rows_are_committed_by_the_clock(tmp_path, monkeypatch):
    """A batch is full after `batch_s` as well: of a slow encoder's work no more than that is lost."""
    now = [0.0]
    monkeypatch.setattr(store_writer.time, "monotonic", lambda: now[0])
    table = create(str(tmp_path))
    with Writer(table, batch_rows=1_000, batch_bytes=1 << 30, batch_s=20.0) as writer:
        for number in range(7):
            now[0] += 4.0
            writer.add(row(number))
    assert writer.inserted == 7
    assert Table.open(table.uri).version == 1 + 3  # after 12 s, 24 s and at the end


def merge_insert(dataset, rows) -> int:
    """What cacheloom committed with before: a join with the keys of all fragments."""
    builder = dataset.merge_insert("key").when_not_matched_insert_all().use_index(False).conflict_retries(50)
    return builder.execute(store_writer._arrow(rows, "text"))["num_inserted_rows"]


def ours(dataset, rows) -> int:
    """What it commits with now, from the version of this handle."""
    known = store_writer._Known(Table(str(dataset.uri), dataset))
    known.look()
    return store_writer._insert_missing(known, store_writer._Batch(rows))


def between(monkeypatch, happens) -> None:
    """Let something happen once, after a writer has looked and has written its files, before it commits."""
    real, waiting = store_writer._Batch.files, [happens]

    def files(self, *given):
        made = real(self, *given)
        if waiting:
            waiting.pop()()
        return made

    monkeypatch.setattr(store_writer._Batch, "files", files)


@pytest.mark.parametrize("other", [merge_insert, ours])
@pytest.mark.parametrize("index", [False, True])
def test_a_commit_in_the_way(root, monkeypatch, other, index):
    """A row that somebody commits while we are about to: it is there once, and our other rows are, whether he commits
    as we do or as cacheloom did before, and though someone has made an index on the keys."""
    table = create(root)
    fill(table, range(4))
    table.checkout_latest()
    if index:
        table.dataset.create_scalar_index("key", "BTREE")
    theirs = Table.open(table.uri).dataset
    between(monkeypatch, lambda: other(theirs, [row(4), row(5)]))
    assert ours(Table.open(table.uri).dataset, [row(5), row(6), row(0)]) == 1
    assert_exactly(table.uri, range(7))


def test_a_row_goes_while_another_comes(tmp_path, monkeypatch):
    """As many rows are missing as before, and not the same ones: what was written for those is not committed."""
    table = create(str(tmp_path))
    fill(table, range(4))

    def happens() -> None:
        upkeep.drop(table.uri, keys_of([0]))
        merge_insert(Table.open(table.uri).dataset, [row(5)])

    between(monkeypatch, happens)
    assert ours(Table.open(table.uri).dataset, [row(0), row(5)]) == 1
    assert_exactly(table.uri, [0, 1, 2, 3, 5])


def test_an_older_writer_sees_our_rows(tmp_path, monkeypatch):
    """A `merge_insert` that joined before we committed does not insert our row again."""
    table = create(str(tmp_path))
    fill(table, range(4))
    theirs = Table.open(table.uri).dataset
    assert ours(Table.open(table.uri).dataset, [row(4)]) == 1
    assert merge_insert(theirs, [row(4), row(5)]) == 1
    assert_exactly(table.uri, range(6))


IN_THE_WAY = {
    "rows dropped": (lambda uri: upkeep.drop(uri, keys_of([0, 1])), [2, 3, 4]),
    "a fragment dropped": (lambda uri: upkeep.drop(uri, keys_of(range(4))), [4]),
    "files merged": (upkeep.merge, range(5)),
    "files merged and cleaned": (lambda uri: [upkeep.merge(uri), upkeep.clean(uri, keep=timedelta(0))], range(5)),
    "a proof": (lambda uri: Table.open(uri).prove({"a": "1"}), range(5)),
    "a tag": (lambda uri: upkeep.tag(uri, "run", Table.open(uri).version), range(5)),
}


@pytest.mark.parametrize("what", IN_THE_WAY)
def test_upkeep_in_the_way(tmp_path, monkeypatch, what):
    """What is dropped, merged, cleaned or said of a table while a writer is about to commit stays so."""
    happens, left = IN_THE_WAY[what]
    table = create(str(tmp_path))
    fill(table, range(2), batch_rows=2)
    fill(table, range(2, 4), batch_rows=2)
    between(monkeypatch, lambda: happens(table.uri))
    assert ours(Table.open(table.uri).dataset, [row(4)]) == 1
    assert_exactly(table.uri, left)
    assert Table.open(table.uri).proof == ({"a": "1"} if what == "a proof" else None)
    assert fill(table, range(5)) == 5 - len(left)
    assert_exactly(table.uri, range(5))


def test_files_are_left_unmerged_where_rows_were_written(tmp_path, monkeypatch):
    """Merging files from a version after which somebody has committed is void, says so, and loses nothing."""
    table = create(str(tmp_path))
    fill(table, range(8), batch_rows=4)
    stale = Table.open(table.uri)
    fill(table, range(10))
    with monkeypatch.context() as context:
        context.setattr(Table, "open", lambda _uri: stale)
        assert not upkeep.merge(table.uri)
    assert_exactly(table.uri, range(10))
    assert upkeep.merge(table.uri)
    assert len(Table.open(table.uri).data_files()) == 1
    assert_exactly(table.uri, range(10))


def test_a_commit_leaves_the_rows_before_it(tmp_path):
    """Row ids and the versions that rows came with are the same after further commits, dropped and merged ones too;
    a new row gets the next id and the version that it came with."""
    table = create(str(tmp_path))
    fill(table, range(8), batch_rows=4)
    upkeep.drop(table.uri, keys_of([1, 5, 6]))
    upkeep.merge(table.uri)
    fill(table, range(10, 14), batch_rows=4)
    upkeep.drop(table.uri, keys_of([11]))

    def told() -> dict[str, tuple[int, int]]:
        found = Table.open(table.uri).dataset.scanner(["key", BORN], with_row_id=True).to_table()
        return {each["key"]: (each["_rowid"], each[BORN]) for each in found.to_pylist()}

    before = told()
    fill(table, [20])
    after = told()
    assert after.pop(row(20).key) == (12, Table.open(table.uri).version)
    assert after == before
    upkeep.drop(table.uri, Table.open(table.uri).keys())
    fill(table, [21])
    fill(table, [22])
    assert [row_id for row_id, _ in told().values()] == [13, 14], "no id comes twice"
    assert len(Table.open(table.uri).data_files()) == 2


def test_a_writer_writes_what_was_dropped_meanwhile(tmp_path):
    """A writer that knows a row's key writes it again where it has been dropped since."""
    table = create(str(tmp_path))
    with Writer(table, batch_rows=2, batch_bytes=1 << 30) as writer:
        for number in (0, 1, 0):
            writer.add(row(number))
            writer._settle()
            if number:
                upkeep.drop(table.uri, keys_of([0]))
    assert writer.inserted == 3
    assert_exactly(table.uri, [0, 1])


def test_an_answer_that_is_lost(tmp_path, monkeypatch):
    """A commit that went through though the writer was told that it had not: its rows are there once."""
    table = create(str(tmp_path))
    real, lies = lance.LanceDataset.commit, ["Retryable commit conflict"]

    def commit(*given, **named):
        done = real(*given, **named)
        if lies:
            raise OSError(lies.pop())
        return done

    monkeypatch.setattr(lance.LanceDataset, "commit", commit)
    fill(table, range(3))
    assert_exactly(table.uri, range(3))


@pytest.mark.s3
def test_a_commit_costs_the_same_however_many_there_are(s3_root, proxy):
    """The requests of a commit do not grow with the number of those before it: 6 fragments, 60 fragments."""
    table, asked = create(s3_root), []
    for start in (0, 6, 60):
        fill(table, range((asked and 6) or 0, start), batch_rows=2)
        with Writer(table, batch_rows=2, batch_bytes=1 << 30) as writer:
            writer.add(row(1_000 + 2 * start))
            writer._settle()  # has read the keys of all
            proxy.asked.clear()
            writer.add(row(1_001 + 2 * start))
            writer._settle()
            asked.append(len(proxy.asked))
    assert asked[2] == asked[1] <= 5


def test_rows_added_before_an_error_are_kept(tmp_path):
    """When the encoder raises, what was added before is committed and the encoder's own error comes out."""
    table = create(str(tmp_path))
    broken = itertools.chain(range(13), (1 // zero for zero in [0]))
    with pytest.raises(ZeroDivisionError):
        fill(table, broken)
    assert_exactly(table.uri, range(13))


def test_full_disk(tmp_path):
    """A batch that does not fit is a SetupError out of the writer, and the table keeps what it had."""
    table = create(str(tmp_path))
    fill(table, range(5))
    code = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv[2]); import tests.flux2_core.store_writers as t\n"
        "from flux2_core.errors import SetupError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "try:\n"
        "    with t.Writer(t.Table.open(sys.argv[1]), batch_rows=4, batch_bytes=1 << 30) as writer:\n"
        "        for number in range(5, 12): writer.add(t.row(number, size=200_000))\n"
        "except SetupError as error: sys.exit(4 if 'free space' in str(error) else 1)\n"
    )
    command = [sys.executable, "-c", code, table.uri, str(Path(__file__).parents[3])]
    assert subprocess.run(command, check=False).returncode == 4
    assert_exactly(table.uri, range(5))


def test_transient_failures_are_waited_out(tmp_path, monkeypatch):
    """A commit that fails twice in passing is tried again and the row exists once; a lasting failure comes out."""
    table = create(str(tmp_path))
    real, failures = store_writer._insert_missing, ["commit conflict", "commit conflict"]

    def fails_at_first(*args, **options) -> int:
        if failures:
            raise OSError(failures.pop())
        return real(*args, **options)

    monkeypatch.setattr(store_writer, "_insert_missing", fails_at_first)
    assert fill(table, range(3), waits_s=(0.0, 0.0)) == 3
    assert_exactly(table.uri, range(3))
    failures += ["commit conflict"] * 3
    with pytest.raises(SetupError, match="too many writers"):
        fill(table, range(3, 6), waits_s=(0.0, 0.0))


def test_commits_run_beside_the_encoder(tmp_path, monkeypatch):
    """While one batch is committed the caller goes on adding rows."""
    table = create(str(tmp_path))
    real, gate = store_writer._insert_missing, threading.Event()

    def waits(*args, **options) -> int:
        assert gate.wait(30)
        return real(*args, **options)

    monkeypatch.setattr(store_writer, "_insert_missing", waits)
    with Writer(table, **SMALL) as writer:
        for number in range(9):  # half a batch of ten is under way, four more are taken meanwhile
            writer.add(row(number))
        gate.set()
    assert writer.inserted == 9
