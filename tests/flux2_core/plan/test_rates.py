"""Measured rates: what is remembered, what is predicted from it, and that nothing is invented."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flux2_core.config.sections import Config
from flux2_core.plan import rates
from flux2_core.plan.rates import Rate, Stopwatch
from flux2_core.run import recorded
from flux2_core.run.folder import RunFolder
from flux2_core.store import objects

PRINT = {"dtype": "bf16", "width": 8}


def rate(tokens: int, *, device: str = "cpu", at: str = "2026-01-01", seconds: float = 10.0) -> Rate:
    return Rate(device, tokens // 10, tokens, seconds, at)


def test_what_was_recorded_is_found(root: str) -> None:
    """A measurement comes back for its own fingerprint only, on both kinds of storage; it scales with the tokens."""
    assert rates.newest(root, PRINT) is None
    rates.record(root, PRINT, rate(1000))
    found = rates.newest(root, PRINT)
    assert found == rate(1000)
    assert found.predict(5000) == 50.0
    assert rates.newest(root, PRINT | {"dtype": "fp32"}) is None


def test_the_newest_device_counts_and_light_measurements_do_not(tmp_path: Path) -> None:
    """Of two devices the later one predicts; a measurement of a tenth or less, or of nothing, does not replace one."""
    root = str(tmp_path)
    rates.record(root, PRINT, rate(1000))
    rates.record(root, PRINT, rate(90, at="2026-02-02"))
    rates.record(root, PRINT, rate(0, device="H200", at="2026-02-03"))
    assert rates.newest(root, PRINT) == rate(1000)
    rates.record(root, PRINT, rate(100, at="2026-02-04"))
    assert rates.newest(root, PRINT) == rate(100, at="2026-02-04")
    rates.record(root, PRINT, rate(500, device="H200", at="2026-03-03"))
    assert rates.newest(root, PRINT) == rate(500, device="H200", at="2026-03-03")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": 1}', b'{"a": {"cpu": {"rows": 1}}}', b"\xff"])
def test_a_damaged_file_is_no_measurement(tmp_path: Path, content: bytes) -> None:
    """Whatever stands in the file, there is no prediction from it, and the next measurement replaces it."""
    objects.write(objects.join(str(tmp_path), rates.NAME), content)
    assert rates.newest(str(tmp_path), PRINT) is None
    rates.record(str(tmp_path), PRINT, rate(1000))
    assert rates.newest(str(tmp_path), PRINT) == rate(1000)


@pytest.mark.parametrize(
    ("laps", "rows", "seconds"),
    [
        ([(4, 60.0), (4, 2.0), (4, 2.0)], 8, 8.0),
        ([(4, 60.0)], 4, 120.0),
        ([(4, 60.0), (3, 2.0)], 7, 124.0),
        ([], 0, 0.0),
    ],
)
def test_loading_the_model_is_no_rate(laps: list[tuple[int, float]], rows: int, seconds: float) -> None:
    """The clock of two devices starts at the first item's end, unless more than half of all rows were in that item."""
    now = 0.0
    watch = Stopwatch(2, clock=lambda: now)
    for count, took in laps:
        now += took
        watch.lap(count)
    assert (watch.rows, watch.seconds) == (rows, seconds)


def test_sizes_are_tokens_of_text_and_of_latents() -> None:
    """A rate counts tokens: a text's own, or height times width of latents."""
    watch = Stopwatch(1, clock=iter([0.0, 5.0]).__next__)
    watch.lap(4)
    assert Rate.of(watch, [{"text": "a", "tokens": 10}, {"text": "b", "tokens": 20}], device="cpu", now="").tokens == 60
    assert Rate.of(watch, [{"height": 4, "width": 6}], device="cpu", now="").tokens == 96


def test_steps_are_predicted_from_a_like_run(make_config: Callable[..., Config]) -> None:
    """The median of the newest run with the same model, resolution and precision; another learning rate is alike."""
    config = make_config(run="new")
    assert rates.step_seconds(config) is None
    for run, sections, seconds in (
        ("fast", {"train": {"precision": "bf16"}}, 0.1),
        ("slow", {"train": {"learning_rate": 1e-5}}, 3.0),
        ("empty", {}, None),
    ):
        folder = RunFolder(make_config(run=run, **sections))
        recorded.write(folder)
        lines = [] if seconds is None else [{"step": n, "loss": 1.0, "seconds": seconds + n} for n in (1, 2, 9)]
        folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (RunFolder(make_config(run="slow")).path.parent / "broken").mkdir()
    (RunFolder(make_config(run="broken")).metrics).write_text("")
    assert rates.step_seconds(config) == (5.0, "slow", 3)
    assert rates.step_seconds(make_config(train={"precision": "bf16"})) == (2.1, "fast", 3)
    for other in (
        {"train": {"precision": "int8"}},
        {"train": {"preservation": "blank"}},
        {"train": {"compile": True}},
        {"train": {"recompute": "full"}},
        {"train": {"batch_size": 4}},
        {"cluster": {"strategy": "fsdp"}},
        {"lora": {"targets": "tiny"}},
        {"text": {"max_length": 128}},
    ):
        assert rates.step_seconds(make_config(**other)) is None, other
    uneven = make_config(train={"batch_size": 3}, cluster={"workers": 2})
    assert rates.step_seconds(uneven) == (5.0, "slow", 3), "the slower of the two workers has two pictures too"
