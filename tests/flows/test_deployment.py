"""The README's steps for the dashboard: a real server, a real process worker, a copy of the repository."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.reaper import MARKER
from flux2_core.config.reading import dump_toml
from flux2_core.config.sections import Config
from tests.flows.command import Project, carrying
from tests.flows.real_prefect import BIN, ROOT, ask, end_tree, prefect

pytestmark = [pytest.mark.ray, pytest.mark.prefect, pytest.mark.slow]
NAME = "cache-and-train/cache-and-train"
CANCELLED_S = 35  # Prefect's own latency included: the worker looks for cancellations every 10 s
STEPS = 2000  # long enough to be cancelled twice while it trains


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git tracks, somewhere else: nothing may rest on this checkout's path."""
    folder = tmp_path_factory.mktemp("clone")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.split("\0")[:-1]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def deployed(prefect_server: dict[str, str], clone: Path) -> Iterator[dict[str, str]]:
    """The README's steps after the server and the work pool: deploy everything, start a worker."""
    environment = prefect_server | {"PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"}
    prefect(environment, "--no-prompt", "deploy", "--all", cwd=clone, check=True)
    with (clone.parent / "worker.log").open("wb") as log:
        command = [BIN / "prefect", "worker", "start", "-p", "local"]
        worker = subprocess.Popen(command, env=environment, cwd=clone, stdout=log, stderr=log)
    yield environment
    end_tree(worker)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, photos: Path) -> Project:
    return Project(tmp_path_factory.mktemp("project"), model=tiny_model, photos=photos, run="board")


def configured(project: Project, *overrides: str) -> tuple[Config, str]:
    """A configuration and the `--param` that hands its file to the deployment."""
    config = project.config(*overrides)
    file = project.folder / f"{config.run}.toml"
    file.write_text(dump_toml(config))
    return config, f"config={file}"


def wait_for(finds: Callable[[], Any], *, seconds: float) -> tuple[Any, float]:
    """Wait until something is found; return it and the seconds that it took."""
    began = time.monotonic()
    while not (found := finds()):
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
        time.sleep(0.1)
    return found, time.monotonic() - began


def flow_runs(environment: dict[str, str], name: str) -> list[dict[str, Any]]:
    """Flow runs of that name, the newest first."""
    body = {"flow_runs": {"name": {"any_": [name]}}, "sort": "EXPECTED_START_TIME_DESC"}
    return ask(environment, "/flow_runs/filter", body)


def artifacts(environment: dict[str, str], run_id: str) -> dict[str, dict[str, Any]]:
    """The artifacts of one flow run, the latest of each key."""
    body = {"artifacts": {"flow_run_id": {"any_": [run_id]}}, "sort": "ID_DESC"}
    return {found["key"]: found for found in ask(environment, "/artifacts/filter", body)}


def test_both_wordings_run_to_the_end(
    deployed: dict[str, str], project: Project, clone: Path, ray_runtime: str
) -> None:
    """`prefect deployment run` with and without the slash drives a worker to Completed, and the dashboard has the
    run's own name, a bar for each kind of work, both tables, the summary and the preview picture; a second flow run
    of one configuration encodes nothing."""
    config, param = configured(project, "run=board-a", f"cluster.address={ray_runtime}")
    for place, wording in enumerate((NAME, "cache-and-train")):
        line = ("deployment", "run", wording, "--watch", "--param", param)
        ran = prefect(deployed, *line, cwd=clone, timeout_s=240)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        found, *before = flow_runs(deployed, "board-a")
        assert (found["state_type"], len(before)) == ("COMPLETED", place)
        shown = artifacts(deployed, found["id"])
        for kind in ("text", "latents", "train"):
            bar = shown[f"{kind}-board-a"]
            assert (bar["type"], bar["data"]) == ("progress", 100.0)
        rows = json.loads(shown["cache-board-a"]["data"])
        encoded = [(row["table"], row["encoded now"], row["reused"]) for row in rows]
        assert encoded == ([("text", 8, 0), ("latents", 6, 0)], [("text", 0, 8), ("latents", 0, 6)])[place]
        assert shown["previews-board-a"]["type"] == "image"
        assert shown["previews-board-a"]["data"].startswith("data:image/png;base64,")
        assert "](data:image/png;base64," in shown["summary-board-a"]["data"]
        lora = Path(config.output.root) / "board-a" / "lora" / "board-a.safetensors"
        assert lora.is_file()
        assert str(lora) in shown["summary-board-a"]["data"]


