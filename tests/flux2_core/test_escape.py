"""R23: text from data is shown as text, in a terminal, in Markdown, in HTML, in YAML and Python; passwords are not."""

import ast
import copy

import pytest
import yaml

from flux2_core.errors import CacheloomError, DataError, SetupError, UsageError
from flux2_core.escape import code, every, markdown, page, quoted, visible
from tests.hostile import HOSTILE, Page, rendered, unseen

hostile = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)


@hostile
def test_a_terminal_is_not_steered(text: str) -> None:
    """Nothing but printable letters in one line is left, written twice it is the same, and any terminal can encode
    it."""
    shown = visible(text)
    assert not unseen(shown)
    assert len(shown.splitlines()) == 1
    assert visible(shown) == shown
    shown.encode("utf-8")
    assert "\u202e" not in shown


@hostile
@pytest.mark.parametrize("frame", ["{}", "| a |\n|---|\n| {} |", "## {}", "![{}](data:image/png;base64,AAAA)"])
def test_markdown_shows_it_as_text(text: str, frame: str) -> None:
    """As a paragraph, cell, heading or a picture's name it adds no tag, and reads as the terminal would show it."""
    plain, found = rendered(frame.format("words")), rendered(frame.format(markdown(text)))
    assert found.tags == plain.tags
    if "![" not in frame:  # there it is an attribute
        assert found.text == plain.text.replace("words", visible(text).strip())


def test_no_address_becomes_a_link_by_itself() -> None:
    """GitHub's extension links bare addresses: none is left for it to see."""
    shown = markdown(HOSTILE["link"])
    for bare in ("https://", "www.", "me@"):
        assert bare not in shown


@hostile
def test_back_ticks_hold_it(text: str) -> None:
    """Between back-ticks it stays one piece of code."""
    found = rendered(f"a `{code(text)}` b")
    assert found.tags == ["p", "code"]
    assert found.text.strip() == f"a {code(text)} b"


@hostile
def test_html_shows_it_as_text(text: str) -> None:
    """In an element and in an attribute it adds no tag."""
    found = Page(f'<p title="{page(text)}">{page(text)}</p>')
    assert (found.tags, found.text) == (["p"], visible(text))


@hostile
def test_yaml_and_python_read_it_back(text: str) -> None:
    """A quoted string is one line without anything unseen, and is the very text again for both readers."""
    written = quoted(text + " 😀 é")
    assert not unseen(written)
    assert len(written.splitlines()) == 1
    assert yaml.safe_load(f"a: {written}")["a"] == ast.literal_eval(written) == text + " 😀 é"


@pytest.mark.parametrize(
    "text", ["IMG_0001 (1).png", "東京　駅", "👩‍👩‍👧", "a-b+c = 5%", "-5", "0.25", "C'était", "/data/x_y/z.png"]
)
def test_ordinary_names_stay_as_they_are(text: str) -> None:
    """Nobody's language, emoji or camera is punished."""
    assert visible(text) == markdown(text) == text


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("AWS_ENDPOINT_URL=https://user:pa@ss@host:9000/x: no", "AWS_ENDPOINT_URL=https://***@host:9000/x: no"),
        ("'s3://key:secret@bucket/a@b'", "'s3://***@bucket/a@b'"),
        ("http://token@127.0.0.1:4200/api", "http://***@127.0.0.1:4200/api"),
        ("s3://bucket/me@home.png and me@home", "s3://bucket/me@home.png and me@home"),
    ],
)
def test_passwords_are_not_shown(given: str, shown: str) -> None:
    """Whatever stands before the @ of a URL is left out, wherever the URL is shown; an @ elsewhere is none."""
    assert visible(given) == shown
    for kind in (CacheloomError, UsageError, DataError, SetupError):
        assert str(kind(given)) == shown
        assert str(copy.copy(kind(given))) == shown  # made again, as one that comes out of an actor
    assert "secret" not in quoted(given) + page(given) + markdown(given)


def test_every_text_of_a_result() -> None:
    """Names and values at any depth; numbers stay numbers."""
    given = {"a\x1b": [{"b": ("c\x07", 1, None)}], "d": 1.5}
    assert every(given) == {"a\\x1b": [{"b": ["c\\x07", 1, None]}], "d": 1.5}


def test_an_error_has_the_lines_that_we_gave_it() -> None:
    """Each argument is a line, and stays one when the error is made again; a break inside of it is shown as such."""
    error = UsageError("a: wrong", "b\ncacheloom: all is well \x1b[2J")
    assert str(error) == str(copy.copy(error)) == "a: wrong\nb\\ncacheloom: all is well \\x1b[2J"
