"""Running the real `prefect` command in tests: its environment, its server's health, its processes' end."""

import base64
import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from flows.reaper import MARKER

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
START_S = 90  # a server is up in 3-13 s; a busy two-core machine has needed ten times that
POOL = "local"
PASSWORD = "cacheloom:of these tests"


def server_environment(home: Path, port: int) -> dict[str, str]:
    """This environment without any PREFECT setting of the developer's, pointed at a server on `port`, as the README
    starts one: behind a password, its dashboard the only page that may ask it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_") and key != MARKER}
    url = f"http://127.0.0.1:{port}/api"
    return kept | {
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_UI_API_URL": url,  # the dashboard is blank on a port other than 4200 without it
        "PREFECT_SERVER_API_AUTH_STRING": PASSWORD,
        "PREFECT_API_AUTH_STRING": PASSWORD,
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": url.removesuffix("/api"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_CLI_COLORS": "false",
        "PREFECT_CLI_WRAP_LINES": "false",
        "DO_NOT_TRACK": "1",
    }


def prefect(
    environment: dict[str, str], *arguments: str, cwd: Path = ROOT, check: bool = False, timeout_s: float = 120
) -> subprocess.CompletedProcess:
    """Run the real `prefect` command."""
    result = subprocess.run(
        [BIN / "prefect", *arguments], env=environment, cwd=cwd, capture_output=True, text=True, timeout=timeout_s
    )
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def end_tree(process: subprocess.Popen, *, grace_s: float = 10) -> None:
    """End a process that a test started, and its descendants, by id."""
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=grace_s)
        for left in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
    process.kill()
    process.wait()


def wait_until_healthy(url: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2):
            return
        time.sleep(0.2)
    raise AssertionError(f"the Prefect server did not come up:\n{log.read_text(errors='replace')[-2000:]}")


def authorization(environment: dict[str, str]) -> str:
    """The header of who knows the password."""
    return "Basic " + base64.b64encode(environment["PREFECT_API_AUTH_STRING"].encode()).decode()


def ask(environment: dict[str, str], path: str, body: dict[str, Any] | None = None) -> Any:
    """GET, or POST of `body`, at the server's REST API: `ask(env, "/flow_runs/filter", {})`."""
    request = urllib.request.Request(
        environment["PREFECT_API_URL"] + path,
        data=None if body is None else json.dumps(body).encode(),
        headers={"content-type": "application/json", "authorization": authorization(environment)},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)
