"""flux2_core.store.faults: what is retried, what is said, and that a bad network loses nothing."""

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from flux2_core.errors import DataError, SetupError
from flux2_core.store import faults, objects
from flux2_core.store.reader import Reader
from flux2_core.store.table import Table
from flux2_core.store.writer import Writer
from tests import s3_server
from tests.fault_proxy import Proxy, Rule
from tests.flux2_core.store_writers import assert_exactly, create, fill, keys_of, row

S3, LOCAL = "s3://bucket/t.lance", "/cache/t.lance"


@pytest.mark.parametrize(
    ("text", "uri", "kind", "again"),
    [
        ("LanceError(IO): No space left on device (os error 28)", LOCAL, SetupError, False),
        ("Permission denied (os error 13)", LOCAL, SetupError, False),
        ("Retryable commit conflict for version 7", LOCAL, SetupError, True),
        ("Encountered corrupt file x", LOCAL, DataError, False),
        ("something odd", LOCAL, DataError, False),
        ("Generic S3 error: after 10 retries, max_retries: 10", S3, SetupError, True),
        ("Server returned non-2xx status code: 400: <Code>ExpiredToken</Code>", S3, SetupError, True),
        (
            "Error performing HEAD http://h/x in 9ms - Server returned status code: 400 Bad Request: ",
            S3,
            SetupError,
            True,
        ),
        ("Server returned non-2xx status code: 403 Forbidden: <Code>AccessDenied</Code>", S3, SetupError, False),
        ("Object at location x not found", S3, DataError, False),
    ],
)
def test_failures_are_told_apart(text, uri, kind, again):
    """Each failure becomes the exit code it deserves, and only what may pass is tried again."""
    error = OSError(text)
    assert isinstance(faults.explanation(error, uri), kind)
    assert faults.passes(error, uri) is again


def test_panic_is_explained():
    """A panic of Lance's Rust code is a DataError; Ctrl-C stays what it is."""
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(DataError, match=r"t\.lance"), faults.explained(LOCAL):
        raise panic("called `Option::unwrap()` on a `None` value")
    with pytest.raises(KeyboardInterrupt), faults.explained(LOCAL):
        raise KeyboardInterrupt


@pytest.fixture
def proxy(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    """Clients are less patient than in life."""
    monkeypatch.setattr(objects, "TIMEOUT_S", 1.0)
    return proxy


SMALL, LARGE = 3_000, 700_000  # bytes of a row; a commit of more than 5 MB is uploaded in parts


def through_objects(root: str) -> None:
    """Objects written, listed, read and deleted through the proxy: what was written is there, whole and once."""
    wanted = {objects.join(root, "runs", f"{n}.bin"): random.Random(n).randbytes(200_000) for n in range(8)}
    for uri, data in wanted.items():
        objects.write(uri, data)
    for uri, data in wanted.items():
        assert objects.read(uri) == data
    assert dict(objects.listing(objects.join(root, "runs"))) == {uri: len(data) for uri, data in wanted.items()}
    for uri in wanted:
        objects.delete(uri)
    assert not any(map(objects.exists, wanted))


def through_table(root: str, *, size: int = SMALL, rows: int = 40) -> None:
    """Rows committed and read through the proxy: each is there once, with its bytes."""
    table = create(root)
    with Writer(table, batch_rows=20, batch_bytes=1 << 30) as writer:
        for number in range(rows):
            writer.add(row(number, size=size))
    assert writer.inserted <= rows  # a commit whose answer was lost is not counted
    table = Table.open(table.uri)
    keys = keys_of(range(rows))
    assert sorted(table.keys()) == sorted(keys)
    reader = Reader(table, keys)
    for start in range(0, rows, 10):
        for number, one in enumerate(reader.fetch(keys[start : start + 10]), start):
            assert bytes(one.payload) == row(number, size=size).payload


def in_parts(root: str) -> None:
    """The same with rows so large that commits are uploaded in parts."""
    through_table(root, size=LARGE, rows=20)


# what is done, and what is spoilt meanwhile; the faults are told in tests/fault_proxy.py
Work = Callable[[str], None]
FINISHES: dict[str, tuple[Work, Rule]] = {
    "objects-slowdown-5": (through_objects, Rule("SlowDown", 0.05)),
    "objects-slowdown-20": (through_objects, Rule("SlowDown", 0.2)),
    "objects-slowdown-50": (through_objects, Rule("SlowDown", 0.5)),
    "objects-500": (through_objects, Rule("InternalError", 0.3)),
    "objects-answer-cut": (through_objects, Rule("cut", 0.3, method="GET")),
    "objects-request-dropped": (through_objects, Rule("drop", 0.3, method="PUT")),
    "objects-stalled": (through_objects, Rule("stall", 0.1, times=3)),
    "table-slowdown-5": (through_table, Rule("SlowDown", 0.05)),
    "table-slowdown-20": (through_table, Rule("SlowDown", 0.2)),
    "table-slowdown-50": (through_table, Rule("SlowDown", 0.5)),
    "table-500": (through_table, Rule("InternalError", 0.3)),
    "table-answer-cut": (through_table, Rule("cut", 0.2, method="GET")),
    "table-request-dropped": (through_table, Rule("drop", 0.3, method="PUT")),
    "table-stalled": (through_table, Rule("stall", 0.1, times=3)),
    "multipart-part-lost": (in_parts, Rule("lost", path="partNumber=", times=2)),
    "multipart-completion-lost": (in_parts, Rule("lost", method="POST", path="uploadId=", times=1)),
    "multipart-upload-gone": (in_parts, Rule("NoSuchUpload", method="POST", path="uploadId=", times=1)),
    "commit-answer-lost-then-412": (through_table, Rule("lost", method="PUT", path="_versions", times=2)),
    "commit-412-without-cause": (through_table, Rule("PreconditionFailed", method="PUT", path="_versions", times=2)),
}
SPREAD = {"objects-answer-cut", "table-slowdown-20", "multipart-upload-gone", "commit-412-without-cause"}


def spread(name: str) -> object:
    return pytest.param(name, marks=() if name in SPREAD else pytest.mark.all_cases)


@pytest.mark.s3
@pytest.mark.parametrize("name", [spread(name) for name in FINISHES])
def test_bad_network_is_waited_out(proxy: Proxy, s3_root: str, name: str) -> None:
    """Reliability R9, 19 of 24 cases: the work finishes, and nothing is lost or there twice."""
    work, rule = FINISHES[name]
    proxy.rules = [rule]
    work(s3_root)
    assert proxy.spoilt


@pytest.mark.s3
@pytest.mark.parametrize("work", [through_objects, pytest.param(through_table, marks=pytest.mark.all_cases)])
def test_silence_for_ever(proxy: Proxy, s3_root: str, monkeypatch: pytest.MonkeyPatch, work: Work) -> None:
    """A store that never answers is one clear error that names it and the variable to look at (R9, 2 cases)."""
    monkeypatch.setattr(objects, "RETRIES", 1)
    monkeypatch.setattr("flux2_core.store.table.RETRY_WAITS_S", (0.1,))
    proxy.rules = [Rule("stall")]
    with pytest.raises(SetupError, match=r"s3://bucket.*did not answer.*AWS_ENDPOINT_URL"):
        work(s3_root)


@pytest.fixture
def renew(proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], object]:
    """Credentials in a file, as somebody else renews them: `renew("second")`."""
    if s3_server.GIVEN in os.environ:
        pytest.skip("a given server knows no keys but its own")
    path, secret = tmp_path / "credentials", os.environ["AWS_SECRET_ACCESS_KEY"]
    for name in s3_server.SECRETS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))

    def write(key: str) -> None:
        path.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")

    write("first")
    return write


