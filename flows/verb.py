"""A verb of the command line is one record: what it does, its arguments, its function, and how its result is told."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

from flows import progress
from flux2_core.escape import visible

COMMON = ("verb", "config", "overrides", "json")  # what every verb is given; the rest is its own


class Verb(NamedTuple):
    """All that there is to say of a verb; its name is its key in `flows.verbs.VERBS`."""

    does: str
    """For `--help` and the README."""
    function: Callable[..., dict[str, Any]]
    """From a configuration, and its own arguments by name, to the object that `--json` prints."""
    told: Callable[[dict[str, Any], str], str]
    """The same object in words; also given the configuration's file as it was written, for what to do next."""
    arguments: tuple[tuple[str, dict[str, Any]], ...] = ()
    """Its own, each made by `option`."""
    guarded: bool = False
    """Whether what it starts must end with it."""
    configured: bool = True
    """Whether it is given a configuration; else its own arguments are all."""

    def run(self, options: Namespace) -> dict[str, Any]:
        """Read the configuration and do it, with bars where there is progress."""
        own = {name: value for name, value in vars(options).items() if name not in COMMON}
        if not self.configured:
            return self.function(**own)
        from flows.reaper import guard
        from flux2_core.config import targets
        from flux2_core.config.reading import absolute, load

        config = absolute(load(options.config, options.overrides))
        targets.outputs(config.output)
        with guard() if self.guarded else nullcontext(), progress.bars():
            return self.function(config, **own)


def option(name: str, told: str, **settings: Any) -> tuple[str, dict[str, Any]]:
    """An argument of a verb: its name, its help and argparse's settings."""
    return name, settings | {"help": told}


def read(arguments: Sequence[str] | None, verbs: Mapping[str, Verb]) -> Namespace:
    """What the command line asks for.

    Raises:
        SystemExit: it is wrong, or asks for help; all is said.
    """
    parser = ArgumentParser(
        prog="cacheloom", description="Cache FLUX.2's text encoder away, then train a LoRA from the cache."
    )
    parsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in verbs.items():
        own = parsers.add_parser(name, help=verb.does, description=verb.does)
        if verb.configured:
            own.add_argument("config", help="configuration (TOML); docs/config.md lists its keys")
        for given, settings in verb.arguments:
            own.add_argument(given, **settings)
        if verb.configured:
            own.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings on top of the file")
        else:
            own.set_defaults(config="", overrides=None)
        own.add_argument("--json", action="store_true", help="print the result as one JSON object")
    options, more = parser.parse_known_args(arguments)  # overrides may stand after options too
    if odd := [text for text in more if text.startswith("-") or "=" not in text or options.overrides is None]:
        parser.error(f"unrecognized arguments: {visible(' '.join(odd))}")
    options.overrides = [*(options.overrides or []), *more]
    return options
