"""The sample plan: every picture becomes rows of the samples table, or one row of quarantine with its reason."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from flux2_core.config.sections import Config, Data
from flux2_core.data import captions
from flux2_core.data import samples as data_samples
from flux2_core.data.pictures import load
from flux2_core.data.pictures.buckets import CELL, Transform, choose, fits, places, transforms
from flux2_core.data.samples import AT_ONCE, Keys, Picture, needed_rows
from flux2_core.data.scan import Candidate, Note, Rejected, scan
from flux2_core.escape import visible
from flux2_core.store.schemas import (  # fmt: skip
    DATASET,
    ID,
    LATENT_KEY,
    MASK,
    REFERENCES,
    TRAIN,
    URI,
    VALIDATION,
    quarantine_schema,
    samples_schema,
)

Item = TypeVar("Item")
Result = TypeVar("Result")
Mapper = Callable[[Callable[[str], load.Inspected], list[str]], Iterable[load.Inspected]]

DECODE_UP_TO = 2_000
MIN_FOR_VALIDATION = 20
LISTED = 10
ROWS_AT_ONCE = 1_000
NOTABLE_LOSS = 0.25


@dataclass(frozen=True)
class SamplePlan:
    """Rows of both tables (schemas of `flux2_core.store.schemas`) and what a person should know.

    `excluded` has the quarantine's columns: sound pictures that `min_size` and `max_size` leave out.
    """

    samples: pa.Table
    quarantine: pa.Table
    warnings: list[str]
    excluded: pa.Table = field(default_factory=lambda: quarantine_schema().empty_table())
    looks: dict[str, bytes] = field(default_factory=dict)
    """How the decoded pictures look (`flux2_core.plan.doctor`), by sha256."""
    injected: Mapping[int, int] = field(default_factory=dict)
    """In how many pictures' captions of a data set the trigger was put."""


@dataclass
class _Draft:
    """What is collected while building: rows, what is left out, and for each message the paths it is about."""

    batches: list[pa.RecordBatch] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)  # not yet in a batch: columns take a tenth of the memory
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    excluded: list[dict[str, Any]] = field(default_factory=list)
    notes: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    taken: set[str] = field(default_factory=set)
    paths_of: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    looks: dict[str, bytes] = field(default_factory=dict)
    injected: Counter[int] = field(default_factory=Counter)

    def leave_out(self, path: str, reason: str, ordinal: int) -> None:
        self.quarantine.append({"path": path, "reason": reason, "dataset": ordinal})

    def exclude(self, path: str, reason: str, ordinal: int) -> None:
        self.excluded.append({"path": path, "reason": reason, "dataset": ordinal})
        self.notes[f"left out by wish, {reason}"].append(path)

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        self.rows += rows
        if len(self.rows) >= AT_ONCE:
            self.flush()

    def flush(self) -> None:
        self.batches.append(pa.RecordBatch.from_pylist(self.rows, schema=samples_schema()))
        self.rows = []


def threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map` over threads of this process, results in order; hashing and decoding release Python's lock."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(function, items)


def build(
    config: Config,
    *,
    text_key: Callable[[str], str],
    latent_key: Callable[[str, Transform], str],
    mask_key: Callable[[str, Transform], str],
    mapper: Mapper = threads,
    decode: bool | None = None,
) -> SamplePlan:
    """Scan, inspect, fit and split all data sets of a configuration.

    Args:
        config: Its `data`, `latents`, and `validate.held_out`.
        text_key: Key of a resolved caption's row.
        latent_key: Key of a picture's or reference's row, from the sha256 of the file and the transform.
        mask_key: The same of a mask's row.
        mapper: Like `map`, in order; given a picklable function from URI to `images.Inspected`.
        decode: Decode every picture; None leaves it to each `data.check_images`.

    Returns:
        One row per (picture, variant); variants are resolutions that it is large enough for x crops x flips, numbered
        from 0 in that order; pictures in the order of data sets, then of their paths.

    Raises:
        DataError: a data set is missing, empty, or has unreadable metadata.
    """
    draft, keys = _Draft(), Keys(text_key, latent_key, mask_key)
    for ordinal, data in enumerate(config.data):
        candidates = _scan(data, ordinal=ordinal, draft=draft)
        if decode is None:
            look = partial(load.inspect, decode=_decoded(data, len(candidates), ordinal, draft), latents=config.latents)
        else:
            look = partial(load.inspect, decode=decode, latents=config.latents)
        pictures = _kept(candidates, mapper(look, _uris(candidates)), data, ordinal=ordinal, draft=draft)
        held_out = set() if data.regularisation else _held_out(pictures, config.validation.held_out)
        for picture, placed in zip(pictures, places([picture.size for picture in pictures], data), strict=True):
            split = VALIDATION if picture.id in held_out else TRAIN
            variants = transforms(picture.size, placed, data=data, sha256=picture.seen.sha256)
            draft.add(data_samples.rows(picture, variants, data, ordinal=ordinal, split=split, keys=keys))
            _note(picture, placed, variants, data, draft=draft)
    draft.flush()
    for paths in draft.paths_of.values():
        if len(paths) > 1:
            draft.notes["the same bytes as another picture: kept, one latent row"] += paths
    return SamplePlan(
        samples=pa.Table.from_batches(draft.batches, schema=samples_schema()),
        quarantine=pa.Table.from_pylist(draft.quarantine, schema=quarantine_schema()),
        warnings=[_warning(message, paths) for message, paths in draft.notes.items()],
        excluded=pa.Table.from_pylist(draft.excluded, schema=quarantine_schema()),
        looks=draft.looks,
        injected=draft.injected,
    )


def without(planned: SamplePlan, failed: Mapping[str, str]) -> SamplePlan:
    """The plan with every sample quarantined that needs a row which could not be made.

    Args:
        planned: A plan.
        failed: Reason by key of a latents row: of a picture, of its mask or of a reference.
    """
    if not failed:
        return planned
    broken: dict[str, dict[str, Any]] = {}
    needed = planned.samples.select([ID, URI, DATASET, LATENT_KEY, MASK, REFERENCES])
    for batch in needed.to_batches(max_chunksize=AT_ONCE):
        for row in batch.to_pylist():
            for said, key in needed_rows(row):
                if key in failed:
                    late = {"path": row[URI], "reason": said + failed[key], "dataset": row[DATASET]}
                    broken.setdefault(row[ID], late)
    kept = pc.invert(pc.is_in(planned.samples.column(ID), value_set=pa.array(list(broken), pa.string())))
    late_rows = pa.Table.from_pylist(list(broken.values()), schema=quarantine_schema())
    return replace(
        planned,
        samples=planned.samples.filter(kept),
        quarantine=pa.concat_tables([planned.quarantine, late_rows]),
    )


def refusal(config: Config, plan: SamplePlan) -> str | None:
    """Why the run must not start: nothing kept, or more than `max_quarantined` left out; None when it may."""
    kept = pc.count_distinct(plan.samples.column(ID)).as_py()
    left_out = plan.quarantine.num_rows
    share = left_out / max(1, kept + left_out)
    if kept and share <= config.max_quarantined:
        return None
    shown = pa.concat_tables([plan.quarantine, plan.excluded]) if not kept else plan.quarantine
    listed = [f"  {visible(row['path'])}: {visible(row['reason'])}" for row in shown.slice(0, LISTED).to_pylist()]
    if shown.num_rows > LISTED:
        listed.append(f"  ... and {shown.num_rows - LISTED} more")
    if not kept:
        head = "no picture can be used"
    else:
        head = (
            f"{left_out} of {kept + left_out} pictures ({share:.1%}) are quarantined, allowed are "
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


def _decoded(data: Data, count: int, ordinal: int, draft: _Draft) -> bool:
    """Whether every pixel of a data set's pictures is decoded."""
    if data.check_images is not None:
        return data.check_images
    if count > DECODE_UP_TO:
        message = f"{count} pictures, only headers read: data.{ordinal}.check_images=true decodes all"
        draft.notes[message].append(data.path)
    return count <= DECODE_UP_TO


def _uris(candidates: Iterable[Candidate]) -> list[str]:
    """Every file of each candidate: its picture, its mask if it has one, its references."""
    return [uri for c in candidates for uri in (c.path, *filter(None, (c.mask,)), *c.references)]


def _kept(
    candidates: list[Candidate], inspected: Iterable[load.Inspected], data: Data, *, ordinal: int, draft: _Draft
) -> list[Picture]:
    """The pictures that can be used; `inspected` holds what was seen at each of `_uris`."""
    pictures, stream = [], iter(inspected)
    for candidate in candidates:
        seen = next(stream)
        mask = None if candidate.mask is None else next(stream)
        references = tuple(islice(stream, len(candidate.references)))
        problem = seen.problem or _beside_problem(candidate, mask, references) or _too_small(seen, data)
        if problem:
            draft.leave_out(candidate.path, problem, ordinal)
        elif reason := _unwanted(seen, data):
            draft.exclude(candidate.path, reason, ordinal)
        else:
            draft.injected[ordinal] += candidate.injected
            if seen.look is not None:
                draft.looks[seen.sha256] = seen.look
            pictures.append(Picture(_unique(candidate.id, ordinal, draft.taken), candidate, seen, mask, references))
    return pictures


def _beside_problem(
    candidate: Candidate, mask: load.Inspected | None, references: Iterable[load.Inspected]
) -> str | None:
    """What is wrong with a picture's mask or references, with their names."""
    if mask is not None and mask.problem:
        return f"mask {candidate.mask}: {mask.problem}"
    for uri, seen in zip(candidate.references, references, strict=True):
        if seen.problem:
            return f"reference {uri}: {seen.problem}"
        if min(seen.width, seen.height) < CELL:
            return f"reference {uri}: too small: {seen.width}x{seen.height} px, no side may be under {CELL} px"
    return None


def _too_small(seen: load.Inspected, data: Data) -> str | None:
    size = seen.width, seen.height
    if any(choose(*size, side, aspect=data.crop_aspect, upscale=data.upscale) for side in data.resolutions):
        return None
    least = min(data.resolutions)
    return (
        f"too small: {seen.width}x{seen.height} px fits no bucket of the smallest resolution {least} without being "
        f"enlarged (about {least}x{least} px are needed): use a larger picture, a smaller resolution or upscale=true"
    )


def _unwanted(seen: load.Inspected, data: Data) -> str | None:
    if min(seen.width, seen.height) < data.min_size:
        return f"shorter side under min_size={data.min_size}"
    if data.max_size is not None and max(seen.width, seen.height) > data.max_size:
        return f"longer side over max_size={data.max_size}"
    return None


def _unique(sample_id: str, ordinal: int, taken: set[str]) -> str:
    """Ids are unique over all data sets: the second data set's `a` becomes `a@1` when the first has an `a`."""
    while sample_id in taken:
        sample_id += f"@{ordinal}"
    taken.add(sample_id)
    return sample_id


def _held_out(pictures: list[Picture], share: float) -> set[str]:
    """Ids of the floor(n * share) pictures whose content hashes lowest: more pictures move only the border."""
    if len(pictures) < MIN_FOR_VALIDATION:
        return set()
    count = math.floor(len(pictures) * share + 1e-9)  # 100 * 0.29 is 28.999999999999996

    def rank(picture: Picture) -> tuple[bytes, str]:
        return hashlib.sha256(b"validation split\0" + picture.seen.sha256.encode()).digest(), picture.id

    return {picture.id for picture in sorted(pictures, key=rank)[:count]}


def _note(
    picture: Picture,
    placed: Mapping[int, tuple[int, int]],
    variants: list[tuple[int, Transform]],
    data: Data,
    *,
    draft: _Draft,
) -> None:
    """Collect what a person should know of a kept picture."""
    path, (width, height) = picture.candidate.path, picture.size
    draft.paths_of[picture.seen.sha256].append(path)
    told = list(picture.seen.warnings)
    for side in data.resolutions:
        if side not in placed:
            told.append(f"too small for resolution {side}: used at the smaller ones only")
        elif not fits(width, height, placed[side]):
            told.append(f"enlarged for resolution {side}")
    if max(transform.pixels_lost for _, transform in variants) > NOTABLE_LOSS:
        told.append(f"the crop cuts away more than {NOTABLE_LOSS:.0%} of the picture")
    if picture.mask is not None and (picture.mask.width, picture.mask.height) != picture.size:
        told.append("its mask is of another size: it is scaled to the picture's")
    trigger = None if data.regularisation else data.trigger
    if picture.candidate.injected:
        told.append(f"its caption does not mention the trigger {trigger!r}, which was put in front of it")
    elif trigger and not any(captions.mentions(caption, trigger) for caption in picture.candidate.captions):
        told.append(f"the caption does not contain the trigger {trigger!r}")
    for message in told:
        draft.notes[message].append(path)


def _warning(message: str, paths: list[str]) -> str:
    if len(paths) == 1:
        return f"{paths[0]}: {message}"
    return f"{len(paths)} pictures: {message} (first: {paths[0]})"
