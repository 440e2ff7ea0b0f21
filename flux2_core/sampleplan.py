"""The sample plan: every picture becomes rows of the samples table, or one row of quarantine with its reason."""

from __future__ import annotations

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa

from flux2_core import captions, images
from flux2_core.buckets import Transform, buckets, fit
from flux2_core.config import Config, Data
from flux2_core.dataset import Candidate, Note, Rejected, scan
from flux2_core.tables import TRAIN, VALIDATION, quarantine_schema, samples_schema

Item = TypeVar("Item")
Result = TypeVar("Result")
Mapper = Callable[[Callable[[str], images.Inspected], list[str]], Iterable[images.Inspected]]

DECODE_UP_TO = 2_000
MIN_FOR_VALIDATION = 20
LISTED = 10
NOTABLE_LOSS = 0.25


@dataclass(frozen=True)
class SamplePlan:
    """Rows of both tables (schemas of `flux2_core.tables`) and what a person should know."""

    samples: pa.Table
    quarantine: pa.Table
    warnings: list[str]


@dataclass
class _Draft:
    """What is collected while building: rows, quarantine, and for each message the paths it is about."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    notes: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def leave_out(self, path: str, reason: str, ordinal: int) -> None:
        self.quarantine.append({"path": path, "reason": reason, "dataset": ordinal})


@dataclass(frozen=True)
class _Picture:
    """A picture that is kept: unique id, its candidate, what was seen in the file, one transform per resolution."""

    id: str
    candidate: Candidate
    seen: images.Inspected
    transforms: tuple[Transform, ...]


def threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map` over threads of this process, results in order; hashing and decoding release Python's lock."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(function, items)


def build(
    config: Config,
    *,
    text_key: Callable[[str], str],
    latent_key: Callable[[str, Transform], str],
    mapper: Mapper = threads,
    decode: bool | None = None,
) -> SamplePlan:
    """Scan, inspect, fit and split all data sets of a configuration.

    Args:
        config: Its `data`, and `validate.held_out`.
        text_key: Key of a resolved caption's row.
        latent_key: Key of a latent row, from the sha256 of the file and the transform.
        mapper: Like `map`, in order; given a picklable function from path to `images.Inspected`.
        decode: Decode every picture; None leaves it to each `data.check_images`.

    Returns:
        One row per (picture, resolution that it is large enough for), numbered by `variant` from 0 in the order of
        `data.resolutions`; pictures in the order of data sets, then of their paths.

    Raises:
        DataError: a data set is missing, empty, or has unreadable metadata.
    """
    draft = _Draft()
    taken: set[str] = set()
    for ordinal, data in enumerate(config.data):
        candidates = _scan(data, ordinal=ordinal, draft=draft)
        pictures = _inspect(candidates, data, ordinal=ordinal, mapper=mapper, decode=decode, draft=draft, taken=taken)
        held_out = _held_out(pictures, config.validation.held_out)
        for picture in pictures:
            split = VALIDATION if picture.id in held_out else TRAIN
            draft.rows += _rows(picture, data, ordinal=ordinal, split=split, text_key=text_key, latent_key=latent_key)
        _note_trigger(pictures, data, draft=draft)
    _note_duplicates(draft)
    return SamplePlan(
        samples=pa.Table.from_pylist(draft.rows, schema=samples_schema()),
        quarantine=pa.Table.from_pylist(draft.quarantine, schema=quarantine_schema()),
        warnings=[_warning(message, paths) for message, paths in draft.notes.items()],
    )


def refusal(config: Config, plan: SamplePlan) -> str | None:
    """Why the run must not start: nothing kept, or more than `max_quarantined` left out; None when it may."""
    ids = plan.samples.column("id").to_pylist()
    kept = len(set(ids))
    left_out = plan.quarantine.to_pylist()
    share = len(left_out) / max(1, kept + len(left_out))
    if kept and share <= config.max_quarantined:
        return None
    listed = [f"  {row['path']}: {row['reason']}" for row in left_out[:LISTED]]
    if len(left_out) > LISTED:
        listed.append(f"  ... and {len(left_out) - LISTED} more")
    if not kept:
        head = "no picture can be used"
    else:
        head = (
            f"{len(left_out)} of {kept + len(left_out)} pictures ({share:.1%}) are quarantined, allowed are "
            f"{config.max_quarantined:.1%}: mend or remove them, or raise max_quarantined"
        )
    return "\n".join([head, *listed])


def _scan(data: Data, *, ordinal: int, draft: _Draft) -> list[Candidate]:
    candidates = []
    for found in scan(data, ordinal=ordinal):
        if isinstance(found, Rejected):
            draft.leave_out(found.path, found.reason, ordinal)
        elif isinstance(found, Note):
            draft.notes[found.message].append(found.path)
        else:
            candidates.append(found)
    return candidates


def _inspect(
    candidates: list[Candidate],
    data: Data,
    *,
    ordinal: int,
    mapper: Mapper,
    decode: bool | None,
    draft: _Draft,
    taken: set[str],
) -> list[_Picture]:
    if decode is None:
        decode = data.check_images
    if decode is None:
        decode = len(candidates) <= DECODE_UP_TO
        if not decode:
            message = f"{len(candidates)} pictures, only headers read: data.{ordinal}.check_images=true decodes all"
            draft.notes[message].append(data.path)
    inspected = mapper(partial(images.inspect, decode=decode), [candidate.path for candidate in candidates])
    pictures = []
    for candidate, seen in zip(candidates, inspected, strict=True):
        transforms, problem = ((), seen.problem) if seen.problem else _fit_all(candidate, seen, data, draft=draft)
        if problem:
            draft.leave_out(candidate.path, problem, ordinal)
            continue
        for message in seen.warnings:
            draft.notes[message].append(candidate.path)
        pictures.append(_Picture(_unique(candidate.id, ordinal, taken), candidate, seen, transforms))
    return pictures


def _fit_all(
    candidate: Candidate, seen: images.Inspected, data: Data, *, draft: _Draft
) -> tuple[tuple[Transform, ...], str | None]:
    fits = {side: fit(seen.width, seen.height, side) for side in data.resolutions}
    transforms = tuple(transform for transform in fits.values() if transform is not None)
    if not transforms:
        least = min(data.resolutions)
        shortest = min(min(bucket) for bucket in buckets(least))
        return (), (
            f"too small: {seen.width}x{seen.height} px fits no bucket of the smallest resolution {least} without "
            f"being enlarged (a square needs {least}x{least} px, no side may be under {shortest} px)"
        )
    for side, transform in fits.items():
        if transform is None:
            draft.notes[f"too small for resolution {side}: used at the smaller ones only"].append(candidate.path)
    if max(transform.pixels_lost for transform in transforms) > NOTABLE_LOSS:
        draft.notes[f"the crop cuts away more than {NOTABLE_LOSS:.0%} of the picture"].append(candidate.path)
    return transforms, None


def _unique(sample_id: str, ordinal: int, taken: set[str]) -> str:
    """Ids are unique over all data sets: the second data set's `a` becomes `a@1` when the first has an `a`."""
    while sample_id in taken:
        sample_id += f"@{ordinal}"
    taken.add(sample_id)
    return sample_id


