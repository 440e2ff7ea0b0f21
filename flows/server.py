"""Prefect's server: the embedded one behind a password of its own, and what `check` asks of a running one."""

from __future__ import annotations

import os
import secrets
import signal
from typing import Any
from urllib.parse import urlsplit

import httpx
from prefect.client.orchestration import get_client
from prefect.context import refresh_global_settings_context
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, PREFECT_SERVER_EPHEMERAL_ENABLED

from flux2_core.errors import SetupError
from flux2_core.store import objects

RETRIES = "2"  # of a request to the embedded server, 6 s in all; Prefect's own 5 take a minute where it has died
PATIENCE = httpx.Timeout(10.0, connect=3.0)  # of a request; a lost packet is sent again after 1 s
NO_ORIGIN = "none"  # what no browser sends; an empty list would count as not given, and the default is every origin

_embedded: list[Any] = []  # one at most


def embed() -> None:
    """Start a server on loopback where none is configured, for as long as this process lives; else see that it answers.

    It is the one that Prefect would start itself, but behind a password, closed to web pages of others, and deaf to
    the terminal's Ctrl-C: a terminal interrupts every process of the command, and without its server the flow run would
    spend minutes on telling it that it ended.

    Raises:
        SetupError: the server that is configured does not answer, or the folder of ours takes no database.
    """
    if PREFECT_API_URL.value():
        describe()
        return
    if not PREFECT_SERVER_EPHEMERAL_ENABLED.value():
        return
    try:
        objects.probe(str(PREFECT_HOME.value()))
    except SetupError as error:
        raise SetupError(f"Prefect keeps its database in PREFECT_HOME, by default ~/.prefect: {error}") from error
    from prefect.server.api.server import SubprocessASGIServer  # 4 s, for nothing where a server runs already

    password = f"cacheloom:{secrets.token_urlsafe(32)}"
    ours = dict.fromkeys(("PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING"), password)
    ours["PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"] = NO_ORIGIN
    ours["PREFECT_CLIENT_MAX_RETRIES"] = RETRIES
    before = {name: os.environ[name] for name in ours if name in os.environ}
    os.environ.update(ours)
    refresh_global_settings_context()  # Prefect remembers them, and gives them to the server
    for name in ours:
        del os.environ[name]  # Ray's processes need no password of Prefect's
    os.environ.update(before)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a child starts with its parent's mask
    try:
        (started := SubprocessASGIServer()).start()
        _embedded.append(started)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def gone() -> bool:
    """Whether the server that `embed` started has ended since."""
    return any(one.server_process is None or one.server_process.poll() is not None for one in _embedded)


def describe() -> str:
    """Which server `run` would use; with a leading `!` where it asks nobody for a password.

    Raises:
        SetupError: it does not answer, or not to us.
    """
    url = PREFECT_API_URL.value()
    if not url:
        return "no server is configured: `run` brings its own, on loopback and behind a password"
    parts = urlsplit(url)
    anonymous = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    query = {"limit": 1}
    try:
        if httpx.post(f"{anonymous}/flows/filter", json=query, timeout=PATIENCE).is_success:
            return (
                f"! {url} answers without authentication: whoever reaches it reads what runs are given, and starts "
                'some; set PREFECT_SERVER_API_AUTH_STRING (README: "Watching it")'
            )
        with get_client(sync_client=True) as client:
            client.read_flows(limit=1)
    except PrefectHTTPStatusError as error:
        raise SetupError(
            f"PREFECT_API_URL={url}: refused ({error.response.status_code}); set PREFECT_API_AUTH_STRING to the "
            "server's PREFECT_SERVER_API_AUTH_STRING"
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise SetupError(
            f"PREFECT_API_URL={url}: nothing answers ({error}); start it (prefect server start), or unset it, for "
            "`run` to bring its own"
        ) from error
    return f"{url}: answers to its password only"