@pytest.mark.s3
def test_expired_credentials_are_read_anew_by_objects(proxy: Proxy, s3_root: str, renew: Callable) -> None:
    """Credentials that expire while work goes on are awaited and read anew from where they stand (R9, 1 case)."""
    objects.write(f"{s3_root}/before", b"1")
    proxy.expired = {"first"}
    threading.Timer(1.0, renew, ["second"]).start()
    objects.write(f"{s3_root}/after", b"2")
    assert [objects.read(f"{s3_root}/{name}") for name in ("before", "after")] == [b"1", b"2"]
    assert "ExpiredToken" in proxy.spoilt


@pytest.mark.s3
def test_expired_credentials_are_read_anew_by_tables(proxy: Proxy, s3_root: str, renew: Callable) -> None:
    """The same for a writer and for a reader that hold a table open: no row is lost (R9, 1 case)."""
    table = create(s3_root)
    with Writer(table, batch_rows=10, batch_bytes=1 << 20) as writer:
        for number in range(20):
            writer.add(row(number))
            if number == 9:
                proxy.expired = {"first"}
                threading.Timer(0.7, renew, ["second"]).start()
    reader = Reader(Table.open(table.uri), keys_of(range(20)))
    proxy.expired = {"first", "second"}
    renew("third")
    assert [bytes(one.payload) for one in reader.fetch(keys_of(range(20)))] == [row(n).payload for n in range(20)]
    assert_exactly(table.uri, range(20))


@pytest.mark.s3
def test_credentials_that_stay_expired(
    proxy: Proxy, s3_root: str, renew: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Credentials that nobody renews are one clear error, of objects and of tables (R9, 1 case)."""
    writer = Writer(create(s3_root), batch_rows=10, batch_bytes=1 << 20, waits_s=(0.1,))
    proxy.expired = {"first"}
    monkeypatch.setattr(objects, "RENEWAL_WAITS_S", (0.0, 0.1))
    with pytest.raises(SetupError, match=r"s3://.*expired: renew them"):
        objects.exists(f"{s3_root}/x")
    with pytest.raises(SetupError, match=r"s3://.*expired; renew AWS_SESSION_TOKEN"), writer:
        writer.add(row(1))


def test_a_row_is_one_request(proxy: Proxy, s3_root: str) -> None:
    """Reading rows from object storage takes one ranged GET each, whether inline or in a .blob file."""
    table = create(s3_root)
    fill(table, range(8))
    with Writer(Table.open(table.uri), batch_rows=8, batch_bytes=1 << 30) as writer:
        for number in range(8, 12):
            writer.add(row(number, size=100_000))
    opened = Table.open(table.uri)
    reader = Reader(opened, keys_of(range(12)))
    proxy.asked.clear()
    assert [bytes(one.payload) for one in reader.fetch(keys_of(range(12)))] == [
        row(number, size=50 if number < 8 else 100_000).payload for number in range(12)
    ]
    assert [method for method, _ in proxy.asked] == ["GET"] * 12
