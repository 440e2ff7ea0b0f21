"""The run's folder: its lock, and what may change between two starts."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flux2_core.config.reading import load
from flux2_core.config.sections import Config
from flux2_core.errors import SetupError, UsageError
from flux2_core.run import checkpoint, recorded
from flux2_core.run.checkpoint import Checkpoint
from flux2_core.run.folder import RunFolder

Make = Callable[..., Config]


def test_one_at_a_time(make_config: Make) -> None:
    """The second holder is refused while the first works, and admitted after it."""
    folder = RunFolder(make_config())
    with folder.lock():
        with pytest.raises(UsageError, match=r"another process is working on this run.*run=NAME"), folder.lock():
            pass
        with RunFolder(make_config(run="other")).lock():
            pass
    with folder.lock():
        pass


def test_a_folder_that_takes_no_lock(make_config: Make) -> None:
    """Where no lock can be written the folder is named, with what to do."""
    folder = RunFolder(make_config())
    (folder.path / ".lock").mkdir(parents=True)  # root may write everywhere, but not into this
    with pytest.raises(SetupError, match=r"runs/test: .*; give write permission, or set output\.root"), folder.lock():
        pass


def test_a_killed_holder_frees_the_lock(make_config: Make) -> None:
    """SIGKILL frees the lock; while the other process lives it holds."""
    folder = RunFolder(make_config())
    folder.path.mkdir(parents=True)
    script = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-S", "-c", script, folder.path / ".lock"], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UsageError), folder.lock():
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    time.sleep(0.01)
    with folder.lock():
        pass


def test_a_new_run_may_have_any_configuration(make_config: Make) -> None:
    """Nothing is recorded yet, nothing is compared."""
    recorded.check(RunFolder(make_config()))


@pytest.mark.parametrize(
    "free",
    [
        {"cluster": {"workers": 2, "micro_batch": 1}},
        {"output": {"save_every": 7, "keep": 1, "mirror": "elsewhere"}},
        {"max_quarantined": 0.5},
        {"train": {"compile": True, "recompute": "full"}},
        {"validate": {"prompts": ["a x"], "every": 3, "size": 32, "seed": 1, "samples": 2}},
        {"train": {"steps": 9}},
        {},
    ],
)
def test_what_may_change(make_config: Make, free: dict[str, Any]) -> None:
    """Speed, places, tolerance and what is only looked at may change between two starts of a run; steps may grow."""
    recorded.write(RunFolder(make_config()))
    recorded.check(RunFolder(make_config(**free)))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"train": {"learning_rate": 0.5}}, r"train\.learning_rate was 0\.001, is 0\.5"),
        ({"lora": {"alpha": 2}}, r"lora\.alpha was None, is 2\.0"),
        ({"validate": {"held_out": 0.5}}, r"validate\.held_out was 0\.05, is 0\.5"),
        ({"train": {"steps": 3}}, r"train\.steps was 4, is 3"),
        ({"data": [{"path": "p", "resolutions": [64], "trigger": "sks"}]}, r"data\.0\.path was '.*', is 'p'"),
        ({"lora": {"rank": 8}, "train": {"steps": 2}}, r"lora\.rank was 4, is 8; train\.steps was 4, is 2"),
    ],
)
def test_what_may_not(make_config: Make, other: dict[str, Any], named: str) -> None:
    """Another setting that changes the result is refused, every key named with both values."""
    recorded.write(RunFolder(make_config()))
    with pytest.raises(UsageError, match=named + r"\): give this one another name with run=NAME"):
        recorded.check(RunFolder(make_config(**other)))


def test_a_second_data_set_is_named(make_config: Make) -> None:
    """A data set more is a difference too."""
    config = make_config()
    recorded.write(RunFolder(config))
    data = [config.data[0].model_dump(), {"path": "more"}]
    with pytest.raises(UsageError, match=r"data\.1\.path was None, is 'more'"):
        recorded.check(RunFolder(make_config(data=data)))


def test_looking_closer_is_no_other_run(make_config: Make) -> None:
    """`check_images` changes what is looked at, not what is trained."""
    config = make_config()
    recorded.write(RunFolder(config))
    recorded.check(RunFolder(make_config(data=[config.data[0].model_dump() | {"check_images": True}])))


def test_a_key_that_is_newer_than_the_run(make_config: Make) -> None:
    """A run of an older version lacks a key: its default is what it had."""
    folder = RunFolder(make_config())
    recorded.write(folder)
    written = folder.path / "config.toml"
    lines = [line for line in written.read_text().splitlines() if not line.startswith("weight_decay")]
    written.write_text("\n".join(lines))
    recorded.check(folder)
    with pytest.raises(UsageError, match=r"train\.weight_decay was 0\.0001, is 0\.5"):
        recorded.check(RunFolder(make_config(train={"weight_decay": 0.5})))


def test_a_damaged_record_is_named(make_config: Make) -> None:
    """A record that is not TOML is an error that names the file."""
    folder = RunFolder(make_config())
    recorded.write(folder)
    (folder.path / "config.toml").write_bytes(b"run = \xff")
    with pytest.raises(UsageError, match=r"test/config\.toml: not a TOML file"):
        recorded.check(folder)


def test_the_record_is_the_configuration(make_config: Make) -> None:
    """`config.toml` of a run can be given to `cacheloom` again."""
    config = make_config(validate={"prompts": ["été \U000e0001 [trigger]"]})
    folder = RunFolder(config)
    recorded.write(folder)
    assert load(folder.path / "config.toml") == config


def test_finished(make_config: Make) -> None:
    """A run is finished with a whole last checkpoint and both LoRA files, and not before."""
    folder = RunFolder(make_config())
    assert not folder.finished()
    folder.lora.mkdir(parents=True)
    for file in folder.lora_files:
        file.touch()
    for step in (3, 4):
        assert not folder.finished()
        checkpoint.write(folder.checkpoints, Checkpoint(step, {"a": torch.zeros(1)}, {}, {}), keep=3)
    assert folder.finished()
    folder.lora_files[1].unlink()
    assert not folder.finished()


def test_a_root_that_cannot_be_made(make_config: Make, tmp_path: Path) -> None:
    """A root that is a file is an error of the environment, with the way out."""
    (tmp_path / "file").touch()
    folder = RunFolder(make_config(output={"root": str(tmp_path / "file")}))
    with pytest.raises(SetupError, match=r"cannot be made .*output\.root"), folder.lock():
        pass
