"""What dies around a run: it ends with one line within 20 s, or goes on; and the same command again ends as if nothing
had been."""

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from flux2_core.run import checkpoint
from tests.flows.command import Project
from tests.flows.test_run import alive, steps, wait_for
from tests.in_process import fill_cache

pytestmark = [pytest.mark.ray, pytest.mark.prefect, pytest.mark.slow]
STEPS = 800  # 15 s at least: more than a dead head is waited for
LINE = (f"train.steps={STEPS}", "validate.every=200", "output.save_every=20")
ENDS_S = 20.0
VICTIMS: dict[str, Callable[[str], bool]] = {  # by a process's command line
    "raylet": lambda line: "/raylet/raylet " in line,
    "GCS": lambda line: "/gcs/gcs_server " in line,
    "worker": lambda line: line.startswith(("ray::TextWorker", "ray::RayTrainWorker", "ray::SampleWorker")),
    "relay": lambda line: line.startswith("ray::Relay"),
    "Prefect": lambda line: "prefect.server.api.server:create_app" in line,
}
SAID = {"raylet": "Ray's raylet on this machine has ended", "GCS": "Ray's head at 127.0.0.1:"}
DRAWING = SAID | {"worker": "the worker that draws has ended"}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, photos: Path) -> Project:
    """A run to which nothing happened."""
    made = Project(tmp_path_factory.mktemp("calm"), model=tiny_model, photos=photos)
    made.json("run", *LINE)
    return made


@pytest.fixture
def project(tmp_path: Path, tiny_model: Path, photos: Path) -> Project:
    return Project(tmp_path, model=tiny_model, photos=photos)


def victim(driver: psutil.Process, which: str) -> psutil.Process | None:
    for process in driver.children(recursive=True):
        try:
            if VICTIMS[which](" ".join(process.cmdline()) + " "):
                return process
        except psutil.Error:
            continue
    return None


def kill(project: Project, which: str, verb: str, *, when: Callable[[], object], line: tuple[str, ...] = LINE) -> tuple:
    """Start a verb, kill one of its processes when something holds; its exit code, seconds from then, and its words."""
    command = project.start(verb, *line)
    try:
        wait_for(when, seconds=300, process=command)
        while (found := victim(psutil.Process(command.pid), which)) is None:
            assert command.poll() is None, "the command ended before"
        started = psutil.Process(command.pid).children(recursive=True)
        found.kill()
        began = time.monotonic()
        code = command.wait(300)
        seconds = time.monotonic() - began
        wait_for(lambda: not any(alive(process) for process in started), seconds=10)
    finally:
        command.kill()
    return code, seconds, (project.folder / f"{verb}.log").read_text()


def assert_told(code: int, seconds: float, said: str, told: str) -> None:
    assert (code, seconds < ENDS_S) == (4, True), (seconds, said)
    assert "Traceback" not in said
    assert "[state-dump]" not in said
    *_, last = said.splitlines()
    assert told in last
    assert last.endswith("run the same command again to go on: what was encoded and saved is kept")


def ends_alike(project: Project, calm: Project) -> None:
    """The run's files are those of the undisturbed one."""
    ends = [one.folder / "runs" / "tiny" for one in (project, calm)]
    assert steps(ends[0]) == list(range(1, STEPS + 1))
    for name in ("tiny.safetensors", "tiny-comfyui.safetensors"):
        assert (ends[0] / "lora" / name).read_bytes() == (ends[1] / "lora" / name).read_bytes()
    previews = [sorted(path.name for path in (end / "previews").glob("*.png")) for end in ends]
    assert previews[0] == previews[1]


@pytest.mark.parametrize("which", ["raylet", pytest.param("GCS", marks=pytest.mark.all_cases)])
def test_a_death_ends_a_training(project: Project, which: str) -> None:
    """Without what Ray stands on: exit 4 in time and one line that says how to go on, with the steps that are saved."""
    fill_cache(project.config())
    line = (f"train.steps={STEPS}", "validate.every=0", "validate.prompts=[]", "output.save_every=20")
    folder = project.folder / "runs" / "tiny"
    code, seconds, said = kill(project, which, "train", when=lambda: len(steps(folder)) >= 24, line=line)
    assert_told(code, seconds, said, SAID[which])
    found = checkpoint.newest(folder / "checkpoints")
    assert found is not None
    assert found.step >= 20


@pytest.mark.all_cases
@pytest.mark.parametrize(
    ("which", "stage"),
    [
        *((which, stage) for which in ("raylet", "GCS", "Prefect") for stage in ("text", "train", "end")),
        *(("worker", "text"), ("worker", "train")),  # which are there at no other time
    ],
)
def test_a_death_is_told_in_one_line(project: Project, calm: Project, which: str, stage: str) -> None:
    """Ray's head or raylet gone: exit 4 in time and one line; a worker or the dashboard gone, or all steps
    done: the run goes on to its end. Either way nothing is left running and nothing was lost."""
    folder = project.folder / "runs" / "tiny"
    moments = {
        "text": lambda: "text " in (project.folder / "run.log").read_text(),
        "train": lambda: len(steps(folder)) >= 24,
        "end": lambda: (folder / "checkpoints" / f"step-{STEPS:06}").exists() and steps(folder)[-1:] == [STEPS],
    }
    code, seconds, said = kill(project, which, "run", when=moments[stage])
    if stage == "end" or which not in SAID:
        assert code == 0, said
        assert "Traceback" not in said
    else:
        assert_told(code, seconds, said, SAID[which])
        again = project.json("run", *LINE)
        assert again["resumed_from"] >= (20 if stage == "train" else 0)
    ends_alike(project, calm)


@pytest.mark.all_cases
@pytest.mark.parametrize("which", ["worker", "relay"])
def test_a_death_in_a_group(project: Project, which: str) -> None:
    """Of two workers one, or the relay that they tell of their steps: the run goes on to its end."""
    folder = project.folder / "runs" / "tiny"
    line = (*LINE, "cluster.workers=2")
    code, _, said = kill(project, which, "run", when=lambda: len(steps(folder)) >= 24, line=line)
    assert code == 0, said
    assert "Traceback" not in said
    assert steps(folder) == list(range(1, STEPS + 1))


@pytest.mark.all_cases
@pytest.mark.parametrize("which", ["worker", "raylet"])
def test_a_death_while_pictures_are_drawn(calm: Project, which: str) -> None:
    """`sample` ends with exit 4 and one line that names what died; without a raylet it may still draw them all."""
    prompts = [word for number in range(200) for word in ("--prompt", f"a photo of [trigger] number {number}")]
    log = calm.folder / "sample.log"
    code, seconds, said = kill(
        calm, which, "sample", when=lambda: "drawing with" in log.read_text(), line=(*LINE, *prompts)
    )
    if (code, which) == (0, "raylet"):  # its worker lived long enough to draw them all
        assert len(list((calm.folder / "runs" / "tiny" / "samples").glob("[0-9]*.png"))) == 200
        assert "Traceback" not in said
    else:
        assert_told(code, seconds, said, DRAWING[which])
