"""How long a training is: in steps, epochs or samples, each said once and then the same for everybody."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flux2_core.config.reading import load
from flux2_core.config.sections import Config
from flux2_core.errors import UsageError
from flux2_core.model.folder import resolve
from flux2_core.plan import describe, survey
from flux2_core.run import checkpoint, metrics, previews, recorded
from flux2_core.run.folder import RunFolder
from flux2_core.train.batches import TrainingData
from flux2_core.train.length import passed
from flux2_core.train.loop import run
from flux2_core.train.order import Curriculum, Order
from flux2_core.train.trainer import Trainer
from stages import train as stage
from tests.in_process import PARTS, fill_cache, process_group

Make = Callable[..., Config]
EPOCHS = {"steps": 0, "epochs": 3}  # 6 pictures of two buckets (4 and 2), in batches of 2: 3 steps an epoch


def planned(config: Config) -> dict[str, Any]:
    model = resolve(config.model, parts=PARTS)
    return describe.describe(config, model, survey.survey(config, model))


def told(config: Config) -> list[tuple[Any, ...]]:
    fields = ("step", "loss", "learning_rate", "grad_norm", "epoch")
    return [tuple(record[field] for field in fields) for record in metrics.read(RunFolder(config).metrics)]


def test_epochs_are_the_steps_that_see_each_picture_so_often(make_config: Make, photos: Path) -> None:
    """`plan` says the steps; in them each picture is seen so often as it was asked for, and no other number of epochs
    is begun."""
    for repeats in (1, 3):
        data = [{"path": str(photos), "trigger": "sks", "resolutions": [64], "repeats": repeats}]
        config = make_config(data=data, train=EPOCHS)
        fill_cache(config)
        steps = planned(config)["steps"]
        opened = TrainingData(config, resolve(config.model, parts=PARTS))
        assert opened.config.train.steps == steps == 3 * repeats * 3
        assert opened.config.train.epochs == 3
        seen = [name for step in range(steps) for name in opened.batch(step).ids]
        assert {seen.count(name) for name in seen} == {3 * repeats}
        assert {opened.order.epoch(step) for step in range(steps)} == {0, 1, 2}


def test_so_many_epochs_are_the_run_of_so_many_steps(make_config: Make, tmp_path: Path) -> None:
    """Ten epochs and the steps that they come to give the same numbers, bit for bit: losses, learning rates of a
    schedule, epochs; interrupted and gone on with too. The run records both, and another number of epochs is told."""
    own = {"schedule": "cosine", "warmup_steps": 4}
    by_steps = make_config(train=own | {"steps": 9}, run="steps")
    by_epochs, cut = (make_config(train=own | EPOCHS, run=name) for name in ("epochs", "cut"))
    fill_cache(by_steps)
    with process_group(tmp_path):
        for config in (by_steps, by_epochs):
            run(Trainer(config), lambda record: None)
        part = make_config(train=own | EPOCHS, run="cut", output={"save_every": 4})
        stopped = Trainer(part)
        run(stopped, lambda record: None, noticed=lambda: stopped.step == 5)
        run(Trainer(cut), lambda record: None)
    assert told(by_epochs) == told(cut) == told(by_steps)
    assert len(told(by_epochs)) == 9


def test_a_run_keeps_the_steps_that_it_began_with(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record holds epochs and steps, so that a finished run is known for finished whatever the cache is by then;
    fewer epochs are refused, and with more it goes on."""
    config = make_config(train=EPOCHS | {"compile": False})
    fill_cache(config)
    monkeypatch.setattr(stage, "_fit_and_leave", lambda settled, *_: run(Trainer(settled), lambda record: None))
    first = stage.train(config)
    assert first["steps"] == 9
    kept = load(RunFolder(config).path / "config.toml")
    assert (kept.train.epochs, kept.train.steps) == (3, 9)
    again = stage.train(make_config(train=EPOCHS | {"compile": False}, output={"cache": "/nowhere"}))
    assert (again["resumed_from"], again["steps"]) == (9, 9)
    assert recorded.settled(config).train.steps == 9
    with pytest.raises(UsageError, match=r"train\.epochs was 3, is 2"):
        stage.train(make_config(train={"epochs": 2, "steps": 0, "compile": False}))
    assert planned(kept)["steps"] == 9, "its own config.toml is a configuration like any other"
    more = stage.train(make_config(train={"epochs": 4, "steps": 0, "compile": False}))
    assert (more["resumed_from"], more["steps"]) == (9, 12)


