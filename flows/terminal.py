"""The terminal: whatever a command writes on standard error passes one function, so that nobody's text can steer it.

Bars are tqdm's own; the results on standard output are escaped before they are put into words (`flows.cli`).
"""

from __future__ import annotations

import io
import logging
import sys
import traceback

from flows.wording import BLOCK
from flux2_core.escape import visible


def complain(verb: str, reason: object) -> None:
    """Say why a verb ended."""
    _write(f"cacheloom {verb}: {reason}\n")


def tell(result: str) -> None:
    """Write a result to standard output, in the letters that it has."""
    try:
        BLOCK.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        result = result.replace(BLOCK, "#")
    sys.stdout.write(result.rstrip("\n") + "\n")


def settle() -> None:
    """Have warnings, logs that nobody set up and tracebacks written harmlessly too, in whatever letters there are."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # of `LANG=C`, or PYTHONIOENCODING; standard error escapes by itself
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.captureWarnings(True)
    assert logging.lastResort  # what writes where nobody set logging up
    logging.lastResort.addFilter(_harmless)
    sys.excepthook = lambda *error: _write("".join(traceback.format_exception(*error)))


def _harmless(record: logging.LogRecord) -> bool:
    record.msg, record.args = visible(record.getMessage(), lines=True), ()
    return True


def _write(text: str) -> None:
    sys.stderr.write(visible(text, lines=True))
