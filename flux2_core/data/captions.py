"""Captions of pictures: bytes become text strictly, and texts what training sees; nothing is guessed.

Every function raises `DataError` with the reason alone; whoever knows the picture adds its path and quarantines it.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator, Sequence

from flux2_core.config.dataset import Data, replaced
from flux2_core.data.sources.walls import CAPTION_BYTES, CAPTION_TOO_LARGE
from flux2_core.data.words import mentions, resolve
from flux2_core.errors import DataError

_FOREIGN_BOMS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decode(data: bytes) -> str:
    """Text of a caption file: UTF-8, with or without a byte order mark; ends stripped, CRLF read as LF.

    Raises:
        DataError: another encoding, over 16 MiB, or what `clean` refuses.
    """
    if len(data) > CAPTION_BYTES:
        raise DataError(CAPTION_TOO_LARGE)
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


def listed(value: object, *, lines: bool) -> list[str]:
    """The captions in what a layout brings, cleaned, without blank ones: a text, its lines, or a list of texts.

    Raises:
        DataError: it is anything else, or `clean` refuses a text.
    """
    if isinstance(value, str):
        texts = clean(value).split("\n") if lines else [value]
    elif value is None or isinstance(value, list):
        texts = [text for text in value or () if text is not None]
    else:
        raise DataError(f"its caption is {type(value).__name__}, not a string or a list of strings")
    if odd := [text for text in texts if not isinstance(text, str)]:
        raise DataError(f"its caption is a list with {type(odd[0]).__name__} in it, not of strings alone")
    return [text for text in map(clean, texts) if not blank(text)]


def prepare(texts: Sequence[str], data: Data) -> tuple[tuple[str, ...], bool]:
    """Captions as training sees them, each once, and whether the trigger was put in front of one.

    They are edited and their placeholders expanded; where a caption then does not mention the trigger it becomes
    `trigger, caption`; its shuffles follow behind all captions. A regularisation set has no trigger.

    Raises:
        DataError: a placeholder has no word.
    """
    trigger = None if data.regularisation else data.trigger
    edited = [edit(text, data) for text in texts]
    resolved = [resolve(text, trigger=trigger, class_name=data.class_name) for text in edited]
    if trigger is None or not data.inject_trigger:
        full = resolved
    else:
        full = [text if mentions(text, trigger) else f"{trigger}, {text}" if text else trigger for text in resolved]
    more = (other for text in full for other in shuffles(text, data.caption_shuffles))
    return tuple(dict.fromkeys([*full, *more])), full != resolved


def edit(text: str, data: Data) -> str:
    """A caption after `caption_edits`, each on what the one before it left."""
    for find, put in data.caption_edits:
        text = replaced(find, put, text)
    return text.strip()


def shuffles(text: str, count: int) -> Iterator[str]:
    """Up to `count` other orders of the caption's comma-separated parts, the first part staying, no order twice.

    The k-th order is a function of the text and k alone: not of paths, of other captions or of `count`.
    """
    parts = [part for part in map(str.strip, text.split(",")) if part]
    first, rest = parts[:1], parts[1:]
    seen, digest = {tuple(rest)}, hashlib.sha256(text.encode()).digest()
    for k in range(1, count + 1):
        ranks = [hashlib.sha256(digest + f"shuffle {k} part {place}".encode()).digest() for place in range(len(rest))]
        order = tuple(part for _, part in sorted(zip(ranks, rest, strict=True)))
        if order not in seen:
            seen.add(order)
            yield ", ".join((*first, *order))
