"""The command line: `cacheloom VERB CONFIG.toml [section.key=value ...] [--json]`.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 unexpected, 2 wrong usage or
configuration, 3 data or cache refused, 4 environment.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout
from typing import Any, NoReturn

from flows import terminal
from flux2_core.errors import CacheloomError
from flux2_core.escape import every, visible

VERBS = {
    "plan": "what would run: what is kept, left out and odd, rows, bytes, time, memory; loads no model, writes nothing",
    "cache": "index, then encode every text and picture that is not cached yet",
    "train": "train from the caches alone",
    "run": "everything: the Prefect flow cache-and-train",
    "sample": "draw pictures with the trained LoRA",
    "show": "write the exact tensors that training sees for one sample",
    "verify": "checksums and coverage of the cached rows; some of them encoded again and compared",
    "stat": "what the cache holds",
    "gc": "drop what no kept run needs, and compact the rest",
    "check": "the environment: GPUs, Ray, storage rights, model access",
}
INTERRUPTED, INTERRUPTED_CODE = "cacheloom: interrupted; run the same command again to go on\n", 130
GRACE_S = 20.0  # for an interrupted command to end by itself
QUIET = {"plan", "show", "stat", "gc", "check", "verify"}  # verbs that start nothing worth guarding
EXTRAS = {"sample": ("prompts", "lora", "out"), "verify": ("rows", "drop"), "gc": ("keep_days", "dry_run")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = _parser()
    options, more = parser.parse_known_args(arguments)  # overrides may stand after options too
    if odd := [text for text in more if text.startswith("-") or "=" not in text]:
        parser.error(f"unrecognized arguments: {visible(' '.join(odd))}")
    options.overrides += more
    _settle_environment()
    try:
        with ExitStack() as stack:
            if options.json:
                stack.enter_context(redirect_stdout(sys.stderr))
            result = _verb(options, stack)
    except CacheloomError as error:
        terminal.complain(options.verb, error)
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write(INTERRUPTED)
        return INTERRUPTED_CODE
    from flows import wording

    if options.json:  # ASCII, which needs no escapes: scripts want the names as they are
        _write(json.dumps(result, indent=1))
    else:
        _write(wording.words(options.verb, every(result), config=visible(options.config)))
    if reason := result.get("refused"):
        terminal.complain(options.verb, reason)
    return int(result.get("exit_code", 0))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cacheloom", description="Cache FLUX.2's text encoder away, then train a LoRA from the cache."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, does in VERBS.items():
        verb = verbs.add_parser(name, help=does, description=does)
        verb.add_argument("config", help="configuration (TOML); docs/config.md lists its keys")
        if name == "show":
            verb.add_argument("sample", metavar="SAMPLE_ID", help="the picture's path in its folder, without extension")
            verb.add_argument("--out", required=True, metavar="FILE.safetensors", help="where to write the tensors")
        if name == "sample":
            verb.add_argument(
                "--prompt",
                action="append",
                dest="prompts",
                help="what to draw (repeat for more); default: validate.prompts",
            )
            verb.add_argument("--lora", help="a LoRA file; default: the run's own. `none` draws the base model")
            verb.add_argument("--out", help="folder for the pictures; default: samples/ in the run's folder")
        if name == "verify":
            verb.add_argument(
                "--rows", type=int, default=4, help="rows of each table to encode again; 0: none (default: %(default)s)"
            )
            verb.add_argument("--drop", action="store_true", help="drop corrupt rows, for `cache` to write them again")
        if name == "gc":
            verb.add_argument(
                "--keep-days", type=float, default=7.0, help="age of what is never dropped (default: %(default)s)"
            )
            verb.add_argument("--dry-run", action="store_true", help="say what would go, change nothing")
        verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings on top of the file")
        verb.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


def _verb(options: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:
    from flows import progress, verbs
    from flows.reaper import guard
    from flux2_core.config.reading import absolute, load

    config = absolute(load(options.config, options.overrides))
    if options.verb not in QUIET:
        stack.enter_context(guard())
    if options.verb not in QUIET or options.verb == "plan":
        stack.enter_context(progress.bars())
    if options.verb == "show":
        return verbs.show(config, options.sample, out=options.out)
    asked = vars(options)
    if options.verb in EXTRAS:
        return getattr(verbs, options.verb)(config, **{name: asked[name] for name in EXTRAS[options.verb]})
    if options.verb == "run":
        progress.say("starting Prefect")  # first: its imports take seconds
        from flows.cache_and_train import run_here

        return run_here(config)
    simple: dict[str, Callable[..., dict[str, Any]]] = {
        "plan": verbs.plan,
        "cache": verbs.cache_all,
        "train": verbs.train,
        "stat": verbs.stat,
        "check": verbs.check,
    }
    return simple[options.verb](config)


def _settle_environment() -> None:
    """Telemetry off, libraries quiet, room for a slow machine; what the user set stays."""
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
    terminal.settle()


def _write(text: str) -> None:
    sys.stdout.write(text.rstrip("\n") + "\n")


def _interrupted(_number: int, _frame: object) -> NoReturn:
    """On Ctrl-C end in good order, on the second one, or where a library's thread never ends, at once.

    The watchdog of `flows.reaper` then ends what this process leaves behind.
    """

    def leave(*_: object) -> None:
        sys.stderr.write(INTERRUPTED)
        sys.stderr.flush()
        os._exit(INTERRUPTED_CODE)

    signal.signal(signal.SIGINT, leave)
    patience = threading.Timer(GRACE_S, leave)
    patience.daemon = True
    patience.start()
    raise KeyboardInterrupt


def command() -> NoReturn:
    """What the installed `cacheloom` runs: `main`, then an exit that no library's threads can spoil.

    Seen with pylance 14 and torch 2.13: an interpreter that winds down while their threads run aborts now and then
    ("terminate called without an active exception"), and a good exit code becomes -6. All that is ours is closed here.
    """
    signal.signal(signal.SIGINT, _interrupted)
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    command()
