"""Captions are decoded strictly, and become what training sees."""

import itertools

import pytest

from flux2_core.config.dataset import Data
from flux2_core.data import captions
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


SHUFFLED = ["a, c, d, b, e, f", "a, c, b, e, d, f"]  # of "a, b, c, d, e, f"; another order would be another cache


def prepared(*texts, **options):
    return captions.prepare(texts, Data(path="x", **options))


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("a dog", {}, ("sks, a dog", True)),
        ("risks", {}, ("sks, risks", True)),
        ("a sks dog", {}, ("a sks dog", False)),
        ("sks sks", {}, ("sks sks", False)),
        ("a [trigger] and [name]", {}, ("a sks and sks", False)),
        ("a [class]", {"class_name": "dog"}, ("sks, a dog", True)),
        ("a dog", {"inject_trigger": False}, ("a dog", False)),
        ("a [class]", {"class_name": "dog", "regularisation": True}, ("a dog", False)),
        ("", {}, ("sks", True)),
    ],
)
def test_the_trigger_is_injected_once_or_not_at_all(text, options, expected):
    """`trigger, caption` where the resolved caption does not mention it as a word; never for regularisation sets."""
    found, injected = prepared(text, trigger="sks", **options)
    assert (*found, injected) == expected
    if injected:
        assert prepared(*found, trigger="sks") == (found, False)


def test_a_regularisation_caption_cannot_ask_for_the_trigger():
    """`[trigger]` in a regularisation set is refused, not filled in; a class is."""
    with pytest.raises(DataError, match="regularisation set has no trigger"):
        prepared("a [trigger]", trigger="sks", regularisation=True)


def test_shuffles_are_orders_of_the_parts_with_the_first_in_place():
    """Each shuffle is another permutation of the comma parts; more are asked for than there are: each order once."""
    text = "sks dog,  red,green , blue"
    every = list(captions.shuffles(text, 1000))
    expected = {", ".join(("sks dog", *order)) for order in itertools.permutations(("red", "green", "blue"))}
    assert set(every) == expected - {"sks dog, red, green, blue"}
    assert len(every) == 5
    assert list(captions.shuffles("one part", 3)) == list(captions.shuffles(",", 3)) == []


def test_shuffles_depend_on_the_text_and_their_number_alone():
    """Asking for more keeps the first ones; other captions change nothing; the order is fixed for ever."""
    text = "a, b, c, d, e, f"
    assert list(captions.shuffles(text, 2)) == list(captions.shuffles(text, 5))[:2]
    assert list(captions.shuffles(text, 2)) == SHUFFLED
    both, _ = prepared(text, "x, y, z", caption_shuffles=2)
    assert both == (text, "x, y, z", *SHUFFLED, *captions.shuffles("x, y, z", 2))


def test_shuffles_keep_the_injected_trigger_first():
    """Shuffles are made of the caption with its trigger, so the trigger stays in front."""
    found, _ = prepared("red, green, blue, black", trigger="sks", caption_shuffles=3)
    assert len(found) == 4
    assert all(text.startswith("sks, ") for text in found)


def test_shuffling_a_megabyte_is_linear():
    """100,000 parts are one hash each."""
    (other,) = captions.shuffles(",".join(map(str, range(100_000))), 1)
    assert sorted(other.split(", "), key=int) == [str(n) for n in range(100_000)]


@pytest.mark.parametrize(
    ("value", "lines", "expected"),
    [
        ("a\r\n\r\n b \n", True, ["a", "b"]),
        ("a\nb", False, ["a\nb"]),
        (["a ", "", None, "b"], False, ["a", "b"]),
        (None, False, []),
        (" ", True, []),
    ],
)
def test_several_captions(value, lines, expected):
    """Lines are captions where that is asked for, a list always is; blank ones are none."""
    assert captions.listed(value, lines=lines) == expected


@pytest.mark.parametrize(
    ("text", "edits", "expected"),
    [
        ("img_12, a dog", [["img_12, ", ""]], "sks, a dog"),
        ("photo of a dog. photo of a cat", [["/(?i)Photo of an? (\\w+)/", r"[trigger] \1"]], "sks dog. sks cat"),
        ("a b", [["a", "b"], ["b b", "c"]], "sks, c"),
        ("(a+)", [["(a+)", r"\1"]], r"sks, \1"),
        ("nothing here", [["missing", "x"]], "sks, nothing here"),
        ("all of it", [["/.*/", ""]], "sks"),
        ("a/b", [["/", " "]], "sks, a b"),
    ],
)
def test_captions_are_edited_in_order(text, edits, expected):
    """Texts as they stand, expressions by their groups, each on what the last one left, before the trigger."""
    assert prepared(text, trigger="sks", caption_edits=edits)[0] == (expected,)


@pytest.mark.parametrize("edits", [[["", "x"]], [["/(/", "x"]], [["/a/", r"\2"]], [["a"]]])
def test_an_edit_that_cannot_be_is_refused(edits):
    """An empty text, a broken expression, a group that is not there, an edit without its replacement."""
    with pytest.raises(ValueError, match="caption_edits"):
        prepared("a", caption_edits=edits)
