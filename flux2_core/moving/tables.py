"""Tables of other trainers: a TOML file beside this module for each, which knows every option that its trainer has."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PREFIXES = "[."  # a name with one of these is no argument of a command line, and is never shortened


@dataclass(frozen=True)
class Target:
    """What an option is mapped to: our key, by which rule, and the option that must be on for it to mean anything."""

    key: str
    rule: str | None = None
    when: str | None = None


@dataclass(frozen=True)
class System:
    """Another trainer: all options that it knows, and what becomes of each."""

    key: str
    title: str
    scripts: tuple[str, ...]
    signs: tuple[str, ...]
    argparse: bool
    better: Mapping[str, str]
    defaults: Mapping[str, Any]
    aliases: Mapping[str, str]
    mapped: Mapping[str, Target]
    choices: Mapping[str, Mapping[str, Any]]
    answered: Mapping[str, str]
    always: Mapping[str, Any]
    open: tuple[str, ...]

    @property
    def names(self) -> set[str]:
        """Every name that it takes."""
        return {*self.mapped, *self.answered, *self.aliases}

    def known(self, given: str) -> str | None:
        """The option that a name means: its own, another one, or a beginning that only one argument has."""
        given = given.replace("-", "_") if given.replace("-", "_") in self.names else given
        if given in self.aliases:
            return self.aliases[given]
        if given in self.names:
            return given
        if not self.argparse or {*given} & {*PREFIXES}:
            return None
        begun = [name for name in self.names if name.startswith(given) and not {*name} & {*PREFIXES}]
        return self.aliases.get(begun[0], begun[0]) if len(begun) == 1 else None

    def holder(self, given: str) -> str | None:
        """The option that a name stands below, where its table of values is free: one that has no names below it."""
        parts = given.replace("[]", "").split(".")
        above = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
        tables = {name.replace("[]", ""): name for name in self.names}
        found = next((tables[name] for name in above if name in tables), None)
        held = found and any(name.startswith((f"{found}.", f"{found}[]")) for name in self.names)
        return None if held and found not in self.open else found

    def nearest(self, given: str) -> str | None:
        """The option whose name is nearest to one that there is not."""
        near = difflib.get_close_matches(given, self.names, n=1, cutoff=0.5)
        return near[0] if near else None


@cache
def systems() -> dict[str, System]:
    """Every trainer that we know, by the name of its table."""
    return {file.stem: _system(file) for file in sorted(Path(__file__).parent.glob("*.toml"))}


def _system(file: Path) -> System:
    read = tomllib.loads(file.read_text(encoding="utf-8"))
    return System(
        key=file.stem,
        title=read["title"],
        scripts=tuple(read["scripts"]),
        signs=tuple(read["signs"]),
        argparse=read["argparse"],
        always=read["always"],
        open=tuple(read["open"]),
        better=read["better"],
        defaults=read["defaults"],
        aliases=read["aliases"],
        mapped={name: _target(said) for name, said in read["mapped"].items()},
        choices=read.get("choices", {}),
        answered={name: group["reason"] for group in read["answered"] for name in group["options"]},
    )


def _target(said: str) -> Target:
    """`key [by rule] [when option]`."""
    rest, _, when = said.partition(" when ")
    key, _, rule = rest.partition(" by ")
    return Target(key, rule or None, when or None)
