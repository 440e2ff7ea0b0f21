"""Rows of the samples table: what one picture gives, variant by variant, and which latents rows each of them needs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import pyarrow as pa

from flux2_core.config.dataset import Data
from flux2_core.data.pictures import load
from flux2_core.data.pictures.buckets import CENTRE, own_aspect, place
from flux2_core.data.pictures.transform import Transform
from flux2_core.data.scan import Candidate
from flux2_core.data.sources.read import plain
from flux2_core.data.texts import of_sample
from flux2_core.store.schemas import LATENT_KEY, MASK, REFERENCES, REJECTED, SHA256, TRAIN, URI, of_samples

AT_ONCE = 4096  # rows of a table that are Python objects at a time
TRANSFORM = tuple(field.name for field in fields(Transform))


@dataclass(frozen=True)
class Keys:
    """How the keys of rows are made."""

    text: Callable[[str], str]
    latent: Callable[[str, Transform], str]
    mask: Callable[[str, Transform], str]


@dataclass(frozen=True)
class Picture:
    """A candidate with what was seen in its file, its mask's, its references' and that of its rejected partner."""

    candidate: Candidate
    seen: load.Inspected
    mask: load.Inspected | None
    references: tuple[load.Inspected, ...]
    rejected: load.Inspected | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the oriented picture."""
        return self.seen.width, self.seen.height


def rows(
    picture: Picture,
    variants: list[tuple[int, Transform]],
    data: Data,
    *,
    name: str,
    ordinal: int,
    split: str,
    keys: Keys,
) -> Iterator[dict[str, Any]]:
    """One row per (resolution, transform) of a picture; variants are numbered in their order."""
    seen, texts = picture.seen, list(picture.candidate.captions)
    of_picture = {
        "id": name,
        "uri": picture.candidate.path,
        "sha256": seen.sha256,
        "width": seen.width,
        "height": seen.height,
        "captions": texts,
        "text_keys": [keys.text(caption) for caption in texts],
        "roles": [{"role": role, "text": text, "key": keys.text(text)} for role, text in of_sample(data, texts)],
        "dataset": ordinal,
        "repeats": data.repeats,
        "weight": data.weight,
        "regularisation": bool(data.regularisation),
        "split": split,
    }
    for variant, (side, transform) in enumerate(variants):
        yield (
            of_picture
            | {
                "variant": variant,
                "latent_key": keys.latent(seen.sha256, transform),
                **vars(transform),
                "mask": _mask(picture, transform, keys=keys),
                "references": list(_references(picture, side, transform, size=data.reference_size, keys=keys)),
                "pixels_lost": transform.pixels_lost,
            }
            | ({REJECTED: _rejected(picture, transform, keys=keys)} if picture.rejected else {})
        )


def unpictured(data: Data, text: str, *, ordinal: int, keys: Keys) -> Iterator[dict[str, Any]]:
    """A row for each resolution of a data set without pictures: a size and a caption, for a method that draws."""
    for side in data.resolutions:
        yield {
            "id": f"{side}px", "uri": "", "sha256": hashlib.sha256(f"no picture {side}".encode()).hexdigest(),
            "width": side, "height": side, "captions": [text], "text_keys": [keys.text(text)], "roles": [],
            "dataset": ordinal, "repeats": data.repeats, "weight": data.weight, "regularisation": False,
            "split": TRAIN, "variant": 0, "latent_key": None, **vars(Transform(side, side, side, side, 0, 0)),
            "mask": None, "references": [], "pixels_lost": 0.0,
        }  # fmt: skip


def _mask(picture: Picture, transform: Transform, *, keys: Keys) -> dict[str, str] | None:
    if picture.mask is None or picture.candidate.mask is None:
        return None
    sha256 = picture.mask.sha256
    return {"uri": picture.candidate.mask, "sha256": sha256, "latent_key": keys.mask(sha256, transform)}


