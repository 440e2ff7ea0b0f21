"""The command line: `cacheloom VERB CONFIG.toml [section.key=value ...] [--json]`.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 unexpected, 2 wrong usage or
configuration, 3 data or cache refused, 4 environment, 130 interrupted.

Ctrl-C ends it with one line and no traceback at any instant. So whatever takes time, `typing` too, is imported inside
the functions, after `command` has set its handler.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn

INTERRUPTED, INTERRUPTED_CODE = "cacheloom: interrupted; run the same command again to go on\n", 130
GRACE_S = 20.0  # for an interrupted command to end by itself


def command() -> NoReturn:
    """What the installed `cacheloom` runs: `main`, then an exit that no library's threads can spoil.

    Seen with pylance 14 and torch 2.13: an interpreter that winds down while their threads run aborts now and then
    ("terminate called without an active exception"), and a good exit code becomes -6. All that is ours is closed here.
    """
    try:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a script's background job is deaf to Ctrl-C
            signal.signal(signal.SIGINT, _interrupted)
        code = main()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    except KeyboardInterrupt:
        _leave()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verb that the arguments name and tell its result; returns the exit code."""
    from contextlib import nullcontext, redirect_stdout

    from flows import terminal
    from flows.verb import read
    from flows.verbs import VERBS
    from flux2_core.errors import CacheloomError
    from flux2_core.escape import every, visible

    options = read(arguments, VERBS)
    verb = VERBS[options.verb]
    _settle_environment()
    try:
        with redirect_stdout(sys.stderr) if options.json else nullcontext():
            result = verb.run(options)
    except CacheloomError as error:
        terminal.complain(options.verb, error)
        return error.exit_code
    import json  # not for `--help`
    import shlex

    # JSON is ASCII and needs no escapes: scripts want the names as they are
    told = (
        json.dumps(result, indent=1)
        if options.json
        else verb.told(every(result), visible(shlex.join([options.config, *options.overrides])))
    )
    terminal.tell(told)
    if reason := result.get("refused"):
        terminal.complain(options.verb, reason)
    return int(result.get("exit_code", 0))


def _settle_environment() -> None:
    """Telemetry off, libraries quiet, room for a slow machine; what the user set stays."""
    import logging
    import warnings

    for name, value in {
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the bars are on the screen, the logs in the dashboard
        "PREFECT_LOGGING_HANDLERS_CONSOLE_FLOW_RUNS_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_TASK_RUNS_LEVEL": "CRITICAL",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    from flows import terminal

    terminal.settle()


def _interrupted(_number: int, _frame: object) -> NoReturn:
    """On Ctrl-C end in good order; on the second one, or where a library's thread never ends, at once.

    Python may raise it in a finalizer or a callback, which swallow it, and a library may turn it into an error of its
    own: both end the command all the same. A thread of `threading` could not be started here, amid another's start.
    """
    signal.signal(signal.SIGINT, _leave)
    sys.excepthook = _leave
    sys.unraisablehook = _strayed
    if threading := sys.modules.get("threading"):
        threading.excepthook = _strayed  # type: ignore[attr-defined]
    _thread.start_new_thread(_lose_patience, ())
    raise KeyboardInterrupt


def _strayed(stray: Any) -> None:
    if issubclass(stray.exc_type, KeyboardInterrupt):
        _leave()


def _lose_patience() -> None:
    time.sleep(GRACE_S)
    _leave()


def _leave(*_: object) -> NoReturn:
    """End at once; the watchdog of `flows.reaper` ends what this process leaves behind."""
    try:
        os.write(2, INTERRUPTED.encode())  # sys.stderr may be in the middle of a line, and refuses a second one in it
    finally:
        os._exit(INTERRUPTED_CODE)


if __name__ == "__main__":
    command()
