"""R17, R22: who may talk to a Prefect server started as the README says, and what `check` says of the others."""

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, PREFECT_HOME, temporary_settings

from flows import server
from flux2_core.errors import SetupError
from tests.flows.real_prefect import PASSWORD, ROOT, authorization

STRANGER = "https://evil.example"


class Open(http.server.BaseHTTPRequestHandler):
    """A server that answers everybody."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def unguarded() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Open) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}/api"
        listening.shutdown()


@pytest.mark.prefect
def test_the_readmes_server_is_for_those_who_know(prefect_server: dict[str, str]) -> None:
    """Without the password, or with another one, 401; a page of a stranger is not let in even with it, the dashboard
    is; and the dashboard knows that it has to ask for the password."""
    url = prefect_server["PREFECT_API_URL"]
    known = {"authorization": authorization(prefect_server)}
    wrong = {"authorization": authorization({"PREFECT_API_AUTH_STRING": "cacheloom:guess"})}
    for path in ("/flow_runs/filter", "/artifacts/filter", "/logs/filter"):
        assert httpx.post(url + path, json={}).status_code == 401
        assert httpx.post(url + path, json={}, headers=wrong).status_code == 401
    for origin, allowed in ((STRANGER, None), (url.removesuffix("/api"), url.removesuffix("/api"))):
        answer = httpx.post(url + "/flow_runs/filter", json={}, headers=known | {"origin": origin})
        assert answer.status_code == 200
        assert answer.headers.get("access-control-allow-origin") == allowed
    assert httpx.get(url.removesuffix("/api") + "/ui-settings").json()["auth"] == "BASIC"


@pytest.mark.prefect
def test_check_tries_the_server(prefect_server: dict[str, str]) -> None:
    """With the password it is well; with another one `check` names the setting that is wrong, and not its value."""
    url = prefect_server["PREFECT_API_URL"]
    with temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: PASSWORD}):
        assert server.describe() == f"{url}: answers to its password only"
    with (
        temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: "cacheloom:guess"}),
        pytest.raises(SetupError, match="PREFECT_API_AUTH_STRING") as refused,
    ):
        server.describe()
    assert "guess" not in str(refused.value)


def test_check_warns_of_an_open_server(unguarded: str) -> None:
    """A server that answers without a password is named, with what to set."""
    with temporary_settings({PREFECT_API_URL: unguarded}):
        told = server.describe()
    assert told.startswith(f"! {unguarded} answers without authentication")
    assert "PREFECT_SERVER_API_AUTH_STRING" in told


def test_check_names_a_server_that_is_not_there() -> None:
    """Nothing answers: the setting and the way out, and no password that stands in the URL."""
    with (
        temporary_settings({PREFECT_API_URL: "http://me:hunter2@127.0.0.1:9/api"}),
        pytest.raises(SetupError, match=r"PREFECT_API_URL=http://\*\*\*@127.0.0.1:9/api: nothing answers") as refused,
    ):
        server.describe()
    assert "hunter2" not in str(refused.value)


def test_run_asks_the_server_first() -> None:
    """`run` is refused at once where the server that is configured does not answer, as `check` is; where none is, and
    Prefect can keep no database, the folder is named."""
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}),
        pytest.raises(SetupError, match=r"PREFECT_API_URL=http://127.0.0.1:9/api: nothing answers .*`run` to bring"),
    ):
        server.embed()
    with (
        temporary_settings({PREFECT_HOME: Path("/proc/cacheloom")}, restore_defaults={PREFECT_API_URL}),
        pytest.raises(SetupError, match=r"PREFECT_HOME, by default ~/\.prefect: /proc/cacheloom: cannot write there"),
    ):
        server.embed()


def test_an_embedded_server_that_does_not_come_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose own server has ended before it answered is refused, with the setting that gives it longer."""
    monkeypatch.setattr(server, "_embedded", ["one that ended"])
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}),
        pytest.raises(SetupError, match=r"did not start within \d+ s .*STARTUP_TIMEOUT_SECONDS\), or start one"),
    ):
        server.ready()


def test_the_readme_starts_it_so() -> None:
    """The settings of the tests' server are those of the README."""
    text = Path(ROOT, "README.md").read_text()
    for name in ("SERVER_API_AUTH_STRING", "API_AUTH_STRING", "SERVER_API_CORS_ALLOWED_ORIGINS"):
        assert f"PREFECT_{name}=" in text
