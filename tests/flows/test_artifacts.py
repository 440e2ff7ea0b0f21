"""What the dashboard is given, read back from a real server."""

import base64
import subprocess
import sys

import pytest

from flows.artifacts import IMAGE_BYTES, artifact_key, picture
from tests.flows.real_prefect import ROOT, ask

SCRIPT = """
from prefect import flow
from prefect.settings import PREFECT_API_URL, temporary_settings
from flows import artifacts

now = 0.0

@flow
def shows():
    global now, slow
    slow = artifacts.Progress("slow", "updated in time", clock=lambda: now)
    for step in range(1, 46):
        now += 0.25
        slow.update(step, 100)
    done = artifacts.Progress("Done_Bar", "finished at once", clock=lambda: now)
    done.update(1, 3)
    done.update(3, 3)
    artifacts.summary("facts", "A run", {"Training": {"path": "a|b", "loss": 0.5}}, png=b"PNG bytes")
    artifacts.table("rows", [{"path": "x.png", "reason": "truncated"}])
    artifacts.picture("grid", b"PNG bytes")

shows()
now += 5
with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
    slow.update(99, 100)
"""


@pytest.mark.parametrize(("name", "key"), [("My_run.v2", "my-run-v2"), ("--a b--", "a-b"), ("é", "cacheloom")])
def test_any_name_becomes_a_key(name, key):
    """Prefect refuses keys with other than lower-case letters, digits and dashes."""
    assert artifact_key(name) == key


def test_a_picture_too_large_is_refused():
    """A picture that would choke the server's API is refused before it is sent."""
    with pytest.raises(ValueError, match="too large"):
        picture("grid", bytes(IMAGE_BYTES + 1))


@pytest.mark.prefect
def test_artifacts_arrive(prefect_server):
    """Bars move once in 5 s, end at 100 and outlive a lost server; cells are escaped; a PNG is embedded."""
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=prefect_server, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert "99 % could not be shown" in ran.stderr
    found = ask(prefect_server, "/artifacts/filter", {"artifacts": {"key": {"any_": [*KEYS]}}})
    assert sorted(artifact["key"] for artifact in found) == sorted(KEYS)
    data = {artifact["key"]: artifact["data"] for artifact in found}
    assert data["slow"] == 40.0  # at 5 s and 10 s, not at the last call
    assert data["done-bar"] == 100.0
    assert "| path | a\\|b |" in data["facts"]
    assert "](data:image/png;base64," in data["facts"]
    assert '"reason"' in data["rows"]
    assert base64.b64encode(b"PNG bytes").decode() in data["grid"]


KEYS = ("slow", "done-bar", "facts", "rows", "grid")
