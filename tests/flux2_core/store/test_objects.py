"""flux2_core.store.objects: the same behaviour on a folder and on S3."""

import http.server
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import ClassVar

import pytest

from flux2_core.errors import SetupError, UsageError
from flux2_core.store import objects
from flux2_core.store.table import Table


def test_write_then_read(root):
    """What was written is read back, overwritten whole, listed with its size, and gone once deleted."""
    uri = objects.join(root, "runs", "a.bin")
    assert not objects.exists(uri)
    objects.write(uri, b"first")
    objects.write(uri, memoryview(b"second!"))
    objects.write(objects.join(root, "runs", "deep", "b.bin"), b"")
    objects.write(objects.join(root, "runs-other", "c.bin"), b"x")
    assert objects.read(uri) == b"second!"
    assert objects.exists(uri)
    listed = list(objects.listing(objects.join(root, "runs")))
    assert listed == [(uri, 7), (objects.join(root, "runs", "deep", "b.bin"), 0)]
    objects.delete(uri)
    objects.delete(uri)
    assert not objects.exists(uri)


def test_missing(root):
    """Reading nothing is FileNotFoundError; listing a folder that is not there lists nothing."""
    with pytest.raises(FileNotFoundError):
        objects.read(objects.join(root, "no"))
    assert list(objects.listing(objects.join(root, "no"))) == []
    assert not objects.exists(objects.join(root, "no"))


def test_probe_leaves_nothing(root):
    """A good store passes the probe, and the probe cleans up after itself."""
    objects.probe(root)
    assert list(objects.listing(root)) == []


@pytest.mark.s3
def test_listing_pages(s3_root, monkeypatch):
    """A listing of more than one page is complete."""
    client = objects._client(os.environ["AWS_ENDPOINT_URL"], "us-east-1", "test")
    plain = client.list_objects_v2
    monkeypatch.setattr(client, "list_objects_v2", lambda **query: plain(**query, MaxKeys=2))
    for number in range(5):
        objects.write(objects.join(s3_root, str(number)), b"x")
    assert len(list(objects.listing(s3_root))) == 5


@pytest.mark.s3
def test_missing_bucket(s3_root):
    """A bucket that does not exist is a SetupError that says so."""
    with pytest.raises(SetupError, match="bucket does not exist"):
        objects.probe("s3://no-such-bucket-here/x")


def test_other_schemes():
    """gs:// and the like are refused with the allowed forms."""
    with pytest.raises(UsageError, match="s3://bucket/prefix"):
        objects.read("gs://bucket/x")
    with pytest.raises(UsageError, match=r"s3://\*\*\*@bucket/x: no bucket"):
        objects.read("s3://key:secret@bucket/x")


def test_probe_not_writable(tmp_path):
    """A root below a file cannot be written: SetupError, not a stack trace."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(SetupError, match="choose another folder"):
        objects.probe(str(tmp_path / "file" / "cache"))


def test_full_disk(tmp_path):
    """A write that does not fit is a SetupError, keeps the old bytes and leaves no half-written file."""
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    code = (
        "import resource, signal, sys; from flux2_core import errors; from flux2_core.store import objects\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try: objects.write(sys.argv[1], b'x' * 100_000)\n"
        "except errors.SetupError as error: sys.exit(4 if 'free space' in str(error) else 1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    assert done.returncode == 4
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ACCESS_KEY_ID": "x"}, "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ({"AWS_PROFILE": "nobody"}, "correct AWS_PROFILE"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "AWS_ENDPOINT_URL=http://127.0.0.1:9: nothing answers"),
        ({"AWS_ENDPOINT_URL": "127.0.0.1:9000"}, "AWS_ENDPOINT_URL=127.0.0.1:9000"),
        ({"AWS_ENDPOINT_URL": "http://me:hunter2@127.0.0.1:9"}, "AWS_ENDPOINT_URL has a name or password in it"),
        ({"AWS_ENDPOINT_URL": "http://me:hun/ter2@127.0.0.1"}, "AWS_ENDPOINT_URL has a name or password in it"),
    ],
)
def test_what_is_missing_is_named(monkeypatch, tmp_path, environment, says):
    """No credentials, half of them, an unknown profile, an endpoint where nobody is or that is none: the error names
    the variable, at once, of objects and of tables."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
        **environment,
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SetupError, match=says) as by_objects:
        objects.read("s3://bucket/x")
    with pytest.raises(SetupError, match=says) as by_tables:
        Table.open("s3://bucket/x.lance")
    for raised in (by_objects, by_tables):  # what it was raised from is in Prefect's logs
        assert "hun" not in "".join(traceback.format_exception(raised.value))


