"""Scripts are taken apart as a shell does it, and never run."""

from pathlib import Path

import pytest

from flux2_core.errors import UsageError
from flux2_core.moving import commands


def test_variables_quotes_and_continued_lines() -> None:
    """Variables of the script are put in, in double quotes too; single quotes stay; comments and backslashes go."""
    script = """#!/bin/bash
export A="a b"   # said once
B=${NOT_SET:-'x'}; C=c
run "$A" '$A' ${C}d \\
   $B it\\'s # the end
"""
    assert commands.commands(script) == [["run", "a b", "$A", "cd", "x", "it's"]]


def test_a_quote_over_lines() -> None:
    """A quoted text may hold line breaks and hashes, and an apostrophe in double quotes opens nothing."""
    assert commands.commands('run "a dog\'s\n# bowl" b\nnext') == [["run", "a dog's\n# bowl", "b"], ["next"]]


def test_several_commands_on_a_line() -> None:
    """What stands between `&&`, `;` and `|` are commands of their own."""
    assert commands.commands("cd x && A=1; run $A | tee log") == [["cd", "x"], ["run", "1"], ["tee", "log"]]


def test_nothing_is_run(tmp_path: Path) -> None:
    """A command in a value is text, and stays as it is."""
    assert commands.commands(f"run --n $(touch {tmp_path}/made) `id`")[0][0] == "run"
    assert not list(tmp_path.iterdir())


def test_options() -> None:
    """The last of a name wins; flags are true; several values are a list; a negative number is a value."""
    found = commands.options(["--a", "1", "--b", "--a=2", "--c", "x", "y", "--d", "-1", "-e", "f"])
    assert found == {"a": "2", "b": True, "c": ["x", "y"], "d": "-1", "e": "f"}


def test_options_in_a_list_are_told() -> None:
    """What a script keeps in a list of its own is not lost without a word."""
    assert commands.options(["--a", "1", "${MORE[@]}"]) == {"a": "1", "${MORE[@]}": True}


def test_an_open_quote() -> None:
    """A quote that is never closed is refused with its line."""
    with pytest.raises(UsageError, match="line 2: not a command"):
        commands.commands('run a\nrun "b\n')
