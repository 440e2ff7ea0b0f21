"""R14, R17, R22, R23: one run of everything, seen from outside: where it listens, whom it lets in, what it leaves."""

import json
import os
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from tests.flows.command import Project
from tests.flows.watching import Watched, watch
from tests.hostile import HOSTILE, rendered, unseen

pytestmark = [pytest.mark.ray, pytest.mark.prefect, pytest.mark.slow]
PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "planted-aws-4f1c0d",
    "HF_TOKEN": "hf_planted-9b27aa",
    "WANDB_API_KEY": "planted-wb-77",
}
ENDPOINT = "planted-endpoint-5d2e"
KINDS = (
    "cacheloom run", "reaper.py", "prefect.server.api.server:create_app", "/gcs/gcs_server", "/raylet/raylet",
    "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::TextWorker", "ray::ImageWorker", "ray::RayTrainWorker",
)  # fmt: skip
LASTING = 5  # looks, of which five make a second: Python asks a `file` of the machine what it is, now and then
TASKS = ("ray::_all", "ray::IDLE", "ray::_all.remote")  # pictures are looked at by as many as there are cores
HOSTILE_NAME = HOSTILE["picture"].replace("/", ":") + HOSTILE["osc52"].replace("/", ":")


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A short folder for home and temporary files: Ray's sockets have names of at most 107 letters."""
    with tempfile.TemporaryDirectory(prefix="cl-", dir="/tmp") as folder:
        for name in ("home", "tmp"):
            Path(folder, name).mkdir()
        yield Path(folder)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, photos: Path, place: Path) -> Project:
    """Pictures among which one has a hostile name; secrets in the environment, none of Ray's."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(photos, folder / "photos")
    (folder / "photos" / f"{HOSTILE_NAME}.png").write_bytes(b"not a picture")
    (folder / "photos" / "p1.txt").write_text(f"[trigger] {HOSTILE['ansi']}")
    project = Project(folder, model=tiny_model, photos=folder / "photos")
    project.environment = {name: value for name, value in project.environment.items() if not name.startswith("RAY_")}
    project.environment |= {"HOME": str(place / "home"), "TMPDIR": str(place / "tmp")} | PLANTED
    return project


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.all_cases)])
def workers(request: pytest.FixtureRequest) -> int:
    """One, which the driver asks itself; or a group of Ray Train's, which talk to each other."""
    return int(request.param)


@pytest.fixture(scope="module")
def run(project: Project, workers: int) -> Watched:
    """`cacheloom run`: Ray, both encoders, training with previews, Prefect's embedded server."""
    return watch(project, "run", f"cluster.workers={workers}", f"output.root=runs-{workers}")


def test_it_listens_on_loopback_only(run: Watched, workers: int) -> None:
    """R22: of all sockets that any process of the run waits on, none can be reached from another machine."""
    names = " ".join(name for name, _ in run.listening.values())
    for part in ("gcs_server", "raylet", "RuntimeEnv", "cacheloom"):
        assert part in names, f"{part} was not seen to listen: this would show nothing"
    sockets = Counter(process for name, process in run.listening.values() if name.startswith("ray::"))
    assert workers == 1 or max(sockets.values()) >= 3, "torch's store and gloo were not seen in a training worker"
    beyond = {place: process for place, process in run.listening.items() if not _is_loopback(place[0])}
    assert not beyond


def _is_loopback(address: str) -> bool:
    found = ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def test_nobody_comes_in_without_the_token(run: Watched, place: Path) -> None:
    """Ray answers to the run's own token and to nothing else; its file was for its owner only and is gone, no token for
    later runs was left, and only the owner may enter the folder of Ray's sessions."""
    assert run.ray == {"nobody": "UNAUTHENTICATED", "a stranger": "UNAUTHENTICATED", "we": "OK"}
    assert run.modes == {"token": 0o600, "sessions": 0o700}
    assert len(run.secrets["Ray's token"]) == 64
    assert not list((place / "tmp").glob("cacheloom-ray-*"))
    assert not (place / "home" / ".ray").exists()