def _references(
    picture: Picture, side: int, target: Transform, *, size: Literal["target"] | int | None, keys: Keys
) -> Iterator[dict[str, Any]]:
    """References of a sample at one resolution, which are turned as it is."""
    area = reference_area(size, side, target.bucket_height * target.bucket_width)
    for uri, seen in zip(picture.candidate.references, picture.references, strict=True):
        transform = replace(reference_transform(seen, area, enlarged=size == "target"), flip=target.flip)
        key = keys.latent(seen.sha256, transform)
        yield {"uri": uri, "sha256": seen.sha256, "latent_key": key, **vars(transform)}


def reference_area(size: Literal["target"] | int | None, side: int, target: int) -> int:
    """Pixels of a reference by `data[].reference_size`, beside a picture of so many pixels at a resolution."""
    return target if size == "target" else (size or side) ** 2


def reference_transform(seen: load.Inspected, area: int, *, enlarged: bool = False) -> Transform:
    """A reference in its own aspect ratio, of about so many pixels; `enlarged` even where it has fewer."""
    grown = max(1.0, math.sqrt(area / (seen.width * seen.height))) if enlarged else 1.0
    width, height = math.ceil(seen.width * grown), math.ceil(seen.height * grown)
    size = own_aspect(width, height, min(area, width * height))
    assert size is not None  # `_beside_problem` refused those under 16 px
    return place(seen.width, seen.height, size)


def _rejected(picture: Picture, transform: Transform, *, keys: Keys) -> dict[str, Any]:
    """The worse picture, cut as the better one is: in its bucket, the same share of it cut away, or its middle."""
    uri, seen = picture.candidate.rejected, picture.rejected
    assert uri is not None
    assert seen is not None
    down, across = transform.resize_height - transform.bucket_height, transform.resize_width - transform.bucket_width
    at = transform.crop_top / down if down else CENTRE[0], transform.crop_left / across if across else CENTRE[1]
    fitted = place(seen.width, seen.height, (transform.bucket_height, transform.bucket_width), at=at)
    fitted = replace(fitted, flip=transform.flip)
    return {"uri": uri, "sha256": seen.sha256, "latent_key": keys.latent(seen.sha256, fitted), **vars(fitted)}


def needed_rows(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(words before a reason, key) of each latents row that a samples row needs."""
    if row[LATENT_KEY] is not None:
        yield "", row[LATENT_KEY]
    if row[MASK] is not None:
        yield f"mask {row[MASK][URI]}: ", row[MASK][LATENT_KEY]
    for reference in row[REFERENCES]:
        yield f"reference {reference[URI]}: ", reference[LATENT_KEY]
    if row.get(REJECTED) is not None:
        yield f"rejected {row[REJECTED][URI]}: ", row[REJECTED][LATENT_KEY]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A latents row to be made: its key, the file, that file's hash, the transform, and whether it is of a mask."""

    key: str
    uri: str
    sha256: str
    transform: Transform
    mask: bool

    def __str__(self) -> str:
        return plain(self.uri)


def wanted(samples: pa.Table) -> dict[str, Wanted]:
    """By key, each latents row that a samples table needs: of its pictures and of all that they have beside them."""
    found: dict[str, Wanted] = {}
    alike: dict[Transform, Transform] = {}  # a million pictures have a few thousand
    columns = [URI, SHA256, LATENT_KEY, *TRANSFORM, MASK, REFERENCES, REJECTED]
    needed = samples.select(of_samples(columns, samples.column_names)).filter(samples.column(LATENT_KEY).is_valid())
    for batch in needed.to_batches(max_chunksize=AT_ONCE):
        for row in batch.to_pylist():
            rejected = row.get(REJECTED)
            for source in (row, *row[REFERENCES], *([rejected] if rejected else [])):
                found.setdefault(source[LATENT_KEY], _wanted(source, source, alike, mask=False))
            if row[MASK] is not None:
                found.setdefault(row[MASK][LATENT_KEY], _wanted(row[MASK], row, alike, mask=True))
    return found


def _wanted(source: dict[str, Any], cut: dict[str, Any], alike: dict[Transform, Transform], *, mask: bool) -> Wanted:
    transform = Transform(**{name: cut[name] for name in TRANSFORM})
    return Wanted(source[LATENT_KEY], source[URI], source[SHA256], alike.setdefault(transform, transform), mask)
