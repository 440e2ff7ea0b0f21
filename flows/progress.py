"""Progress where a person is looking: bars on standard error, when a command asked for them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tqdm import tqdm

WORDS = {"text": "texts", "latents": "pictures", "train": "steps", "sample": "pictures"}


class Bars:
    """One bar per kind of work."""

    def __init__(self) -> None:
        self.open: dict[str, tqdm[None]] = {}

    def show(self, name: str, done: int, total: int, note: str = "") -> None:
        """Move a bar to `done` of `total`."""
        bar = self.open.get(name)
        if bar is None:
            bar = tqdm(total=total, initial=done, desc=f"{name:8}", unit=f" {WORDS[name]}", file=sys.stderr, leave=True)
            self.open[name] = bar
        bar.set_postfix_str(note, refresh=False)
        bar.update(done - bar.n)

    def close(self) -> None:
        """Leave the bars as they stand."""
        for bar in self.open.values():
            bar.close()


_BARS: ContextVar[Bars | None] = ContextVar("cacheloom_bars", default=None)


@contextmanager
def bars() -> Iterator[None]:
    """Show progress bars for everything inside."""
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