def test_the_embedded_dashboard_is_nobodys(run: Watched) -> None:
    """Prefect's embedded server answers to the run's own password; a page of a stranger is not let in even with it."""
    assert {who: answer.status_code for who, answer in run.prefect.items()} == {"nobody": 401, "we": 200, "a page": 200}
    assert "access-control-allow-origin" not in run.prefect["a page"].headers


def test_no_secret_is_left_anywhere(run: Watched, project: Project, place: Path) -> None:
    """R14: the planted secrets, and those of the run itself, are in none of the files that it leaves (flow parameters,
    task inputs, logs and artifacts in Prefect's database, Ray's sessions and logs, checkpoints, LoRA metadata, report,
    card, TensorBoard), in no command line, and in nothing that it said."""
    files = [file for folder in (project.folder, place) for file in folder.rglob("*") if file.is_file()]
    for name in (
        "prefect.db", "raylet.out", "gcs_server.out", "runtime_env_agent.log", "report.html", "README.md",
        "tiny.safetensors", "config.toml", "metrics.jsonl", "checkpoint.json",
    ):  # fmt: skip
        assert name in {file.name for file in files}, f"{name} is not there: this would show nothing"
    assert [file for file in files if "tfevents" in file.name]
    for what, secret in (PLANTED | run.secrets).items():
        assert not [file for file in files if secret.encode() in file.read_bytes()], what
        assert not [word for word in run.words if secret in word], what
        assert secret not in run.said + json.dumps(run.told), what


def test_it_starts_few_processes(run: Watched, workers: int) -> None:
    """A run of one worker starts the server, Ray's four, the watchdog and its own workers: no controller, relay,
    autoscaler, reader of logs or dashboard of Ray's, and no worker that nobody asked for. Each costs 0.5 to 3 CPU-s."""
    if workers > 1:
        return
    lasting = [line for line, times in run.processes.values() if times >= LASTING]
    found = Counter(next((kind for kind in KINDS if kind in line), line) for line in lasting)
    assert not found.keys() - {*KINDS, *TASKS}, found
    assert [found[kind] for kind in KINDS] == [1] * len(KINDS), found
    assert sum(found.values()) <= len(KINDS) + 2 * (os.cpu_count() or 1)


def test_the_dashboard_shows_text(run: Watched, project: Project) -> None:
    """R23: a hostile file name stands in the table of what was left out, as text; nothing that was said steers a
    terminal."""
    database = next(project.folder.rglob("prefect.db"))
    with sqlite3.connect(database) as opened:
        ((data,),) = opened.execute("select data from artifact where key = 'quarantine-tiny'").fetchall()
    (row,) = json.loads(json.loads(data) if data.startswith('"') else data)
    assert HOSTILE_NAME.split("(")[1].split(")")[0] in row["path"]
    for cell in row.values():
        assert rendered(cell).tags == ["p"]
    assert not unseen(run.said)


@pytest.mark.parametrize("verb", ["plan", "verify"])
def test_errors_of_the_store_hold_no_password(project: Project, verb: str) -> None:
    """R14: with a password in the endpoint's URL, an error names the variable, not the password."""
    project.environment["AWS_ENDPOINT_URL"] = f"http://me:{ENDPOINT}@127.0.0.1:9"
    try:
        ran = project.run(verb, "output.cache=s3://bucket/cache", "run=other")
    finally:
        del project.environment["AWS_ENDPOINT_URL"]
    assert ran.returncode == 4, ran.stderr
    assert "AWS_ENDPOINT_URL has a name or password in it" in ran.stdout + ran.stderr
    for secret in (ENDPOINT, *PLANTED.values()):
        assert secret not in ran.stdout + ran.stderr
    assert os.environ.get("AWS_ENDPOINT_URL") is None
