"""`cacheloom run`: the whole flow, and again; killed and resumed with a Prefect server and a Ray of its own."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from flows import cli
from flows.reaper import MARKER
from tests.flows.command import Project, carrying

pytestmark = [pytest.mark.ray, pytest.mark.prefect, pytest.mark.slow]
GONE_S = 10  # the promise of docs/design.md
STEPS = ("train.steps=40", "validate.every=40", "output.save_every=5")


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    photos: Path,
    ray_runtime: str,
    prefect_server: dict[str, str],
) -> Project:
    """A project whose runs are warm, with the tests' own Ray and Prefect server."""
    made = Project(tmp_path_factory.mktemp("project"), model=tiny_model, photos=photos, warm=True)
    made.join(ray_runtime)
    made.environment |= {name: prefect_server[name] for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING")}
    return made


@pytest.fixture(scope="module")
def calm(shared: Project) -> dict:
    """An undisturbed run."""
    return shared.json("run", *STEPS)


@pytest.fixture
def project(tmp_path: Path, tiny_model: Path, photos: Path) -> Project:
    """A project whose runs are the installed command's, with servers of their own."""
    return Project(tmp_path, model=tiny_model, photos=photos)


def wait_for(holds: Callable[[], object], *, seconds: float, process: subprocess.Popen | None = None) -> float:
    """Wait until something holds; return the seconds that it took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
        assert process is None or process.poll() is None, "the command ended before"
        time.sleep(0.05)
    return time.monotonic() - began


def steps(run: Path) -> list[int]:
    metrics = run / "metrics.jsonl"
    return (
        [json.loads(line)["step"] for line in metrics.read_text().rpartition("\n")[0].splitlines()]
        if metrics.is_file()
        else []
    )


def test_run_makes_everything_and_then_nothing(shared: Project, calm: dict) -> None:
    """`run --json` caches, trains and tells of every file; the same command again trains nothing and tells the same."""
    assert (calm["steps"], calm["resumed_from"], calm["samples"]["quarantined"]) == (40, 0, [])
    files = [*calm["lora"].values(), *calm["previews"], calm["metrics"]]
    assert [Path(path).name for path in calm["previews"]] == ["step-000000.png", "step-000040.png"]
    before = {path: Path(path).stat().st_mtime_ns for path in files}
    again = shared.run("run", *STEPS, "--json")
    assert again.returncode == 0, again.stderr
    told = json.loads(again.stdout)
    assert told == calm | {"resumed_from": 40}
    assert {path: Path(path).stat().st_mtime_ns for path in files} == before
    assert "train " not in again.stderr
    assert "run tiny is finished: nothing is left to train" in again.stderr
    assert quiet(again.stderr)


@pytest.mark.all_cases
def test_refused_data_ends_the_run_in_words(project: Project, tmp_path: Path) -> None:
    """Data that is refused inside the flow: exit 3, the reason alone on standard error, nothing on standard output."""
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    (tmp_path / "broken.txt").write_text("a caption")
    ran = project.run("run", *STEPS, "run=refused", f"data.0.path={tmp_path}", "--json")
    assert (ran.returncode, ran.stdout) == (3, "")
    assert "broken.png" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_killed_run_leaves_nothing_and_goes_on(project: Project, shared: Project, calm: dict) -> None:
    """SIGKILL while it trains: within 10 s every process of it is gone; the same command again resumes from a
    checkpoint, says nothing that alarms, and ends with the bytes of an undisturbed run."""
    line = (*STEPS, f"output.cache={shared.folder / 'cache'}")
    folder = project.folder / "runs" / "tiny"
    driver = project.start("run", *line)
    wait_for(lambda: len(steps(folder)) >= 12, seconds=240, process=driver)
    started = psutil.Process(driver.pid).children(recursive=True)
    (token,) = {p.environ()[MARKER] for p in started if p.status() != psutil.STATUS_ZOMBIE and MARKER in p.environ()}
    names = " ".join(" ".join(process.cmdline()) for process in carrying(MARKER, token))
    for part in ("raylet", "gcs_server", "prefect.server"):
        assert part in names, f"{part} is not among them: the test would show nothing"
    driver.kill()
    driver.wait()
    seconds = wait_for(
        lambda: not carrying(MARKER, token) and not any(alive(process) for process in started), seconds=GONE_S
    )
    assert seconds < GONE_S
    ran = project.run("run", *line, "--json")
    assert ran.returncode == 0, ran.stderr
    assert quiet(ran.stderr)
    again = json.loads(ran.stdout)
    assert 5 <= again["resumed_from"] < 40
    assert f"going on from step {again['resumed_from']}" in ran.stderr
    assert steps(folder) == list(range(1, 41))
    for name, path in calm["lora"].items():
        assert Path(again["lora"][name]).read_bytes() == Path(path).read_bytes(), name


@pytest.mark.all_cases
@pytest.mark.parametrize(("verb", "stage"), [("run", "text"), ("run", "train"), ("train", "train")])
def test_ctrl_c(project: Project, shared: Project, calm: dict, verb: str, stage: str) -> None:
    """Ctrl-C while it encodes or trains, as a terminal sends it: exit 130 within the promised time, with one line that
    says how to go on, no process left; the same command again ends with the bytes of an undisturbed run."""
    line = STEPS if stage == "text" else (*STEPS, f"output.cache={shared.folder / 'cache'}")
    driver = project.start(verb, *line)
    said = project.folder / f"{verb}.log"
    wait_for(lambda: f"{stage} " in said.read_text(), seconds=240, process=driver)
    started = psutil.Process(driver.pid).children(recursive=True)
    os.killpg(driver.pid, signal.SIGINT)
    assert driver.wait(cli.GRACE_S + 5) == 130
    assert said.read_text().endswith("cacheloom: interrupted; run the same command again to go on\n")
    assert "Traceback" not in said.read_text()
    wait_for(lambda: not any(alive(process) for process in started), seconds=GONE_S)
    seen = [int(step) for step in re.findall(r"^train +(\d+)/40 steps", said.read_text(), re.MULTILINE)]
    again = project.json(verb, *line)
    assert again["resumed_from"] >= max(seen, default=0)  # the step that it was interrupted in is kept
    assert steps(project.folder / "runs" / "tiny") == list(range(1, 41))
    for name, path in calm["lora"].items():
        assert Path(again["lora"][name]).read_bytes() == Path(path).read_bytes(), name


def quiet(said: str) -> bool:
    """Nothing on standard error that would alarm a person, or draw over a line of a file."""
    return not any(noise in said for noise in ("Traceback", "Warning", "WARNING", "\r"))


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