def _held_out(pictures: list[_Picture], share: float) -> set[str]:
    """Ids of the floor(n * share) pictures whose content hashes lowest: more pictures move only the border."""
    if len(pictures) < MIN_FOR_VALIDATION:
        return set()
    count = math.floor(len(pictures) * share + 1e-9)  # 100 * 0.29 is 28.999999999999996

    def rank(picture: _Picture) -> tuple[bytes, str]:
        return hashlib.sha256(b"validation split\0" + picture.seen.sha256.encode()).digest(), picture.id

    return {picture.id for picture in sorted(pictures, key=rank)[:count]}


def _rows(
    picture: _Picture,
    data: Data,
    *,
    ordinal: int,
    split: str,
    text_key: Callable[[str], str],
    latent_key: Callable[[str, Transform], str],
) -> Iterator[dict[str, Any]]:
    seen = picture.seen
    for variant, transform in enumerate(picture.transforms):
        yield {
            "id": picture.id,
            "variant": variant,
            "uri": picture.candidate.path,
            "sha256": seen.sha256,
            "width": seen.width,
            "height": seen.height,
            "captions": list(picture.candidate.captions),
            "text_keys": [text_key(caption) for caption in picture.candidate.captions],
            "latent_key": latent_key(seen.sha256, transform),
            **vars(transform),
            "dataset": ordinal,
            "repeats": data.repeats,
            "weight": 1.0,
            "regularisation": False,
            "split": split,
            "pixels_lost": transform.pixels_lost,
        }


def _note_trigger(pictures: list[_Picture], data: Data, *, draft: _Draft) -> None:
    if data.trigger is None:
        return
    for picture in pictures:
        if not any(captions.mentions(caption, data.trigger) for caption in picture.candidate.captions):
            draft.notes[f"the caption does not contain the trigger {data.trigger!r}"].append(picture.candidate.path)


def _note_duplicates(draft: _Draft) -> None:
    paths_of: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for row in draft.rows:
        paths_of[row["sha256"]][row["id"]] = row["uri"]
    for paths in paths_of.values():
        if len(paths) > 1:
            draft.notes["the same bytes as another picture: kept, one latent row"] += list(paths.values())


def _warning(message: str, paths: list[str]) -> str:
    if len(paths) == 1:
        return f"{paths[0]}: {message}"
    return f"{len(paths)} pictures: {message} (first: {paths[0]})"
