"""R11, faults of workers, nodes and the driver: a run ends where an undisturbed one does, and little is done twice."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flux2_core.config.reading import dump_toml
from flux2_core.config.sections import Config
from flux2_core.run import checkpoint, metrics
from flux2_core.run.folder import RunFolder
from flux2_core.train.loop import run
from flux2_core.train.trainer import Trainer
from stages import cluster, train
from tests.in_process import fill_cache, process_group
from tests.stages.faults import begun, faulty

pytestmark = pytest.mark.ray
Make = Callable[..., Config]
REPOSITORY = Path(__file__).parents[2]
STEPS = 8


def undisturbed(make_config: Make, folder: Path, *, steps: int = STEPS) -> Config:
    """The configuration of a run of one worker to which nothing happens, cached and trained in this process."""
    calm = make_config(run="calm", train={"steps": steps})
    fill_cache(calm)
    with process_group(folder):
        run(Trainer(calm), lambda record: None)
    return calm


def ends_like(config: Config, calm: Config, *, exact: bool = True) -> None:
    ends = [checkpoint.newest(RunFolder(c).checkpoints) for c in (config, calm)]
    assert ends[0] is not None
    assert ends[1] is not None
    losses = [[record["loss"] for record in metrics.read(RunFolder(c).metrics)] for c in (config, calm)]
    if exact:
        assert losses[0] == losses[1]
        assert all(torch.equal(ends[0].adapter[name], weight) for name, weight in ends[1].adapter.items())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("driven", ["alone", pytest.param("by Ray Train", marks=pytest.mark.all_cases)])
@pytest.mark.parametrize(
    ("act", "save_every", "lost"),
    [
        pytest.param("SIGTERM", 100, 0, id="preemption notice", marks=pytest.mark.all_cases),
        pytest.param("SIGKILL", 2, 1, id="worker SIGKILL", marks=pytest.mark.all_cases),
        pytest.param("raise", 2, 1, id="worker exception"),
        pytest.param("SIGSTOP", 2, 1, id="stuck", marks=pytest.mark.all_cases),
    ],
)
def test_a_worker_fails_once(
    ray_runtime: str,
    make_config: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    driven: str,
    act: str,
    save_every: int,
    lost: int,
) -> None:
    """A worker that is killed, raises or freezes before step 6 costs the steps since step 4; one that is told by
    SIGTERM that it must go saves first and costs none, though no checkpoint was due: alone as in a group."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "10")
    monkeypatch.setattr(cluster, "is_one_machine", lambda: driven == "alone")
    calm = undisturbed(make_config, tmp_path)
    retries = {"retries": int(act != "SIGTERM")}  # a notice is no failure
    config = make_config(run="faulty", train={"steps": STEPS}, output={"save_every": save_every}, cluster=retries)
    monkeypatch.setattr(train, "_worker", faulty(act, at=5, folder=tmp_path))
    train.train(config)
    ends_like(config, calm)
    again = len(begun(tmp_path)) - STEPS
    assert again == (lost + 1 if act != "SIGTERM" else 0), "the faulty step itself is begun twice"


@pytest.mark.all_cases
def test_a_driver_is_killed_and_started_again(make_config: Make, tmp_path: Path) -> None:
    """The driver dies by SIGKILL in the middle; the same command again goes on from the checkpoint to the same end."""
    calm = undisturbed(make_config, tmp_path, steps=150)
    config = make_config(run="again", train={"steps": 150}, output={"save_every": 5})
    file = tmp_path / "config.toml"
    file.write_text(dump_toml(config))
    command = [sys.executable, "-m", "flows.cli", "train", str(file), "--json"]
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log)
        while len(metrics.read(RunFolder(config).metrics)) < 12:
            assert first.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        told = len(metrics.read(RunFolder(config).metrics))
        assert told < 150
        subprocess.run(command, cwd=REPOSITORY, stdout=log, stderr=log, check=True)
    ends_like(config, calm)


@pytest.mark.all_cases
@pytest.mark.parametrize("case", ["node killed", "node drained", "elastic"])
def test_nodes_go_and_come(make_config: Make, tmp_path: Path, case: str) -> None:
    """The node of a worker dies at step 4: the run goes on on another node, or, where `cluster.min_workers` allows it,
    on one worker less, and on two again when a node comes back. At most one checkpoint interval is done twice each
    time; nothing where the node was drained before, and that does not count against `cluster.retries`."""
    steps = {"node killed": 12, "node drained": 20, "elastic": 40}[case]
    calm = undisturbed(make_config, tmp_path, steps=steps)
    cluster = {
        "node killed": {"workers": 1},
        "node drained": {"workers": 1, "retries": 0},
        "elastic": {"workers": 2, "min_workers": 1},
    }[case]
    config = make_config(run="nodes", train={"steps": steps}, output={"save_every": 3}, cluster=cluster)
    file = tmp_path / "config.toml"
    file.write_text(dump_toml(config))
    script = [sys.executable, "-m", "tests.stages.node_faults", case, str(file), str(tmp_path)]
    done = subprocess.run(script, cwd=REPOSITORY, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    ends_like(config, calm, exact=case != "elastic")
    seen = begun(tmp_path)
    worlds = [world for place, (_, world, _) in enumerate(seen) if not place or seen[place - 1][1] != world]
    assert len({process for _, _, process in seen}) >= 2, "nobody was replaced, so nothing was shown"
    assert worlds == ([2, 1, 2] if case == "elastic" else [1])
    again = {"node killed": 4, "node drained": 0, "elastic": 8}[case]  # an interval and a step, for each restart
    assert len(seen) - steps <= again, "more than a checkpoint interval was done again"