@pytest.mark.parametrize(("train", "said"), [
    ({"epochs": 3, "steps": 10}, "are 9 steps, and train.steps=10: leave one of them out"),
    ({"epochs": 1, "steps": 0, "batch_size": 8}, "are 0 steps, and 1 to 999999 are allowed"),
    ({"epochs": 900_000, "steps": 0}, "are 2700000 steps"),
    ({"epochs": 3, "steps": 0, "warmup_steps": 20}, "warmup_steps=20 and train.steps=9"),
])  # fmt: skip
def test_a_length_that_cannot_be_is_refused(make_config: Make, train: dict[str, Any], said: str) -> None:
    """By `plan` and by what trains, as soon as the samples are known."""
    config = make_config(train=train)
    with pytest.raises(UsageError, match=said):
        planned(config)
    fill_cache(config)
    with pytest.raises(UsageError, match=said):
        TrainingData(config, resolve(config.model, parts=PARTS))


def test_a_curriculum_is_measured_in_its_own_epochs(make_config: Make, photos: Path) -> None:
    """Epochs are those that the steps record; a curriculum that leaves one of its steps without data is refused."""
    data = [{"path": str(photos), "resolutions": [64], "trigger": "sks", "steps": [1, 4]}]
    data += [{"path": str(photos), "resolutions": [32], "trigger": "sks", "steps": [5, 40]}]
    config = make_config(data=data, train={"steps": 0, "epochs": 5})
    fill_cache(config)
    opened = TrainingData(config, resolve(config.model, parts=PARTS))
    steps = opened.config.train.steps
    assert [opened.order.epoch(step) for step in (3, 4, steps - 1, steps)] == [1, 2, 4, 5]
    with pytest.raises(UsageError, match="step 41 has no data set"):
        planned(make_config(data=data, train={"steps": 0, "epochs": 50}))


def test_steps_of_epochs_against_the_definition() -> None:
    """Of any orders one after the other: the first step of which `epoch` says so many."""
    rng = np.random.default_rng(7)
    for _ in range(60):
        starts = [0, *np.cumsum(rng.integers(1, 9, rng.integers(0, 3))).tolist()]
        sizes = rng.integers(1, 9, (len(starts), 2))
        made = [Order({(0,): list(range(a)), (1,): list(range(a, a + b))}, batch_size=2, seed=1) for a, b in sizes]
        order = Curriculum(dict(zip(starts, made, strict=True)))
        for epochs in range(1, 9):
            first = next(step for step in range(1000) if order.epoch(step) >= epochs)
            assert order.steps(epochs) == first


def test_intervals_end_where_they_say(make_config: Make, tmp_path: Path) -> None:
    """Checkpoints at the end of each epoch, previews each time that five more samples were seen."""
    config = make_config(
        train=EPOCHS,
        output={"save_every": "epoch", "keep": 9},
        validate={"every": "5 samples", "prompts": ["a [trigger]"], "steps": 1},
    )
    fill_cache(config)
    with process_group(tmp_path):
        run(Trainer(config), lambda record: None)
    folder = RunFolder(config)
    assert sorted(path.name for path in folder.checkpoints.glob("step-*")) == [
        checkpoint.NAME.format(step) for step in (3, 6, 9)
    ]
    looked = sorted(path.name for path in folder.previews.glob("step-*.png"))
    assert looked == [previews.grid_path(folder.previews, step).name for step in (0, 3, 5, 8, 9)]


def test_an_interval_of_samples_is_the_first_step_that_has_seen_them() -> None:
    """Whatever the batch, even one that is larger than the interval."""
    order = Curriculum({0: Order({(0,): [0, 1, 2]}, batch_size=1, seed=1)})
    for size, samples in ((1, 1), (2, 5), (3, 100), (8, 3)):
        ends = {math.ceil(number * samples / size) for number in range(200)}
        over = [passed(f"{samples} samples", step, batch_size=size, order=order) for step in range(60)]
        found = {step for step in range(1, 60) if over[step] > over[step - 1]}
        assert found == {step for step in ends if 0 < step < 60}


@pytest.mark.parametrize(("key", "value"), [
    ("output.save_every", "often"), ("output.save_every", "0 samples"), ("output.save_every", 0),
    ("validate.every", "2 epochs"), ("validate.every", -1),
])  # fmt: skip
def test_what_is_no_interval_is_refused(tmp_path: Path, key: str, value: object) -> None:
    """With all three forms that there are."""
    file = tmp_path / "c.toml"
    file.write_text('[model]\npath = "m"\n[[data]]\npath = "d"\n')
    with pytest.raises(UsageError, match=rf'{key}: an interval is a number of steps .* "epoch", or such as'):
        load(file, [f"{key}={value}"])
    assert load(file, [f"{key}=500 samples"])
