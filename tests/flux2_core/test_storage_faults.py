"""flux2_core.storage_faults: what is retried, what is said, and that a bad network loses nothing."""

import http.client
import http.server
import random
import threading
from collections.abc import Iterator
from typing import ClassVar

import pytest

from flux2_core import storage_faults
from flux2_core.errors import DataError, SetupError
from flux2_core.store import Table, Writer
from tests.flux2_core.store_writers import create, row

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
        ("Server returned non-2xx status code: 403 Forbidden: <Code>AccessDenied</Code>", S3, SetupError, False),
        ("Object at location x not found", S3, DataError, False),
    ],
)
def test_failures_are_told_apart(text, uri, kind, again):
    """Each failure becomes the exit code it deserves, and only what may pass is tried again."""
    error = OSError(text)
    assert isinstance(storage_faults.explanation(error, uri), kind)
    assert storage_faults.passes(error, uri) is again


def test_panic_is_explained():
    """A panic of Lance's Rust code is a DataError; Ctrl-C stays what it is."""
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(DataError, match=r"t\.lance"), storage_faults.explained(LOCAL):
        raise panic("called `Option::unwrap()` on a `None` value")
    with pytest.raises(KeyboardInterrupt), storage_faults.explained(LOCAL):
        raise KeyboardInterrupt


class BadNetwork(http.server.BaseHTTPRequestHandler):
    """Passes requests on to a real S3 server, except for the share that it spoils."""

    protocol_version = "HTTP/1.1"
    upstream: ClassVar[str] = ""
    share: ClassVar[float] = 0.0
    faults: ClassVar[tuple[str, ...]] = ("slow", "500", "cut")
    dice: ClassVar[random.Random] = random.Random(0)
    spoilt: ClassVar[list[str]] = []

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.dice.choice(self.faults) if self.dice.random() < self.share else ""
        if fault:
            self.spoilt.append(fault)
        if fault in ("slow", "500"):
            status, code = (503, "SlowDown") if fault == "slow" else (500, "InternalError")
            self._answer(status, {}, f"<Error><Code>{code}</Code></Error>".encode())
            return
        connection = http.client.HTTPConnection(self.upstream, timeout=30)
        connection.request(self.command, self.path, body, dict(self.headers))
        response = connection.getresponse()
        data = response.read()
        headers = {name: value for name, value in response.getheaders() if name.lower() in KEPT}
        if self.command == "HEAD":
            headers["Content-Length"] = response.getheader("Content-Length") or "0"
        self._answer(response.status, headers, data, cut=fault == "cut")
        connection.close()

    def _answer(self, status: int, headers: dict[str, str], data: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = cut

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

    def log_message(self, *_: object) -> None:
        pass


KEPT = {"etag", "last-modified", "content-type", "content-range", "accept-ranges"}


@pytest.fixture
def network(s3_root: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[BadNetwork]]:
    """The S3 server of `s3_root` behind a network that can be made bad."""
    handler = type("Handler", (BadNetwork,), {"upstream": s3_endpoint.removeprefix("http://"), "spoilt": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    yield handler
    server.shutdown()
    server.server_close()


@pytest.mark.s3
@pytest.mark.parametrize("share", [0.05, 0.2, pytest.param(0.5, marks=pytest.mark.all_cases)])
def test_bad_network(network, s3_root, share):
    """SlowDown, 500 and bodies cut short on a share of requests: every row arrives once (reliability R9)."""
    table = create(s3_root)
    network.share, network.dice = share, random.Random(7)
    with Writer(table, batch_rows=10, batch_bytes=1 << 20) as writer:
        for number in range(60):
            writer.add(row(number, size=2_000))
    network_was = list(network.spoilt)
    assert writer.inserted <= 60  # a commit whose answer was lost is not counted
    assert len(Table.open(table.uri).present(row(number).key for number in range(60))) == 60
    network.share = 0.0
    found = list(Table.open(table.uri).keys())
    assert len(found) == len(set(found)) == 60
    assert network_was
