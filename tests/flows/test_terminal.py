"""The terminal: results in the letters that it has."""

import io
import logging
import sys

import pytest

from flows import terminal


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", b"## caf\\xe9\n"), ("utf-8", "██ café\n".encode())])
def test_results_are_told_in_letters_that_there_are(
    monkeypatch: pytest.MonkeyPatch, encoding: str, shown: bytes
) -> None:
    """Where standard output is ASCII, bars are of `#`, and other letters are written out."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written := io.BytesIO(), encoding=encoding))
    terminal.settle()
    logging.captureWarnings(False)
    terminal.tell("██ café\n\n")
    sys.stdout.flush()
    assert written.getvalue() == shown
