"""The terminal: whatever a command writes on standard error passes one function, so that nobody's text can steer it.

Bars are tqdm's own; the results on standard output are escaped before they are put into words (`flows.cli`).
"""

from __future__ import annotations

import logging
import sys
import traceback

from flux2_core.escape import visible


def complain(verb: str, reason: object) -> None:
    """Say why a verb ended."""
    _write(f"cacheloom {verb}: {reason}\n")


def settle() -> None:
    """Have warnings, logs that nobody set up and tracebacks written harmlessly too."""
    logging.captureWarnings(True)
    assert logging.lastResort  # what writes where nobody set logging up
    logging.lastResort.addFilter(_harmless)
    sys.excepthook = lambda *error: _write("".join(traceback.format_exception(*error)))


def _harmless(record: logging.LogRecord) -> bool:
    record.msg, record.args = visible(record.getMessage(), lines=True), ()
    return True


def _write(text: str) -> None:
    sys.stderr.write(visible(text, lines=True))
