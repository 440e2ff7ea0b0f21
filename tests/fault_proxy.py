"""A loopback proxy in front of a real S3 server that spoils requests, by rule and by seed.

Faults: `SlowDown` and `InternalError` answer in the server's place; `NoSuchUpload` says that a multipart upload is
gone; `PreconditionFailed` claims that an object exists; `stall` says nothing for longer than the client waits; `drop`
closes the connection in the middle of the request's body; `cut` closes it in the middle of the answer's body; `lost`
lets the server do its work and then closes it without a word. A key in `expired` is answered with ExpiredToken.
"""

import contextlib
import http.client
import http.server
import math
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

STATUS = {"SlowDown": 503, "InternalError": 500, "NoSuchUpload": 404, "PreconditionFailed": 412, "ExpiredToken": 400}
KEPT = {"etag", "last-modified", "content-type", "content-range", "accept-ranges"}


@dataclass
class Rule:
    """Which requests are spoilt: a share of those whose method and path match, `times` of them at most."""

    fault: str
    share: float = 1.0
    method: str = ""
    path: str = ""
    times: int = 1_000_000


@dataclass
class Proxy:
    """The proxy's address and what it does; rules may change while it runs."""

    url: str = ""
    rules: list[Rule] = field(default_factory=list)
    expired: set[str] = field(default_factory=set)
    dice: random.Random = field(default_factory=lambda: random.Random(7))
    stall_s: float = 1.5
    delay_s: float = 0.0
    bytes_per_s: float = math.inf
    """A far store: every request waits so long, and for its bytes both ways."""
    spoilt: list[str] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)
    """(method, path) of every request that came."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, method: str, path: str, authorization: str) -> str:
        """What happens to a request; empty where nothing does."""
        with self.lock:
            self.asked.append((method, path))
            if any(f"Credential={key}/" in authorization for key in self.expired):
                return self._note("ExpiredToken")
            for rule in self.rules:
                if rule.times and rule.method in method and rule.path in path and self.dice.random() < rule.share:
                    rule.times -= 1
                    return self._note(rule.fault)
        return ""

    def _note(self, fault: str) -> str:
        self.spoilt.append(fault)
        return fault


@contextlib.contextmanager
def proxied(upstream: str, *, address: str = "127.0.0.1") -> Iterator[Proxy]:
    """A proxy in front of `http://host:port`, at an address of this machine."""
    proxy = Proxy()
    handler = type("Handler", (_Handler,), {"upstream": upstream.removeprefix("http://"), "proxy": proxy})
    server = http.server.ThreadingHTTPServer((address, 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    proxy.url = f"http://{address}:{server.server_address[1]}"
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream: str
    proxy: Proxy

    def _pass_on(self) -> None:
        fault = self.proxy.fault(self.command, self.path, self.headers.get("Authorization", ""))
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "drop":
            self.rfile.read(length // 2)
            self._reset()
            return
        body = self.rfile.read(length)
        if fault == "stall":
            time.sleep(self.proxy.stall_s)
            self._reset()
        elif fault in STATUS:
            self._answer(STATUS[fault], {}, f"<Error><Code>{fault}</Code></Error>".encode())
        else:
            self._forward(body, fault)

    def _forward(self, body: bytes, fault: str) -> None:
        connection = http.client.HTTPConnection(self.upstream, timeout=60)
        connection.request(self.command, self.path, body, dict(self.headers))
        response = connection.getresponse()
        data = response.read()
        connection.close()
        time.sleep(self.proxy.delay_s + (len(body) + len(data)) / self.proxy.bytes_per_s)
        if fault == "lost":
            self._reset()
            return
        headers = {name: value for name, value in response.getheaders() if name.lower() in KEPT}
        if self.command == "HEAD":
            headers["Content-Length"] = response.getheader("Content-Length") or "0"
        self._answer(response.status, headers, data, cut=fault == "cut")

    def _answer(self, status: int, headers: dict[str, str], data: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self._reset()

    def _reset(self) -> None:
        """End the connection as a lost peer does: with RST, not with a farewell."""
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # a client that gave up
            super().handle()

    def log_message(self, *_: object) -> None:
        pass
