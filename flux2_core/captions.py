"""Captions: bytes become text strictly, placeholders are expanded, nothing is guessed.

Every function raises `DataError` with the reason alone; whoever knows the picture adds its path and quarantines it.
"""

from __future__ import annotations

import codecs
import re

from flux2_core.errors import DataError

MAX_CAPTION_BYTES = 16 * 2**20
"""Over it a caption file is refused unread; a 1 MB caption passes, and its truncation is reported by the encoder."""

_PLACEHOLDER = re.compile(r"(?P<before>\w?)\[(?P<what>trigger|name)\](?=(?P<after>\w|\[(?:trigger|name)\])?)")
_FOREIGN_BOMS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decode(data: bytes) -> str:
    """Text of a caption file: UTF-8, with or without a byte order mark; ends stripped, CRLF read as LF.

    Raises:
        DataError: another encoding, or what `check` refuses.
    """
    if data.startswith(_FOREIGN_BOMS):
        raise DataError("caption is UTF-16 or UTF-32 text; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at {error.start}"
        raise DataError(f"caption is not UTF-8 ({found}); save it as UTF-8") from None
    return clean(text)


def clean(text: str) -> str:
    """The caption without surrounding white space and with CRLF read as LF; otherwise untouched (no NFC, no case).

    Raises:
        DataError: the text holds NUL or half of a surrogate pair, which no tokenizer or table can carry.
    """
    if "\0" in text:
        raise DataError("caption holds a NUL character; remove it (or save the file as UTF-8)")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("caption is not valid UTF-8 (a lone surrogate or a byte of another encoding)") from None
    return text.replace("\r\n", "\n").strip()


def blank(text: str) -> bool:
    """Whether nothing in the text can be seen (white space, zero-width and control characters only)."""
    return not any(character.isprintable() and not character.isspace() for character in text)


def resolve(text: str, *, trigger: str | None, name: str | None = None) -> str:
    """Expand `[trigger]` and `[name]` (unset: the trigger) in one pass, each as a word of its own.

    A letter or digit that touches a placeholder is parted from it by a space: `a[trigger]s` is `a sks s`, never
    `askss`. What is inserted is not expanded again. A caption without a placeholder is returned as it is: the trigger
    is never added to it.

    Raises:
        DataError: a placeholder stands in the text and there is no word for it.
    """
    words = {"trigger": trigger, "name": name if name is not None else trigger}

    def word(match: re.Match[str]) -> str:
        found = words[match["what"]]
        if found is None:
            raise DataError(f"[{match['what']}] stands in the text, but no trigger is set: set data.N.trigger")
        before = match["before"] + " " if match["before"] else ""
        return before + found + (" " if match["after"] else "")

    return _PLACEHOLDER.sub(word, text)


def mentions(text: str, word: str) -> bool:
    """Whether `word` stands in the text at word boundaries ("risks" does not mention "sks")."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None
