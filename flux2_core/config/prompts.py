"""A prompt that previews draw, with all that belongs to it alone."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from flux2_core.config.dataset import MOST_REFERENCES
from flux2_core.config.places import Place
from flux2_core.config.section import Section


class Prompt(Section):
    """`[[validate.prompt]]`: a prompt that is drawn beside those of `validate.prompts`, and after them."""

    text: str
    """What is drawn; `[trigger]` is that of the first data set."""
    references: Annotated[tuple[str, ...], Place.HERE, Field(max_length=MOST_REFERENCES)] = ()
    """Up to 10 pictures that the model sees beside the text, files or `s3://` addresses; `cache` encodes them, as large
    as references of the first data set are at the previews' size."""
