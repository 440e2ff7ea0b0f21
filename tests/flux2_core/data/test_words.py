"""Placeholders are expanded as words, and words are found at their boundaries."""

import pytest

from flux2_core.config.sections import Config
from flux2_core.data import words
from flux2_core.errors import DataError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a [trigger] dog", "a sks dog"),
        ("[trigger]'s [name], [trigger].", "sks's sks, sks."),
        ("a[trigger]dog[trigger]", "a sks dog sks"),
        ("[trigger][name]", "sks sks"),
        ("no placeholder [Trigger] [triggers]", "no placeholder [Trigger] [triggers]"),
        ("sks dog", "sks dog"),
    ],
)
def test_placeholders_become_words_of_their_own(text, expected):
    """A placeholder becomes the trigger, parted from touching letters; all else stays."""
    assert words.resolve(text, trigger="sks") == expected


def test_what_is_inserted_is_taken_literally():
    """A trigger with a placeholder or a backslash in it is not expanded again; `[class]` is the class."""
    assert words.resolve("[trigger], a [class]", trigger=r"[name]\1", class_name="cup") == r"[name]\1, a cup"


def test_a_placeholder_without_a_trigger_is_refused():
    """`[trigger]` never reaches the encoder unexpanded."""
    with pytest.raises(DataError, match=r"data\.N\.trigger"):
        words.resolve("a [trigger] dog", trigger=None)
    with pytest.raises(DataError, match=r"data\.N\.class_name"):
        words.resolve("a [class]", trigger="sks")
    assert words.resolve("a dog", trigger=None) == "a dog"


def test_a_word_is_mentioned_only_at_word_boundaries():
    """ "risks" does not contain the word "sks"; a trigger of several words or with signs works too."""
    assert words.mentions("a sks, dog", "sks")
    assert not words.mentions("risks and sksy", "sks")
    assert words.mentions("the c++ (tm) logo", "c++ (tm)")


def test_a_prompt_takes_the_words_of_the_first_data_set():
    """`[trigger]` and `[class]` of `validate.prompts` are those of the first data set."""
    data = [{"path": "x", "trigger": "sks", "class_name": "a cup"}, {"path": "y", "trigger": "other"}]
    config = Config.model_validate({"model": {"path": "m"}, "data": data})
    assert words.resolve_prompt("[trigger], [class]", config) == "sks, a cup"
