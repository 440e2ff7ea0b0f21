"""Words of captions and prompts: placeholders become the trigger and the class, each as a word of its own."""

from __future__ import annotations

import difflib
import re

from flux2_core.config.sections import Config
from flux2_core.errors import DataError, UsageError

ALIKE = 0.82  # of the letters of a misspelt placeholder: `triger`, `names`, `Class`, and not `glass`
_KNOWN = ("trigger", "name", "class")
_WORDS = "|".join(_KNOWN)
_PLACEHOLDER = re.compile(rf"(?P<before>\w?)\[(?P<what>{_WORDS})\](?=(?P<after>\w|\[(?:{_WORDS})\])?)")


def resolve(text: str, *, trigger: str | None, class_name: str | None = None) -> str:
    """Expand `[trigger]` and `[name]` (both the trigger) and `[class]` in one pass, each as a word of its own.

    A letter or digit that touches a placeholder is parted from it by a space: `a[trigger]s` is `a sks s`, never
    `askss`. What is inserted is not expanded again. A caption without a placeholder is returned as it is.

    Raises:
        DataError: a placeholder stands in the text and there is no word for it.
    """

    def word(match: re.Match[str]) -> str:
        found, setting = (class_name, "class_name") if match["what"] == "class" else (trigger, "trigger")
        if found is None:
            raise DataError(
                f"[{match['what']}] stands in the text, but no {setting} is set: set data.N.{setting} "
                "(a regularisation set has no trigger)"
            )
        before = match["before"] + " " if match["before"] else ""
        return before + found + (" " if match["after"] else "")

    return _PLACEHOLDER.sub(word, text)


def resolve_prompt(text: str, config: Config) -> str:
    """A preview prompt with the trigger and the class of the first data set in place.

    Raises:
        DataError: a placeholder stands in it and there is no word for it.
        UsageError: something nearly a placeholder stands in it.
    """
    for what in re.findall(r"\[(\w+)\]", text):
        if what not in _KNOWN and (near := difflib.get_close_matches(what.lower(), _KNOWN, n=1, cutoff=ALIKE)):
            raise UsageError(f"[{what}] is no placeholder and would be drawn as it stands: did you mean [{near[0]}]?")
    return resolve(text, trigger=config.trigger, class_name=config.data[0].class_name)


def mentions(text: str, word: str) -> bool:
    """Whether `word` stands in the text at word boundaries ("risks" does not mention "sks")."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def exchange(text: str, word: str, other: str) -> str:
    """`text` with every `word` at word boundaries replaced by `other` ("risks of sks" keeps its "risks")."""
    return re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", lambda _: other, text)
