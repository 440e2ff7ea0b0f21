"""Metric files of a run that was killed and resumed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flux2_core.errors import DataError, UsageError
from flux2_core.run import metrics, trackers


def steps(path):
    return [record["step"] for record in metrics.read(path)]


def test_a_step_is_on_disk_before_the_next_one(tmp_path):
    """Each record can be read by another process while the writer is open."""
    with metrics.Writer(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.log(step, {"loss": 0.5 / step, "learning_rate": 1e-4})
            assert steps(tmp_path / "metrics.jsonl") == list(range(1, step + 1))
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1]) == {
        "step": 2,
        "loss": 0.25,
        "learning_rate": 1e-4,
    }


def test_a_resumed_run_has_each_step_once(tmp_path):
    """Steps beyond the checkpoint are dropped on opening, those before it stay."""
    with metrics.Writer(tmp_path) as writer:
        writer.validation(0, {"loss": 1.0})
        for step in range(1, 8):
            writer.log(step, {"loss": 1.0})
        writer.validation(5, {"loss": 0.9})
    with metrics.Writer(tmp_path, resume_step=4) as writer:
        writer.validation(0, {"loss": 9.9})  # seen before: kept as it was
        for step in range(5, 11):
            writer.log(step, {"loss": 2.0})
        writer.validation(5, {"loss": 0.8})
    assert steps(tmp_path / "metrics.jsonl") == list(range(1, 11))
    assert [record["loss"] for record in metrics.read(tmp_path / "metrics.jsonl")] == [1.0] * 4 + [2.0] * 6
    validation = [(record["step"], record["loss"]) for record in metrics.read(tmp_path / "validation.jsonl")]
    assert validation == [(0, 1.0), (5, 0.8)]


def test_starting_over_starts_empty(tmp_path):
    """A run killed before its first checkpoint begins at step 1 again."""
    with metrics.Writer(tmp_path) as writer:
        writer.log(1, {"loss": 1.0})
    with metrics.Writer(tmp_path) as writer:
        writer.log(1, {"loss": 2.0})
    assert [record["loss"] for record in metrics.read(tmp_path / "metrics.jsonl")] == [2.0]


@pytest.mark.parametrize("cut", range(1, 16))
def test_a_line_cut_by_a_kill_is_dropped(tmp_path, cut):
    """Wherever the last line ends, what came before is read, and writing goes on after it."""
    whole = b'{"step": 1, "loss": 0.5}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole + b'{"step": 2, "loss": 0.5}\n'[:cut])
    with metrics.Writer(tmp_path, resume_step=1) as writer:
        writer.log(2, {"loss": 0.25})
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]


def test_a_damaged_line_is_named(tmp_path):
    """Damage that no kill can cause is reported with file and line."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a JSON object"):
        metrics.Writer(tmp_path)


def test_values_that_are_not_finite_stay_json(tmp_path):
    """NaN and infinity become null, because other readers refuse NaN in JSON."""
    with metrics.Writer(tmp_path) as writer:
        writer.log(1, {"loss": float("nan"), "grad_norm": float("inf"), "note": "x"})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None, "grad_norm": None, "note": "x"}


def test_tensorboard_shows_the_same(tmp_path):
    """Scalars and pictures are in the event files; after a resume TensorBoard has each step once."""
    with metrics.Writer(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.log(step, {"loss": 1.0})
        writer.validation(3, {"loss": 0.5})
        writer.image(3, "previews", np.zeros((8, 8, 3), np.uint8))
    with metrics.Writer(tmp_path, resume_step=1) as writer:
        writer.log(2, {"loss": 2.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0)]
    assert "validation/loss" in events.Tags()["scalars"]


class Notebook:
    """A tracker that keeps what it is told."""

    def __init__(self, folder, resume_step):
        self.told = [(folder.name, resume_step)]

    def scalars(self, group, step, values):
        self.told.append((group, step, values))

    def image(self, name, step, picture_HWC):
        self.told.append((name, step, picture_HWC.shape))

    def close(self):
        self.told.append("closed")


def test_a_tracker_is_one_entry_of_the_table(tmp_path, monkeypatch):
    """Whatever stands in the table is told each number and picture of a run, and nothing of texts; the files stay."""
    kept = []

    def start(folder, resume_step):
        kept.append(Notebook(folder, resume_step))
        return kept[0]

    monkeypatch.setitem(trackers.TRACKERS, "notebook", start)
    with metrics.Writer(tmp_path / "run", resume_step=4, trackers=["notebook"]) as writer:
        writer.log(5, {"loss": 1.0, "note": "x"})
        writer.validation(5, {"loss": 0.5})
        writer.image(5, "preview/1", np.zeros((8, 4, 3), np.uint8))
    assert kept[0].told == [
        ("run", 4),
        ("train", 5, {"loss": 1.0}),
        ("validation", 5, {"loss": 0.5}),
        ("preview/1", 5, (8, 4, 3)),
        "closed",
    ]
    assert steps(tmp_path / "run" / "metrics.jsonl") == [5]
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_an_unknown_tracker_is_refused(tmp_path):
    """A tracker that the table has not is named, with those that it has, before any file is made."""
    with pytest.raises(UsageError, match=r"tracker='wandbb'.* take one of tensorboard"):
        metrics.Writer(tmp_path / "run", trackers=["wandbb"])
    assert not (tmp_path / "run").exists()


def test_no_file_is_no_records(tmp_path):
    """A run that has not begun has no metrics, and that is no error."""
    assert metrics.read(tmp_path / "metrics.jsonl") == []


def test_smoothing_passes_over_what_is_not_finite():
    """The first value is itself, later ones weigh a twentieth, and a NaN changes nothing."""
    assert metrics.smooth(None, 2.0) == 2.0
    assert metrics.smooth(2.0, 4.0) == pytest.approx(2.1)
    assert metrics.smooth(2.0, float("nan")) == 2.0
    assert metrics.smooth(float("nan"), 3.0) == 3.0
