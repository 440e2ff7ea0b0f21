"""Command lines and shell scripts of other trainers, taken apart and never run: variables, quotes, continued lines."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from flux2_core.errors import UsageError

QUOTED = re.compile(r"'[^']*'|\"(?:\\.|[^\"\\])*\"|\\.|(?<![\w'\"])#[^\n]*|\$\{\w+(?::?-[^}]*)?\}|\$\w+", re.DOTALL)
VARIABLE = re.compile(r"\$\{(\w+)(?::?-([^}]*))?\}|\$(\w+)")
ASSIGNED = re.compile(r"(\w+)=(.*)", re.DOTALL)
COMPUTED = re.compile(r"\$|`")
NOT_SET = "the script does not say what it is: a variable that it does not set, or the output of a command"


def commands(text: str) -> list[list[str]]:
    """The words of each command of a script, with the variables that it sets put in.

    Raises:
        UsageError: a quote is not closed; names the line.
    """
    known: dict[str, str] = {}
    found: list[list[str]] = []
    for number, line in _lines(text):
        try:
            found += _split(line, known)
        except ValueError as error:
            raise UsageError(f"line {number}: not a command ({error}): {line.strip()[:80]}") from error
    return found


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Logical lines, each with the number of its first: a backslash and an open quote go on in the next."""
    start, held = 0, ""
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        start, held = (start, f"{held}\n{line}") if held else (number, line)
        if held.rstrip().endswith("\\"):
            held = held.rstrip()[:-1]
            continue
        bare = QUOTED.sub("", held)
        if ('"' in bare or "'" in bare) and held.count("\n") < 200:
            continue
        yield start, held.replace("\n", " ") if '"' not in held and "'" not in held else held
        held = ""
    if held:
        yield start, held


def _split(line: str, known: dict[str, str]) -> Iterator[list[str]]:
    ends = [found for found in re.finditer(f"{QUOTED.pattern}|(?P<end>[;&|()]+)", line, re.DOTALL) if found["end"]]
    for start, end in zip([0, *(found.end() for found in ends)], [*(f.start() for f in ends), None], strict=True):
        words = shlex.split(QUOTED.sub(lambda found: _put(found[0], known), line[start:end]))
        set_by = [ASSIGNED.fullmatch(each) for each in words if each not in ("export", "local", "declare")]
        if words and all(set_by):
            known.update({each[1]: each[2] for each in set_by if each})
        elif words:
            yield words


def _put(part: str, known: Mapping[str, str]) -> str:
    """A piece of a line with its variables put in; single quotes and escapes stay, comments go."""
    if part[0] in "'\\":
        return part
    if part[0] == "#":
        return ""
    return VARIABLE.sub(lambda found: known.get(found[1] or found[3], found[2] or found[0]), part)


def options(words: list[str]) -> dict[str, Any]:
    """Options of a command's words by name without dashes: the last one of a name wins, as in argparse.

    One without a value is true, one with several a list; a dash and a letter begin an option, a dash and a number not.
    """
    found: dict[str, Any] = {}
    name = None
    for word in words:
        if re.match(r"--?[A-Za-z_]", word):
            name, equals, value = word.lstrip("-").partition("=")
            found[name] = value if equals else True
            name = None if equals else name
        elif word.startswith("$") and (name is None or "[" in word):
            found[word] = True  # options that stand in a variable which is not read: told as unknown
        elif name is not None:
            held = found[name]
            found[name] = word if held is True else [*(held if isinstance(held, list) else [held]), word]
    return found
