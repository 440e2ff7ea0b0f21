"""Verbs that make a configuration: `import-config` from another trainer's, `init` from a goal and a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows.verb import Verb, option
from flux2_core.errors import UsageError

GOALS, CARDS = ("style", "character", "object", "edit"), (24, 48, 80, 141)
FILE = "cacheloom.toml"


def import_config(*, source: str, out: str | None) -> dict[str, Any]:
    """Another trainer's configuration as one of ours, and what became of each of its options."""
    from flux2_core.moving.moved import move

    result = move(source)
    if out is not None:
        _keep(out, result["toml"])
    return result | {"out": out}


def init(*, goal: str, card: int, data: str, out: str) -> dict[str, Any]:
    """A configuration to begin with."""
    import tomllib

    from flux2_core.moving.starting import begin

    lines = begin(goal, card, data)
    _keep(out, lines)
    return {"config": tomllib.loads("\n".join(lines)), "toml": lines, "out": out}


def _keep(out: str, lines: list[str]) -> None:
    """Write a new file."""
    try:
        with Path(out).expanduser().open("x", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
    except FileExistsError:
        raise UsageError(f"--out {out}: it is there already, and is not written over; name another file") from None
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error}); name a file in a folder that is there") from error


def imported(result: dict[str, Any], _: str) -> str:
    """The file itself where it was not written, else what became of the options."""
    if result["out"] is None:
        return "\n".join(result["toml"])
    given = [entry for entry in result["mapped"] if entry["given"]]
    lines = [f"{result['system']}: {len(given)} options carried over, {len(result['dropped'])} answered"]
    lines += [f"  {entry['option']}: {entry['reason']}" for entry in result["dropped"]]
    for entry in result["unknown"]:
        near = f"; did they mean {entry['nearest']}?" if entry["nearest"] else ""
        lines.append(f"unknown to {result['system']}: {entry['option']}{near}")
    lines += [f"note: {line}" for line in result["notes"]]
    return "\n".join([*lines, f"next: cacheloom plan {result['out']}"])


def begun(result: dict[str, Any], _: str) -> str:
    """Where it is, and what comes next."""
    return f"{result['out']}: put in the pictures' folder and the trigger; then: cacheloom plan {result['out']}"


MOVING = {
    "init": Verb(
        "a configuration to begin with, for a goal and a card",
        init,
        begun,
        arguments=(
            option("--goal", "what is to be learned (default: %(default)s)", choices=GOALS, default=GOALS[0]),
            option("--card", "GiB of the card (default: %(default)s)", choices=CARDS, default=CARDS[0], type=int),
            option("--data", "folder of the pictures (default: %(default)s)", default="photos", metavar="FOLDER"),
            option("--out", "where to write it (default: %(default)s)", default=FILE, metavar="FILE"),
        ),
        configured=False,
    ),
    "import-config": Verb(
        "SimpleTuner's, AI Toolkit's, DiffSynth-Studio's, diffusers' or musubi's configuration as one of ours",
        import_config,
        imported,
        arguments=(
            option("source", "their file, script, or command in quotes", metavar="FILE|SCRIPT|ARGV"),
            option("--out", "where to write it; default: shown", metavar="FILE"),
        ),
        configured=False,
    ),
}
