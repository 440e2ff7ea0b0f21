"""Processes that start warm: forked off one server which has imported the product and opened nothing yet.

Such a process begins in a tenth of a second; importing torch, transformers, diffusers, peft, Ray and Lance takes a cold
one 3 to 8 CPU-seconds. It is a process like any other: a folder, an environment, output and an exit code of its own.
What it cannot show is what an import does, nor what stands in /proc/PID/environ: tests of these start cold.
"""

import multiprocessing
import os
import sys
from pathlib import Path

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(  # Prefect is left out: it reads its environment once, while it is imported
    [
        "tests.in_process",
        "tests.flux2_core.sharded_process",
        "tests.flux2_core.store_writers",
        "flows.verbs",
        "flows.wording",
        "stages.group",
        "stages.sample",
        "stages.train",
    ]
)


def command(line: list[str], *, folder: Path, environment: dict[str, str], out: Path, err: Path) -> int:
    """Run the command with a line of arguments to its end, its output into two files; returns its exit code."""
    process = PROCESSES.Process(target=_command, args=(line, folder, environment, out, err))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _command(line: list[str], folder: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for path, place in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), place)
    sys.argv = line
    from flows import cli

    cli.command()
