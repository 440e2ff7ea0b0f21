"""The settings of a Ray that a run starts; tests/flows/test_exposure.py watches a real one."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import ray

from flux2_core.errors import SetupError
from stages import embedded, vitals


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What Ray was given, and the environment in which it was started; no Ray is."""
    seen: dict[str, Any] = {"ended": 0}
    monkeypatch.setattr(ray, "init", lambda **given: seen.update(given=given, environment=dict(os.environ)))
    monkeypatch.setattr(ray, "shutdown", lambda: seen.update(ended=seen["ended"] + 1))
    # no cluster is there whose processes could be looked at (tests/flows/test_deaths.py does that)
    monkeypatch.setattr(vitals.Vitals, "__init__", lambda _self: None)
    monkeypatch.setattr(vitals.Vitals, "watch", lambda _self: None)
    monkeypatch.setattr(vitals.Vitals, "leave", lambda _self: ray.shutdown())
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: seen.get("address", embedded.LOOPBACK))
    monkeypatch.setattr(embedded.tempfile, "tempdir", str(tmp_path))
    for name in (embedded.TOKEN, embedded.TOKEN_FILE, "RAY_TMPDIR", *embedded.INTERFACES, *embedded.NICENESS):
        monkeypatch.delenv(name, raising=False)
    return seen


def test_each_run_has_a_token_of_its_own(started: dict[str, Any], tmp_path: Path) -> None:
    """A token for the owner alone, another one each time, for as long as Ray is there; the environment is as before."""
    before, tokens = dict(os.environ), []
    for _ in range(2):
        with embedded.started(2):
            file = Path(started["environment"][embedded.TOKEN_FILE])
            tokens.append(file.read_text())
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert not file.exists()
    assert len({*tokens}) == 2
    assert min(map(len, tokens)) == 64
    assert started["ended"] == 2
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("name", "value", "file"),
    [
        (embedded.TOKEN, "mine", None),
        (embedded.TOKEN_FILE, "/run/secrets/token", "/run/secrets/token"),
        ("GLOO_SOCKET_IFNAME", "eth7", "ours"),
        ("RAY_worker_niceness", "10", "ours"),
    ],
)
def test_what_the_user_set_stays(
    started: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str, value: str, file: str | None
) -> None:
    """A token, its file, interface or niceness of the user's own is what Ray gets; no second token is there."""
    monkeypatch.setenv(name, value)
    with embedded.started(2):
        held = started["environment"]
    assert held[name] == value
    given = held.get(embedded.TOKEN_FILE)
    assert Path(given).name.startswith("cacheloom-ray-") if file == "ours" else given == file, given


def test_only_the_owner_enters_the_folder(started: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    """Ray's sessions lie in a folder of mode 0700, also where it was there before; a link is refused; RAY_TMPDIR is the
    user's word."""
    folder = tmp_path / f"ray-{os.getuid()}"
    folder.mkdir(mode=0o755)
    with embedded.started(2):
        assert Path(started["given"]["_temp_dir"]).parent == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SetupError, match="belongs to somebody else"), embedded.started(2):
        pytest.fail("started")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with embedded.started(2):
        assert started["given"]["_temp_dir"] is None


def test_a_ray_that_others_reach_is_refused(started: dict[str, Any]) -> None:
    """Another release of Ray that takes another address all the same is ended, and the run with it."""
    started["address"] = "192.0.2.7"
    with pytest.raises(SetupError, match=r"192\.0\.2\.7"), embedded.started(2):
        pytest.fail("started")
    assert started["ended"] == 1
