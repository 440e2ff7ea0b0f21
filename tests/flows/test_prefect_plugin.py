"""`prefect deployment run NAME` without a slash: what it completes, what it refuses, and what it leaves alone."""

import json
import sys
from pathlib import Path

import pytest
from prefect.plugins import HookContext

from flows.prefect_plugin import choose, setup_environment, slashless
from tests.flows.real_prefect import POOL, ROOT, ask, prefect, server_environment

FLOW = """
import os
from pathlib import Path
from prefect import flow

@flow(name="{name}")
def run(word: str = "nothing"):
    Path("{folder}", word).write_text(str(os.getpid()))
"""


@pytest.mark.parametrize(
    ("line", "position", "profile"),
    [
        ("deployment run demo", 2, None),
        ("deployments run demo", 2, None),
        ("deployment run demo --watch", 2, None),
        ("deployment run --watch demo", 3, None),
        ("deployment run -p a=1 --param b=2 demo", 6, None),
        ("deployment run --flow-run-name=demo demo", 3, None),
        ("deployment run --flow-run-name demo demo", 4, None),
        ("--no-prompt deployment run demo", 3, None),
        ("--profile there deployment run demo", 4, "there"),
        ("-p there deployment run demo -p a=1", 4, "there"),
        ("--profile=there deployment run demo", 3, "there"),
    ],
)
def test_the_name_is_found_among_the_options(line, position, profile):
    """The slashless name is found wherever it stands, and never mistaken for the value of an option."""
    assert slashless(line.split()) == (position, profile)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "version",
        "deployment",
        "deployment run",
        "deployment run --help",
        "deployment run flow/demo",
        "deployment run --id 0a1b",
        "deployment run a b",
        "deployment inspect demo",
        "deployment ls",
        "deploy --all",
        "flow-run cancel demo",
        "worker start --pool run",
    ],
)
def test_other_commands_are_left_alone(line):
    """Nothing but `deployment run` with a slashless name is touched."""
    assert slashless(line.split()) is None


@pytest.mark.parametrize("argv", [["prefect", "version"], ["pytest", "deployment", "run", "demo"], ["-c"], []])
def test_the_hook_asks_no_server_for_other_commands(monkeypatch, argv):
    """For other commands and other programs the hook changes nothing, with no server in reach."""
    monkeypatch.setattr(sys, "argv", list(argv))
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    context = HookContext(prefect_version="3", api_url="http://127.0.0.1:9/api", logger_factory=None)
    assert setup_environment(ctx=context) is None
    assert sys.argv == argv


def test_one_match_is_completed():
    """The one deployment of that name is chosen, whatever else there is."""
    assert choose("demo", ["a/other", "b/demo", "demo/other"]) == "b/demo"


@pytest.mark.parametrize(
    ("deployed", "words"),
    [
        (["a/demo", "b/demo"], ["Several", "a/demo", "b/demo"]),
        (["a/dmeo"], ["'demo'", "did you mean 'dmeo'"]),
        (["a/xyz"], ["'demo'", "a/xyz"]),
        ([], ["'demo'", "deploy --all"]),
    ],
)
def test_no_or_several_matches_are_one_line(deployed, words):
    """None or several: one line that says what there is."""
    with pytest.raises(SystemExit) as refusal:
        choose("demo", deployed)
    message = str(refusal.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def _deploy(environment: dict[str, str], folder: Path, **deployments: str) -> None:
    """Deploy, in one go, flows by name, each under the name that is given."""
    described = []
    for flow, name in deployments.items():
        (folder / f"{flow}_flow.py").write_text(FLOW.format(name=flow, folder=folder))
        described.append({"name": name, "entrypoint": f"{flow}_flow.py:run", "work_pool": {"name": POOL}})
    (folder / "prefect.yaml").write_text(json.dumps({"deployments": described}))
    prefect(environment, "--no-prompt", "deploy", "--all", cwd=folder, check=True)


@pytest.mark.prefect
@pytest.mark.slow
@pytest.mark.all_cases
def test_a_slashless_name_runs_on_a_real_worker(prefect_server, start_worker, tmp_path):
    """Both wordings run the deployment on a real process worker to the end, with options before and after the name."""
    _deploy(prefect_server, tmp_path, greet="hello")
    start_worker(prefect_server)
    for name, word in (("hello", "short"), ("greet/hello", "long")):
        ran = prefect(prefect_server, "deployment", "run", "--param", f"word={word}", name, "--watch")
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert "Creating flow run for deployment 'greet/hello'" in ran.stdout
        assert (tmp_path / word).exists()


@pytest.mark.prefect
@pytest.mark.slow
def test_what_cannot_be_completed_is_refused_in_one_line(prefect_server, tmp_path):
    """An unknown name and an ambiguous one: one line on standard error, exit code 1, no flow run."""
    _deploy(prefect_server, tmp_path, one="twice", two="twice")
    before = _runs(prefect_server)
    for name, words in (("nonsense", ["No deployment", "'nonsense'"]), ("twice", ["one/twice", "two/twice"])):
        refused = prefect(prefect_server, "deployment", "run", name)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert len(refused.stderr.splitlines()) == 1
        for word in words:
            assert word in refused.stderr
    assert _runs(prefect_server) == before


@pytest.mark.prefect
def test_a_server_that_is_down_is_named_in_one_line(tmp_path):
    """Without a server the slashless form says so in one line."""
    environment = server_environment(tmp_path, 9)
    refused = prefect(environment, "deployment", "run", "demo")
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1
    assert "127.0.0.1:9" in refused.stderr


@pytest.mark.prefect
def test_the_plugin_is_enabled_by_the_repository(tmp_path):
    """In the repository's root Prefect itself finds and loads the plugin; no setting of the user's is needed, and no
    server for any other command."""
    environment = server_environment(tmp_path, 9)
    report = prefect(environment, "plugins", "diagnose", check=True).stdout
    assert "cacheloom" in report
    assert "error" not in report.lower()
    assert (ROOT / "pyproject.toml").exists()


def _runs(environment: dict[str, str]) -> int:
    return ask(environment, "/flow_runs/count", {})
