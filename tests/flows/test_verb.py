"""The records of the verbs: what argparse reads is what their functions take."""

import inspect

import pytest

from flows.verb import COMMON, read
from flows.verbs import VERBS

NEEDED = {"show": ["p0", "--out", "p0.safetensors"]}


@pytest.mark.parametrize("verb", VERBS)
def test_arguments_are_the_functions_own(verb: str) -> None:
    """The arguments of a verb's record are the keywords of its function; overrides may stand before and after them."""
    options = read([verb, "my.toml", *NEEDED.get(verb, []), "run=a", "--json", "train.steps=3"], VERBS)
    config, *keywords = inspect.signature(VERBS[verb].function).parameters
    assert config == "config"
    assert vars(options).keys() == {*COMMON, *keywords}
    assert (options.config, options.overrides, options.json) == ("my.toml", ["run=a", "train.steps=3"], True)


@pytest.mark.parametrize("odd", ["--bogus", "steps"])
def test_what_is_neither_option_nor_override_is_refused(odd: str, capsys: pytest.CaptureFixture[str]) -> None:
    """After an option only overrides may stand; anything else ends with code 2 and is named."""
    with pytest.raises(SystemExit) as ended:
        read(["stat", "my.toml", "--json", odd], VERBS)
    assert ended.value.code == 2
    assert f"unrecognized arguments: {odd}" in capsys.readouterr().err
