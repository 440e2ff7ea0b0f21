"""Escape: text that came from data, made harmless for where it is shown, and passwords taken out of URLs.

File names, captions, prompts and other people's error messages may hold Markdown, HTML, terminal sequences (OSC 52 sets
the clipboard) or letters that turn a line around. Whatever shows such text calls one of these, and errors call
`visible` themselves; JSON needs none of it, because `json.dumps` writes ASCII.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from typing import Any

CREDENTIALS = re.compile(r"(?<=://)[^\s/?#]*@")  # of a URL: `key:secret@`
# Control characters, separators of lines, marks that reorder text, halves of surrogate pairs (undecodable bytes). Not
# joiners and wide spaces, of which emoji and Japanese are made.
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
# What Markdown reads anywhere: its marks, e-mail and web addresses, which become links by themselves, $ of formulas.
# An underscore inside a word is none, and so the most common file names stay as they are.
MARKS = re.compile(r"[\\`*\[\]<>|~&@$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?i:(?<=www)\.)")
LEADING = re.compile(r"^(\d{0,9})([-+#.)])(?=[-#\s]|$)")  # what makes a list, a heading or a rule of a line


def visible(text: object, *, lines: bool = False) -> str:
    """Text for a terminal or a log: what cannot be seen is written out (`\\x1b`), passwords in URLs become `***`.

    Args:
        text: anything, as `str` writes it.
        lines: keep line breaks; else the text stays in its line.
    """
    known = CREDENTIALS.sub("***@", str(text))
    return UNSEEN.sub(lambda found: "\n" if lines and found[0] == "\n" else _written_out(found[0]), known)


def every(value: Any) -> Any:
    """The same mapping or list with every text in it made visible, names too."""
    if isinstance(value, Mapping):
        return {every(name): every(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [every(inner) for inner in value]
    return visible(value) if isinstance(value, str) else value


def markdown(text: object) -> str:
    """Text as a cell or paragraph of Markdown shows it: no mark, picture, link or tag, in one line."""
    return LEADING.sub(r"\1\\\2", MARKS.sub(lambda found: "\\" + found[0], visible(text).strip()))


def code(text: object) -> str:
    """Text between back-ticks of Markdown, which know no escape."""
    return visible(text).replace("`", " ")


def page(text: object, *, lines: bool = False) -> str:
    """Text of an HTML element or a quoted attribute."""
    return html.escape(visible(text, lines=lines))


def quoted(text: str) -> str:
    """A text as a double-quoted string that YAML and Python read back as it was; a password of a URL is not in it."""
    string = json.dumps(CREDENTIALS.sub("***@", text), ensure_ascii=False)
    return UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", string)


def _written_out(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
