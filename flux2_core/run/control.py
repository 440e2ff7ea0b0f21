"""What a person asks of a run that trains, as files in its folder that the loop looks for after each step."""

from __future__ import annotations

from pathlib import Path

FOLDER, STOP = "control", "stop"


def ask(run: Path, what: str) -> None:
    """Ask for it: heeded after the step that is being computed."""
    place = run / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    (place / what).touch()


def asked(run: Path, what: str) -> bool:
    """Whether it was asked for since this was last looked at."""
    try:
        (run / FOLDER / what).unlink()
    except FileNotFoundError:
        return False
    return True
