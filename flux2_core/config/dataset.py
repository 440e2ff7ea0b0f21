"""A data set of the configuration: where pictures and captions are, and what training sees of each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from flux2_core.config.objective import Noise
from flux2_core.config.places import COLUMN, Place
from flux2_core.config.section import Natural, Positive, Section, Share

CAPTION_SOURCES = ("auto", "textfile", "lines", "metadata", "filename")
MOST_REFERENCES = 10


def pattern(text: str) -> re.Pattern[str]:
    """What a text of `caption_edits` or `skip_captions` finds: itself, or between slashes a regular expression."""
    whole = len(text) > 2 and text[0] == text[-1] == "/"
    return re.compile(text[1:-1] if whole else re.escape(text))


def replaced(find: str, put: str, text: str) -> str:
    """The text with what is found replaced; in an expression's replacement `\\1` is a group."""
    found = pattern(find)
    return found.sub(put if found.pattern != re.escape(find) else lambda _: put, text)


class Data(Section):
    """`[[data]]`: a set of pictures, how its captions are found, and what training sees of each picture."""

    path: Annotated[str, Place.HERE]
    """A folder (or `s3://bucket/prefix`) of pictures with `.txt` sidecars or `metadata.jsonl` / `.csv` / `.parquet`
    (`file_name`, `text`), of Parquet files with picture bytes, or of WebDataset `.tar` files; or one such file; or a
    `.lance` table."""
    caption: str = "auto"
    """`textfile`, `lines` (each line of the text file is a caption of its own), `metadata`, `column:NAME` (of the
    metadata, Parquet or Lance columns), `filename`, `auto` (what the layout brings), or a caption for every picture:
    any text with a space or a `[trigger]` in it."""
    default_caption: str | None = None
    """Caption of a picture that has none; without it such a picture is quarantined."""
    caption_edits: tuple[tuple[str, str], ...] = ()
    """Replacements in captions, one after the other: `[["img_", ""], ["/(?i)photo of an? /", "[trigger], "]]`; between
    slashes is a regular expression, whose groups are `\\1` and so on. Done before placeholders become words."""
    skip_captions: tuple[str, ...] = ()
    """Pictures with one of these texts, or `/regular expressions/`, in a caption are left out; `plan` counts them."""
    caption_shuffles: Natural = 0
    """So many further captions per caption, its comma-separated parts in a seeded order, the first part staying."""
    trigger: str | None = None
    """Word that calls the new concept: `[trigger]` and `[name]` in captions and in `validate.prompts` become it."""
    inject_trigger: bool = True
    """Put the trigger in front of a caption that does not mention it; `plan` says how many."""
    class_name: str | None = None
    """What the concept is an instance of ("a teapot"): `[class]` becomes it, and preservation puts it in the
    trigger's place."""
    resolutions: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1024,)
    """Side lengths in pixels: a picture is trained in the bucket of each that has about side * side pixels and its
    own aspect ratio, wherever it is large enough."""
    upscale: bool = False
    """Enlarge pictures that are too small for a resolution instead of leaving them out of it."""
    min_size: Natural = 0
    """Pictures with a shorter side under so many pixels are left out."""
    max_size: Positive | None = None
    """Pictures with a longer side over so many pixels are left out."""
    crop: Literal["center", "corner", "random"] = "center"
    """Where the bucket is cut out of the picture."""
    crop_variants: Positive = 1
    """Seeded random crops per picture and resolution, each cached; needs `crop = "random"`."""
    crop_aspect: Literal["closest", "square", "preserve"] = "closest"
    """`closest`: the bucket with the nearest aspect ratio. `square`: only the square one. `preserve`: the picture's
    own aspect ratio to the nearest 16 px, no bucket list."""
    bucket_min: Positive = 1
    """Buckets with fewer pictures than this are merged into the nearest larger one."""
    flip: bool = False
    """Add every picture mirrored, as a variant of its own."""
    masks: Annotated[str | None, Place.BESIDE] = None
    """Folder of masks, by the pictures' names: white is learned, black is not."""
    references: Annotated[tuple[str, ...], Place.BESIDE] = ()
    """Up to 10 folders of reference (edit) pictures, by the pictures' names; the model sees them beside the prompt. A
    picture has those that exist, in the folders' order, and must have one."""
    reference_size: Literal["target"] | Annotated[int, Field(ge=16)] | None = None
    """Size of references, each in its own aspect ratio: `target`, as many pixels as the picture's bucket has, enlarged
    too (AI Toolkit's `match_target_res`); or a side length, never enlarged; unset: the side is the resolution."""
    drop_references: Share = 0.0
    """Share of batches that are trained without their references, for the words alone to keep a meaning."""
    preferred: Annotated[str | None, Place.HERE] = None
    """In place of `path`: a folder of pictures that are better than those of `rejected`, and have the captions. Or
    `column:NAME` of the better picture, among the Parquet, Lance or metadata columns of `path`."""
    rejected: Annotated[str | None, Place.BESIDE] = None
    """A folder of worse pictures, by the better ones' names, or `column:NAME`: the model learns to prefer the better of
    each pair, by `loss.preference_beta`. The worse one is cut as the better one is, and has its mask and references."""
    repeats: Positive = 1
    """How often each picture is seen per epoch."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the loss of this data set."""
    steps: tuple[Positive, Positive] | None = None
    """First and last step that draws from this data set, of `train.steps`; unset: all of them. A curriculum."""
    noise: Noise | None = None
    """Noise levels of this data set, where they differ: a table of keys of `[noise]`, which holds for the others."""
    regularisation: Literal["prior"] | bool = False
    """Pictures of the class, not of the concept: no trigger is put into their captions, none are held out. `prior`:
    learn what the base model predicts for them instead, so that their own look stays out, for one more pass without the
    adapter a step."""
    check_images: bool | None = None
    """Decode every picture in `plan` (true), only read headers (false), or decode up to 2,000 pictures (unset)."""

    @model_validator(mode="before")
    @classmethod
    def _preferred_place(cls, tree: Any) -> Any:
        """A folder of preferred pictures is the data set's path."""
        folder = isinstance(tree, dict) and tree.get("preferred")
        return {"path": folder} | tree if isinstance(folder, str) and not folder.startswith(COLUMN) else tree

    @field_validator("resolutions")
    @classmethod
    def _sixteens(cls, sides: tuple[int, ...]) -> tuple[int, ...]:
        for side in sides:
            if side != (under := side // 16 * 16):
                raise ValueError(f"{side} is not a multiple of 16; {under or 16} and {under + 16} are")
        if len(set(sides)) != len(sides):
            raise ValueError(f"{list(sides)} names a resolution twice")
        return sides

    @field_validator("caption")
    @classmethod
    def _caption(cls, source: str) -> str:
        if source in CAPTION_SOURCES or {*source} & {" ", "["} or source.removeprefix(COLUMN) not in ("", source):
            return source
        raise ValueError(
            f"{source!r} is neither one of {', '.join(CAPTION_SOURCES)}, {COLUMN}NAME nor a caption, "
            "which has a space or [trigger] in it"
        )

    @field_validator("caption_edits", "skip_captions")
    @classmethod
    def _patterns(cls, given: tuple[Any, ...]) -> tuple[Any, ...]:
        for one in given:
            text, put = (one, "") if isinstance(one, str) else one
            if not text:
                raise ValueError("an empty text is everywhere: say what to look for")
            try:
                replaced(text, put, "")
            except re.error as error:
                raise ValueError(f"{text} is not a regular expression ({error})") from None
        return given

    @field_validator("steps")
    @classmethod
    def _in_order(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps is not None and steps[0] > steps[1]:
            raise ValueError(f"{list(steps)}: the first step comes first")
        return steps

    @field_validator("references")
    @classmethod
    def _at_most_ten(cls, folders: tuple[str, ...]) -> tuple[str, ...]:
        if len(folders) > MOST_REFERENCES:
            raise ValueError(f"{len(folders)} folders; FLUX.2 takes up to {MOST_REFERENCES} reference pictures")
        return folders

    @field_validator("trigger", "class_name")
    @classmethod
    def _a_word(cls, word: str | None) -> str | None:
        if word is not None and not word.strip():
            raise ValueError("empty: name a word, or leave the key out")
        return word

    @model_validator(mode="after")
    def _fitting(self) -> Data:
        if self.crop_variants > 1 and self.crop != "random":
            raise ValueError(f'crop_variants={self.crop_variants} needs crop="random": other crops are all the same')
        if self.max_size is not None and self.max_size < self.min_size:
            raise ValueError(f"max_size={self.max_size} is under min_size={self.min_size}: no picture would be left")
        if self.regularisation and self.masks:
            raise ValueError("masks say where a concept is; a regularisation set has none: remove masks")
        self._paired()
        return self

    @staticmethod
    def column(place: str | None) -> str | None:
        """The column that `preferred` or `rejected` names; None for a folder."""
        return place.removeprefix(COLUMN) if place and place.startswith(COLUMN) else None

    def _paired(self) -> None:
        columns = [(name or "").startswith(COLUMN) for name in (self.preferred, self.rejected)]
        if self.preferred and not self.rejected:
            raise ValueError(f"preferred={self.preferred!r} without rejected: say where the worse pictures are")
        if self.preferred and columns[0] != columns[1]:
            raise ValueError("preferred and rejected are either two folders or two columns of path")
        if self.preferred and not columns[0] and self.preferred != self.path:
            raise ValueError(
                f"path={self.path!r} and preferred={self.preferred!r}: a folder of preferred pictures "
                "stands in place of path, leave that out"
            )
        if self.rejected and not columns[1] and self.rejected == self.path:
            raise ValueError(f"rejected={self.rejected!r} holds the preferred pictures themselves")
        if self.rejected and self.regularisation:
            raise ValueError("a regularisation set is what the model keeps, pairs are what it learns: remove rejected")


def uncovered(sets: Sequence[Data], steps: int) -> int | None:
    """The first of so many steps from which no data set is drawn; None where there is none."""
    reached = 0
    for first, last in sorted(one.steps or (1, steps) for one in sets):
        if first <= reached + 1:
            reached = max(reached, last)
    return reached + 1 if reached < steps else None