def test_every_deployment_is_there(deployed: dict[str, str]) -> None:
    """`prefect deploy --all` made four deployments of one pool; those of clusters wait in queues of their own, so that
    the head nodes of two clusters can share the work, and join the Ray that runs there."""
    queues = {queue["id"]: queue["name"] for queue in ask(deployed, "/work_queues/filter", {})}
    found = {one["name"]: one for one in ask(deployed, "/deployments/filter", {})}
    assert {name: queues[one["work_queue_id"]] for name, one in found.items()} == {
        "cache-and-train": "default",
        "cache-and-train-cluster": "cluster",
        "cache": "cache",
        "train": "train",
    }
    for name, one in found.items():
        overrides = one["parameters"].get("overrides")
        assert overrides == (None if name == "cache-and-train" else ["cluster.address=auto"])
        assert one["job_variables"]["env"] == {"PREFECT_PLUGINS_ENABLED": "false"}
        assert one["parameter_openapi_schema"]["properties"]["config"]["anyOf"], "the dashboard's form"


@pytest.mark.all_cases
def test_two_halves(deployed: dict[str, str], project: Project, clone: Path, ray_runtime: str) -> None:
    """`cache` leaves the tables, and `train` makes the LoRA from them: two flow runs, which may be of two clusters.
    Both are told of theirs by an override on top of a configuration as the dashboard's form sends it."""
    config, _ = configured(project, "run=halves", "data.0.trigger=halved")
    form = json.dumps(config.model_dump(mode="json", by_alias=True, exclude_none=True))
    given = ("--param", f"config={form}", "--param", f'overrides=["cluster.address={ray_runtime}"]')
    shown = {}
    for name in ("cache", "train"):
        prefect(deployed, "deployment", "run", f"{name}/{name}", "--watch", *given, cwd=clone, timeout_s=240)
        found = flow_runs(deployed, "halves")[0]
        assert found["state_type"] == "COMPLETED", found["state"]["message"]
        shown[name] = artifacts(deployed, found["id"])
    rows = json.loads(shown["cache"]["cache-halves"]["data"])
    assert {row["table"]: row["encoded now"] + row["reused"] for row in rows} == {"text": 8, "latents": 6}
    assert rows[0]["encoded now"] >= 6, "its captions have a trigger of their own"
    lora = Path(config.output.root) / "halves" / "lora" / "halves.safetensors"
    assert lora.is_file()
    assert str(lora) in shown["train"]["summary-halves"]["data"]
    assert "summary-halves" not in shown["cache"]


@pytest.mark.all_cases
def test_cancelling_ends_ray_and_retrying_resumes(deployed: dict[str, str], project: Project, clone: Path) -> None:
    """Cancelled while it trains, a flow run leaves no process within 35 s; retried, it goes on from
    its checkpoint."""
    config, param = configured(project, "run=long", f"train.steps={STEPS}", "validate.every=0", "output.save_every=5")
    folder = Path(config.output.root) / "long"
    prefect(deployed, "deployment", "run", NAME, "--param", param, cwd=clone, check=True)
    wait_for(lambda: len(records(folder)) >= 12, seconds=200)
    home = deployed["PREFECT_HOME"]
    ours = [process for process in carrying(MARKER) if environment_of(process).get("PREFECT_HOME") == home]
    (token,) = {environment_of(process)[MARKER] for process in ours}
    assert any("raylet" in " ".join(process.cmdline()) for process in ours), "Ray is not seen: this would show nothing"
    run_id = flow_runs(deployed, "long")[0]["id"]
    prefect(deployed, "flow-run", "cancel", run_id, check=True)
    _, seconds = wait_for(lambda: not carrying(MARKER, token), seconds=CANCELLED_S)
    wait_for(lambda: flow_runs(deployed, "long")[0]["state_type"] == "CANCELLED", seconds=90)
    before = records(folder)
    assert len(before) < STEPS, "it was done before it was cancelled: raise STEPS"
    prefect(deployed, "flow-run", "retry", run_id, cwd=clone, check=True)
    more = len(before) + 10
    wait_for(lambda: newest(records(folder)) >= more and flow_runs(deployed, "long")[0], seconds=200)
    assert flow_runs(deployed, "long")[0]["state_type"] == "RUNNING", f"cancelled in {seconds:.1f} s"
    after = records(folder)
    assert [record["step"] for record in after] == list(range(1, len(after) + 1))
    assert after[: len(before) - 5] == before[:-5]  # timings and all: these steps were not done again
    prefect(deployed, "flow-run", "cancel", run_id, check=True)
    wait_for(lambda: flow_runs(deployed, "long")[0]["state_type"] == "CANCELLED", seconds=90)


def newest(steps: list[dict[str, Any]]) -> int:
    return steps[-1]["step"] if steps else 0


def records(folder: Path) -> list[dict[str, Any]]:
    metrics = folder / "metrics.jsonl"
    return (
        [json.loads(line) for line in metrics.read_text().rpartition("\n")[0].splitlines()] if metrics.is_file() else []
    )


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}
