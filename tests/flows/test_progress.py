"""What a person sees on standard error while something runs."""

import io
import sys
import time

import pytest

from flows import progress


class Terminal(io.StringIO):
    """A stream that says that a person is looking."""

    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.bars():
        progress.say("starting Ray")
        progress.show("text", 8, 8)
        progress.show("latents", 0, 6)
        progress.show("train", 0, 30)
        for done in range(1, 7):
            progress.show("latents", done, 6)
        for step in range(1, 31):
            progress.show("train", step, 30, f"loss {step}")
    return stream.getvalue()


def test_a_file_gets_few_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal there is one line at the start of a kind of work and one at its end, no carriage return."""
    lines = shown(io.StringIO(), monkeypatch).splitlines()
    assert lines == [
        "starting Ray",
        "text     8 texts, nothing left to do",
        "latents  0/6 pictures",
        "train    0/30 steps",
        "latents  6/6 pictures",
        "train    30/30 steps, loss 30",
    ]


def test_a_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal two bars at once each stand on a line of their own and end at 100 %."""
    text = shown(Terminal(), monkeypatch)
    assert "starting Ray\n" in text
    for name, total in (("latents", "6/6 pictures"), ("train", "30/30 steps")):
        assert any(name in line and "100%" in line and total in line for line in text.replace("\r", "\n").split("\n"))
    assert "loss 30" in text


def test_what_is_done_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that is told of again after its end, as a table that is looked through once more, adds no line."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.bars():
        for done in (0, 8, 8, 8):
            progress.show("text", done, 8)
    assert stream.getvalue().splitlines() == ["text     0/8 texts", "text     8/8 texts"]


def test_a_step_says_how_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a training step: its loss, raw and smoothed, the pace, and the time that is left."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.bars():
        progress.step({"step": 3, "loss": 0.5, "smoothed": 0.25, "seconds": 1.5, "eta": 90.4, "of": 30})
    assert stream.getvalue() == "train    3/30 steps, loss 0.5000 (smoothed 0.2500), 1.50 s/step, 0:01:30 left\n"


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_the_bar_fits(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """One bar in any width: the time that is left stands in it once, and what is done between steps takes its note."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", str(columns))
    record = {"loss": 0.5, "smoothed": 0.25, "seconds": 1.5, "eta": 90.4, "of": 30}
    with progress.bars():
        progress.phase("reading FLUX.2-dev and preparing it for training")
        for step in (1, 2):
            progress.step({"step": step, **record})
            time.sleep(0.15)  # a bar is drawn ten times a second at most
        progress.phase("drawing previews at step 2: 1 of 4")
    told, *bars = stream.getvalue().replace("\r", "\n").strip().split("\n")
    assert told == "reading FLUX.2-dev and preparing it for training"
    assert all(len(bar) <= columns for bar in bars)
    last_step, phase = (next(bar for bar in reversed(bars) if words in bar) for words in ("s/step", "drawing"))
    assert last_step.count("left") == 1
    assert "0:01:30 left" in last_step
    assert ("smoothed" in last_step) == (columns >= 100)
    assert phase.rstrip().endswith("drawing previews at step 2: 1 of 4")


def test_nothing_is_shown_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    """Outside of `bars` (a Prefect worker, a library call) standard error stays empty."""
    progress.say("starting Ray")
    progress.show("text", 1, 2)
    assert capsys.readouterr().err == ""
