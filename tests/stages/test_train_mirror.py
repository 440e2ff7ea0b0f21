"""A mirrored run on a real Ray Train: its workers copy each checkpoint, and a machine without the folder goes on."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flux2_core.config.sections import Config
from flux2_core.errors import SetupError
from flux2_core.run import metrics
from flux2_core.run.folder import RunFolder
from stages import train
from tests.stages.faults import faulty
from tests.stages.test_train_faults import ends_like, undisturbed

pytestmark = [pytest.mark.ray, pytest.mark.all_cases]  # in one process: tests/flux2_core/run/test_mirror.py
Make = Callable[..., Config]


def test_a_lost_machine_is_replaced(
    ray_runtime: str, make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only worker fails before step 6, and the run's folder is gone with it: started again, the run goes on at the
    mirrored step 4 and ends where an undisturbed one does; what failed to be copied meanwhile was told."""
    calm = undisturbed(make_config, tmp_path)
    output = {"save_every": 2, "mirror": str(tmp_path / "mirror")}
    config = make_config(run="faulty", train={"steps": 8}, output=output, cluster={"retries": 0})
    folder, worker = RunFolder(config), train._worker
    monkeypatch.setattr(train, "_worker", faulty("raise", at=5, folder=tmp_path))
    with pytest.raises(SetupError, match="training ended") as ended:
        train.train(config)
    assert str(ended.value).splitlines()[-1].startswith("OSError: a fault of the test; run the same command again")
    shutil.rmtree(folder.path)
    monkeypatch.setattr(train, "_worker", worker)
    assert train.train(config)["resumed_from"] == 4
    ends_like(config, calm)
    for file in (*folder.lora_files, folder.metrics):
        assert (tmp_path / "mirror" / "faulty" / file.relative_to(folder.path)).read_bytes() == file.read_bytes()


def test_workers_tell_what_was_not_copied(
    ray_runtime: str, make_config: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A copy that fails in a worker is a warning of the driver, and a note in the metrics; at the end it is an error,
    which the same command repairs."""
    calm = undisturbed(make_config, tmp_path)
    config = make_config(run="told", train={"steps": 8}, output={"save_every": 2, "mirror": str(tmp_path / "mirror")})
    blocked = tmp_path / "mirror" / "told" / "metrics.jsonl"
    blocked.mkdir(parents=True)  # a file cannot be put there
    with caplog.at_level(logging.WARNING), pytest.raises(SetupError, match=r"output\.mirror=.*metrics\.jsonl"):
        train.train(config)
    assert "metrics.jsonl" in caplog.text
    assert [record["step"] for record in metrics.read(RunFolder(config).metrics) if "warning" in record]
    ends_like(config, calm)
    blocked.rmdir()
    assert train.train(config)["resumed_from"] == 8
    assert blocked.read_bytes() == RunFolder(config).metrics.read_bytes()
