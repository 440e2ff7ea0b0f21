"""Work beside the main thread: side by side, and none of it lost where the other fails."""

import threading
from contextvars import ContextVar

import pytest

from flux2_core.errors import DataError
from stages import background


def test_both_run_at_once() -> None:
    """Two pieces of work meet while they run, so neither waits for the other; both results come back in order."""
    meeting = threading.Barrier(2, timeout=30)
    assert sorted(background.both(meeting.wait, meeting.wait)) == [0, 1]


def test_work_sees_the_callers_context() -> None:
    """What the caller's context holds (the bars of a command, a flow run of Prefect) is there in the background too."""
    looked = ContextVar("looked", default=0)
    looked.set(7)
    assert background.both(looked.get, lambda: background.start(looked.get, name="inner").result()) == (7, 7)


@pytest.mark.parametrize("failing", [0, 1])
def test_the_other_one_is_finished_first(failing: int) -> None:
    """Where one fails, its error is raised, and only after the other one is done."""
    failed, done = threading.Event(), threading.Event()

    def fail() -> None:
        failed.set()
        raise DataError("a.png: broken")

    def go_on() -> None:
        assert failed.wait(30)
        done.set()

    with pytest.raises(DataError, match=r"a\.png: broken"):
        background.both(*((fail, go_on) if failing == 0 else (go_on, fail)))
    assert done.is_set()