REFUSAL = (  # as AWS answers: with all that it was asked
    "<Error><Code>SignatureDoesNotMatch</Code><Message>The request signature we calculated does not match</Message>"
    "<CanonicalRequest>GET\n{}</CanonicalRequest></Error>"
)


class CarelessStore(http.server.BaseHTTPRequestHandler):
    """Just enough S3 to be wrong: `flaws` says how."""

    protocol_version = "HTTP/1.1"  # else boto3 waits a second for "100 Continue" at every PUT
    flaws: frozenset[str] = frozenset()
    kept: ClassVar[dict[str, bytes]] = {}
    cuts_left = 0

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("If-None-Match") and self.path in self.kept and "overwrites" not in self.flaws:
            self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
            return
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):
            body = body.split(b"\r\n")[1]
        self.kept[self.path] = body
        self._answer(200, b"")

    def do_GET(self) -> None:
        if "refuses" in self.flaws:
            canonical = "".join(f"{name.lower()}:{value}\n" for name, value in self.headers.items())
            self._answer(403, REFUSAL.format(canonical).encode())
            return
        data = self.kept[self.path]
        if self.headers.get("Range") and "whole" not in self.flaws:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            self._answer(206, data[int(first) : int(last) + 1])
        elif type(self).cuts_left:
            type(self).cuts_left -= 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:-1])
            self.close_connection = True
        else:
            self._answer(200, data)

    def do_DELETE(self) -> None:
        self._answer(204, b"")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def careless(monkeypatch) -> Iterator[type[CarelessStore]]:
    handler = type("Handler", (CarelessStore,), {"kept": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "careless")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    yield handler
    server.shutdown()
    server.server_close()


@pytest.mark.s3
@pytest.mark.parametrize(("flaw", "says"), [("overwrites", "If-None-Match"), ("whole", "Range")])
def test_probe_refuses(careless, flaw, says):
    """A store that ignores If-None-Match, or answers a range with the whole object, is refused by name."""
    objects.probe("s3://bucket/x")
    careless.flaws = frozenset({flaw})
    with pytest.raises(SetupError, match=says):
        objects.probe("s3://bucket/x")


@pytest.mark.s3
def test_body_cut_short(careless):
    """A connection that ends in the middle of a body is read again, not returned short; forever is a SetupError."""
    objects.write("s3://bucket/x", b"0123456789")
    careless.cuts_left = 3
    assert objects.read("s3://bucket/x") == b"0123456789"
    careless.cuts_left = 99
    with pytest.raises(SetupError, match="did not answer"):
        objects.read("s3://bucket/x")


@pytest.mark.s3
def test_a_refusal_names_no_secret(careless, monkeypatch):
    """R14: AWS answers a wrong signature with the whole request, session token and all: neither error shows it, nor
    what it was raised from, which Prefect logs."""
    careless.flaws = frozenset({"refuses"})
    planted = {"AWS_SECRET_ACCESS_KEY": "planted-key-4f1c", "AWS_SESSION_TOKEN": "planted-token-77aa"}
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    for ask in (lambda: objects.read("s3://bucket/x"), lambda: Table.open("s3://bucket/x.lance")):
        with pytest.raises(SetupError, match=r"correct|other credentials") as refused:
            ask()
        told = "".join(traceback.format_exception(refused.value))
        assert not [value for value in planted.values() if value in told], told
