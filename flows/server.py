"""Prefect's server: the embedded one behind a password of its own, and what `check` asks of a running one."""

from __future__ import annotations

import atexit
import os
import secrets
import signal
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import httpx
import prefect
from prefect.client.orchestration import get_client
from prefect.context import refresh_global_settings_context
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_SERVER_EPHEMERAL_ENABLED,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    get_current_settings,
)

from flux2_core.errors import SetupError
from flux2_core.store import objects

RETRIES = "2"  # of a request to the embedded server, 6 s in all; Prefect's own 5 take a minute where it has died
PATIENCE = httpx.Timeout(10.0, connect=3.0)  # of a request; a lost packet is sent again after 1 s
NO_ORIGIN = "none"  # what no browser sends; an empty list would count as not given, and the default is every origin

LOOPBACK = "127.0.0.1"
EPHEMERAL = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}  # as Prefect's

_embedded: list[subprocess.Popen[bytes]] = []  # one at most


def embed() -> None:
    """Start a server on loopback where none is configured, for as long as this process lives; else see that it answers.

    It is the one that Prefect would start itself, but behind a password, closed to web pages of others, and deaf to
    the terminal's Ctrl-C: a terminal interrupts every process of the command, and without its server the flow run would
    spend minutes on telling it that it ended. It is handed a socket that listens already: who asks before it is there
    waits (`ready`). Prefect's own way of starting it imports the whole server into this process too, 1.9 CPU-s (3.9).

    Raises:
        SetupError: the server that is configured does not answer, or the folder of ours takes no database.
    """
    if PREFECT_API_URL.value():
        if not _embedded:
            describe()
        return
    if not PREFECT_SERVER_EPHEMERAL_ENABLED.value():
        return
    try:
        objects.probe(str(PREFECT_HOME.value()))
    except SetupError as error:
        raise SetupError(f"Prefect keeps its database in PREFECT_HOME, by default ~/.prefect: {error}") from error
    password = f"cacheloom:{secrets.token_urlsafe(32)}"
    ours = dict.fromkeys(("PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING"), password)
    ours["PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"] = NO_ORIGIN
    ours["PREFECT_CLIENT_MAX_RETRIES"] = RETRIES
    _remember(ours)
    with socket.create_server((LOOPBACK, 0)) as listening:
        _embedded.append(_start(listening))
        port = listening.getsockname()[1]
    _remember(ours | {"PREFECT_API_URL": f"http://{LOOPBACK}:{port}/api"})


def _remember(settings: dict[str, str]) -> None:
    """Give Prefect settings, which it gives to its server; Ray's processes need no password of Prefect's."""
    before = {name: os.environ[name] for name in settings if name in os.environ}
    os.environ.update(settings)
    refresh_global_settings_context()
    for name in settings:
        del os.environ[name]
    os.environ.update(before)


def _start(listening: socket.socket) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(prefect.__module_path__.parent)]
    command += ["--factory", "prefect.server.api.server:create_app", "--fd", str(listening.fileno())]
    command += ["--log-level", "error", "--lifespan", "on"]
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a child starts with its parent's mask
    try:
        started = subprocess.Popen(command, pass_fds=(listening.fileno(),), env={**os.environ, **EPHEMERAL, **settings})
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    atexit.register(started.terminate)
    return started


def ready() -> None:
    """Wait for the server that `embed` started.

    Raises:
        SetupError: it has ended, or does not answer in time.
    """
    if not _embedded:
        return
    patience_s = PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()
    try:
        httpx.get(f"{PREFECT_API_URL.value()}/health", timeout=patience_s).raise_for_status()
    except httpx.HTTPError as error:
        raise SetupError(
            f"Prefect's embedded server did not start within {patience_s} s ({error}): give it longer "
            "(PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS), or start one yourself (prefect server start) and set "
            "PREFECT_API_URL"
        ) from error


def gone() -> bool:
    """Whether the server that `embed` started has ended since."""
    return any(one.poll() is not None for one in _embedded)


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
