"""A data set: its pictures, each with an id, its captions as training sees them, and what belongs to it by name.

What cannot be used is yielded as `Rejected` with its reason, what is only worth knowing as `Note`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from flux2_core.config.dataset import CAPTION_SOURCES, MOST_REFERENCES, Data
from flux2_core.config.places import COLUMN, beside
from flux2_core.data import captions, layouts
from flux2_core.data.layouts import Found
from flux2_core.data.listing import Listing, Note, Rejected, list_below
from flux2_core.data.sources.read import plain
from flux2_core.errors import DataError

NO_MASK = "it has no mask: the whole picture is learned"


@dataclass(frozen=True, slots=True)
class Candidate:
    """What promises to be a picture, with its resolved captions; `id` is unique within the data set.

    `path`, `mask`, `references` and `rejected` are URIs for `sources.read`; without a mask all of a picture is learned.
    """

    id: str
    path: str
    captions: tuple[str, ...]
    mask: str | None = None
    references: tuple[str, ...] = ()
    injected: bool = False
    """Whether the trigger was put in front of a caption."""
    rejected: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """The URIs of the picture, of its mask if it has one, of its references, and of its rejected partner if any."""
        mask, rejected = ((one,) if one is not None else () for one in (self.mask, self.rejected))
        return (self.path, *mask, *self.references, *rejected)


@dataclass(frozen=True)
class _Beside:
    """A folder whose pictures belong to those of the data set by name."""

    setting: str
    listing: Listing
    by_stem: dict[str, list[str]]


def scan(data: Data, *, ordinal: int) -> Iterator[Candidate | Rejected | Note]:
    """Everything below `data.path` that is, or should be, a picture with a caption, in sorted order.

    Args:
        data: One `[[data]]` section.
        ordinal: Its place in the configuration, for messages.

    Raises:
        DataError: a folder is missing, holds no picture or a mixture of layouts, or what it holds cannot be read.
    """
    place = f"data.{ordinal}.path={data.path!r}"
    named: dict[str, str] = {f"references.{number}": folder for number, folder in enumerate(data.references)}
    named |= {key: folder for key in ("masks", "rejected") if (folder := getattr(data, key))}
    named = {key: beside(data.path, folder) for key, folder in named.items() if not folder.startswith(COLUMN)}
    listing = list_below(data.path, named=place, apart=named.values())
    layout = layouts.layout_of(listing, data, place=place)
    folders = {key: _folder(f"data.{ordinal}.{key}", folder) for key, folder in named.items()}
    masks = folders.get("masks")
    items = list(layouts.find(listing, layout, data))
    found = [item for item in items if isinstance(item, Found)]
    if not found and not any(isinstance(item, Rejected) for item in items):
        raise DataError(f"{place}: no pictures in it; put JPEG, PNG or WebP files there")
    if masks and found and masks.by_stem.keys().isdisjoint(os.path.splitext(item.name)[0] for item in found):
        raise DataError(f"{masks.setting}={masks.listing.root!r}: no mask there has the name of a picture")
    if not data.references and not any(item.references for item in found):
        for key in ("drop_references", "reference_size"):
            if value := getattr(data, key):
                told = f"data.{ordinal}.{key}={value!r}: no picture has a reference"
                raise DataError(f"{told}; set data.{ordinal}.references to their folders, or leave it out")
    id_of = _ids(found, root=listing.root)
    for item in items:
        if isinstance(item, Found):
            yield from _made(item, id_of(item), data=data, folders=folders)
        else:
            yield item


def _folder(setting: str, path: str) -> _Beside:
    listing = list_below(path, named=f"{setting}={path!r}")
    by_stem: dict[str, list[str]] = {}
    for name in listing.pictures:
        by_stem.setdefault(os.path.splitext(name)[0], []).append(name)
    return _Beside(setting, listing, by_stem)


def _ids(found: list[Found], *, root: str) -> Callable[[Found], str]:
    """The name without its extension where only one picture has it; else the name; else the place in its container."""
    names = Counter(item.name for item in found)
    stems = Counter(os.path.splitext(item.name)[0] for item in found)

    def id_of(item: Found) -> str:
        stem = os.path.splitext(item.name)[0]
        if item.name and stems[stem] == 1 and stem not in names:
            return stem
        return item.name if item.name and names[item.name] == 1 else plain(item.uri).removeprefix(f"{root}/")

    return id_of


def _made(
    item: Found, sample_id: str, *, data: Data, folders: Mapping[str, _Beside]
) -> Iterator[Candidate | Rejected | Note]:
    masks, worse = folders.get("masks"), folders.get("rejected")
    try:
        texts, injected = captions.prepare(_texts(item, data), data)
        mask = item.mask or (_named(masks, item.name) if masks else None)
        references = [folder for key, folder in folders.items() if key.startswith("references")]
        seen_too = item.references or _references(references, item.name)
        rejected = item.rejected or (_partner(worse, item.name, "rejected picture") if worse else None)
        if data.rejected and rejected is None:
            raise DataError(f"its row names no rejected picture in {data.rejected}")
        if len(seen_too) > MOST_REFERENCES:
            raise DataError(f"{len(seen_too)} references; FLUX.2 takes up to {MOST_REFERENCES}")
    except DataError as error:
        yield Rejected(item.uri, str(error))
        return
    yield Candidate(sample_id, item.uri, texts, mask, seen_too, injected, rejected)
    if masks and mask is None:
        yield Note(item.uri, NO_MASK)
    if len(seen_too) < len(references) and not item.references:
        yield Note(item.uri, f"it has {len(seen_too)} of {len(references)} references: it is trained with those")


def _texts(item: Found, data: Data) -> list[str]:
    text = item.text
    if data.caption == "filename":
        text = PurePosixPath(item.name).stem.replace("_", " ") if item.name else None
    elif data.caption not in CAPTION_SOURCES and not data.caption.startswith(COLUMN):
        text = data.caption
    texts = captions.listed(text, lines=data.caption == "lines")
    if texts:
        return texts
    if data.default_caption is None:
        missing = "no caption: the row names no file" if data.caption == "filename" else item.missing
        raise DataError(missing if text is None else "its caption is blank; write one or set default_caption")
    return [captions.clean(data.default_caption)]


def _references(folders: list[_Beside], name: str) -> tuple[str, ...]:
    """The pictures with the same name, in the folders' order; a folder may have none, all of them may not."""
    found = tuple(uri for folder in folders if (uri := _named(folder, name)))
    if folders and not found:
        places = " nor ".join(f"{folder.setting}={folder.listing.root!r}" for folder in folders)
        places = f"neither {places}" if len(folders) > 1 else places
        raise DataError(f"{places} holds {'no' if len(folders) == 1 else 'a'} reference of its name")
    return found


def _partner(folder: _Beside, name: str, kind: str) -> str:
    found = _named(folder, name)
    if found is None:
        raise DataError(f"{folder.setting}={folder.listing.root!r} holds no {kind} of its name")
    return found


def _named(folder: _Beside, name: str) -> str | None:
    """The picture of a folder with the same name, or else the only one with the same base name."""
    there = folder.by_stem.get(os.path.splitext(name)[0], []) if name else []
    if name in there:
        return folder.listing.uri(name)
    if len(there) > 1:
        raise DataError(f"{folder.setting}: {' and '.join(there)} could both belong to it: keep one")
    return folder.listing.uri(there[0]) if there else None
