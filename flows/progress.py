"""Progress where a person is looking: bars and short lines on standard error, when a command asked for them.

A terminal gets one bar per kind of work; a file or a pipe, where bars would be noise, gets a plain line now and then.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

from flux2_core.escape import visible

WORDS = {"index": "pictures", "text": "texts", "latents": "pictures", "train": "steps", "sample": "pictures"}
WORDS |= {"read text": "rows", "read latents": "rows"}
FORMAT = "{desc:8} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{unit}, {elapsed} gone, {remaining} left{postfix}"
NOTED = "{desc:8} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{postfix}"  # what is left is said in the note
WIDE = 100  # columns in which a longer note has room
LINE_EVERY_S = 10.0


class Bars:
    """What is shown now; several threads may tell of progress."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.open: dict[str, tqdm[None]] = {}
        self.told_s: dict[str, float] = {}
        self.done: set[str] = set()
        self.lock = threading.Lock()

    def show(self, name: str, done: int, total: int, note: str = "") -> None:
        """Move the bar of one kind of work to `done` of `total`."""
        with self.lock:
            if name in self.done:
                return
            first = name not in self.open and name not in self.told_s
            if done >= total and first:
                self._write(f"{name:8} {total} {WORDS[name]}, nothing left to do")
            elif self.terminal:
                self._move(name, done, total, note)
            elif first or done >= total or time.monotonic() - self.told_s[name] >= LINE_EVERY_S:
                self.told_s[name] = time.monotonic()
                self._write(f"{name:8} {done}/{total} {WORDS[name]}{note and ', '}{note}")
            if done >= total:
                self.done.add(name)

    def say(self, text: str) -> None:
        """Show a line above the bars."""
        with self.lock:
            self._write(text)

    def phase(self, text: str) -> None:
        """Show what is done between steps: in the bar where there is one, else as a line now and then."""
        with self.lock:
            if bar := self.open.get("train"):
                bar.set_postfix_str(visible(text))
            elif "train" not in self.told_s:
                self._write(text)
            elif time.monotonic() - self.told_s["train"] >= LINE_EVERY_S:
                self.told_s["train"] = time.monotonic()
                self._write(f"{'train':8} {text}")

    def close(self) -> None:
        """Leave the bars as they stand."""
        with self.lock:
            for bar in self.open.values():
                bar.close()
            self.open.clear()

    def _move(self, name: str, done: int, total: int, note: str) -> None:
        from tqdm import tqdm

        bar = self.open.get(name)
        if bar is None:
            bar = self.open[name] = tqdm(
                total=total,
                initial=done,
                desc=name,
                unit=f" {WORDS[name]}",
                file=sys.stderr,
                bar_format=NOTED if note else FORMAT,
                dynamic_ncols=True,
            )
        bar.set_postfix_str(note, refresh=False)
        bar.update(done - bar.n)
        if done >= total:
            self.open.pop(name).close()
            for other in self.open.values():
                other.refresh()  # the finished bar took the place of the first one

    def _write(self, text: str) -> None:
        from tqdm import tqdm  # not where nothing is shown: `--help` and `stat` answer at once

        tqdm.write(visible(text), file=sys.stderr)
        sys.stderr.flush()


_BARS: ContextVar[Bars | None] = ContextVar("cacheloom_bars", default=None)


@contextmanager
def bars() -> Iterator[None]:
    """Show progress for everything inside."""
    shown = Bars()
    token = _BARS.set(shown)
    try:
        yield
    finally:
        _BARS.reset(token)
        shown.close()


def show(name: str, done: int, total: int, note: str = "") -> None:
    """Tell of progress; nothing happens where no bars are shown."""
    if (shown := _BARS.get()) is not None:
        shown.show(name, done, total, note)


def step(record: dict[str, Any]) -> None:
    """Tell of a training step: loss raw and smoothed, pace, and the time that is left."""
    from datetime import timedelta

    pace = f"{record['seconds']:.2f} s/step, {timedelta(seconds=round(record['eta']))} left"
    both = f"loss {record['loss']:.4f} (smoothed {record['smoothed']:.4f})"
    wide = not sys.stderr.isatty() or shutil.get_terminal_size().columns >= WIDE
    show("train", record["step"], record["of"], f"{both if wide else 'loss {:.4f}'.format(record['smoothed'])}, {pace}")


def phase(text: str) -> None:
    """Tell what training does beside its steps; nothing happens where no bars are shown."""
    if (shown := _BARS.get()) is not None:
        shown.phase(text)


def say(text: str) -> None:
    """Tell what is being waited for; nothing happens where no bars are shown."""
    if (shown := _BARS.get()) is not None:
        shown.say(text)
