"""Captions are decoded strictly and expanded as words."""

import pytest

from flux2_core import captions
from flux2_core.errors import DataError


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a cat\n", "a cat"),
        (b"\xef\xbb\xbfa cat", "a cat"),
        (b"a cat\r\non a mat\r\n", "a cat\non a mat"),
        ("e\u0301 \u00e9".encode(), "e\u0301 \u00e9"),
        ("שלום 👩‍👩‍👧 ".encode(), "שלום 👩‍👩‍👧"),
        (b"[INST] </s> [IMG]", "[INST] </s> [IMG]"),
        (b"x" * 1_000_000, "x" * 1_000_000),
    ],
    ids=["plain", "bom", "crlf", "nfc-nfd", "rtl-zwj", "control-words", "1MB"],
)
def test_utf8_text_comes_through_unchanged_but_for_its_ends(data, text):
    """UTF-8 is kept code point by code point; only a BOM, outer white space and CR before LF go."""
    assert captions.decode(data) == text


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("a cat".encode("utf-16"), "UTF-16"),
        ("a cat".encode("utf-32"), "UTF-32"),
        ("a cat".encode("utf-16-le"), "NUL"),
        ("café".encode("latin-1"), "not UTF-8 .byte 0xe9 at 3"),
        (b"a\0cat", "NUL"),
        (b"\xed\xa0\x80", "not UTF-8"),
    ],
)
def test_other_encodings_are_refused_not_guessed(data, reason):
    """Another encoding, NUL or a surrogate is refused with a reason."""
    with pytest.raises(DataError, match=reason):
        captions.decode(data)


def test_a_lone_surrogate_from_json_is_refused():
    """JSON can carry half a surrogate pair; no table can."""
    with pytest.raises(DataError, match="lone surrogate"):
        captions.clean("a \ud800 cat")


@pytest.mark.parametrize("text", ["", " \t\n", "\u200b\ufeff", "\x01"])
def test_text_that_nobody_can_see_is_blank(text):
    """White space, zero-width and control characters alone are no caption."""
    assert captions.blank(text)
    assert not captions.blank(text + "a")


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
    assert captions.resolve(text, trigger="sks") == expected


def test_what_is_inserted_is_taken_literally():
    """A trigger with a placeholder or a backslash in it is not expanded again; `name` differs from the trigger."""
    assert captions.resolve("[trigger] and [name]", trigger=r"[name]\1", name="Ann") == r"[name]\1 and Ann"


def test_a_placeholder_without_a_trigger_is_refused():
    """`[trigger]` never reaches the encoder unexpanded."""
    with pytest.raises(DataError, match=r"data\.N\.trigger"):
        captions.resolve("a [trigger] dog", trigger=None)
    assert captions.resolve("a dog", trigger=None) == "a dog"


def test_a_word_is_mentioned_only_at_word_boundaries():
    """ "risks" does not contain the word "sks"; a trigger of several words or with signs works too."""
    assert captions.mentions("a sks, dog", "sks")
    assert not captions.mentions("risks and sksy", "sks")
    assert captions.mentions("the c++ (tm) logo", "c++ (tm)")
