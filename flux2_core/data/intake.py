"""The sample plan: every picture becomes rows of the samples table, or one row of quarantine with its reason."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from flux2_core.config.dataset import Data, pattern
from flux2_core.config.sections import Config
from flux2_core.data import samples as data_samples
from flux2_core.data import shown as data_shown
from flux2_core.data import words
from flux2_core.data.inventory import Inventory, Mapper
from flux2_core.data.listing import Note, Rejected
from flux2_core.data.pictures.buckets import CELL, choose, fits, places, transforms
from flux2_core.data.pictures.transform import Transform
from flux2_core.data.samples import AT_ONCE, Keys, Picture, needed_rows
from flux2_core.data.scan import Candidate, scan
from flux2_core.data.sources.read import plain
from flux2_core.errors import DataError
from flux2_core.escape import visible
from flux2_core.store import schemas
from flux2_core.store.schemas import ID, PATH, REASON, SHA256, URI

Given = TypeVar("Given")
Made = TypeVar("Made")

DECODE_UP_TO = 2_000
MIN_FOR_VALIDATION = 20
LISTED = 10
NOTABLE_LOSS = 0.25


@dataclass(frozen=True)
class SamplePlan:
    """Rows of both tables (of `flux2_core.store.schemas`) and what a person should know.

    `excluded` has the quarantine's columns: sound pictures that `min_size`, `max_size` and `skip_captions` leave out.
    """

    samples: pa.Table
    quarantine: pa.Table
    warnings: list[str]
    excluded: pa.Table = field(default_factory=lambda: schemas.quarantine_schema().empty_table())
    looks: dict[str, bytes] = field(default_factory=dict)
    """How the decoded pictures look (`flux2_core.data.pictures.likeness`), by sha256."""
    injected: Mapping[int, int] = field(default_factory=dict)
    """In how many pictures' captions of a data set the trigger was put."""
    fingerprints: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Of the tables that the rows' keys are of, by kind."""
    inventories: tuple[Inventory, ...] = ()
    """What was found in the files of each data set, for `cache` to write."""


@dataclass(frozen=True, slots=True)
class _Unwanted:
    """A sound picture that is left out by wish."""

    path: str
    reason: str


def threads(function: Callable[[Given], Made], items: Iterable[Given]) -> Iterator[Made]:
    """`map` over threads of this process, results in order; hashing and decoding release Python's lock."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(function, items)


def build(config: Config, keys: Keys, *, mapper: Mapper = threads, trusting: bool = True) -> SamplePlan:
    """Scan, inspect, fit and split all data sets of a configuration.

    Args:
        config: Its `data`, `latents`, and `validate.held_out`.
        keys: How the keys of rows are made.
        mapper: Like `map`, in order; given a picklable function of a picture's URI.
        trusting: Whether what the cache's inventory knows of a picture is taken from there.

    Returns:
        One row per (picture, variant); variants are resolutions that it is large enough for x crops x flips, numbered
        from 0 in that order; pictures in the order of data sets, then of their paths.

    Raises:
        DataError: a data set is missing, empty, or has unreadable metadata.
    """
    batches, schema = list[pa.RecordBatch](), schemas.samples_schema(pairs=config.pairs)
    rows: list[dict[str, Any]] = []  # not yet in a batch, where columns take a tenth of the memory
    quarantine, excluded = list[dict[str, Any]](), list[dict[str, Any]]()
    notes: defaultdict[str, list[str]] = defaultdict(list)  # for each message the paths that it is about
    looks: dict[str, bytes] = {}
    inventories = tuple(Inventory(config, ordinal, trusting=trusting) for ordinal in range(len(config.data)))
    injected, taken = Counter[int](), set[str]()
    for ordinal, inventory in enumerate(inventories):
        for item in _found(config, ordinal, inventory, taken=taken, keys=keys, mapper=mapper):
            if isinstance(item, Note):
                notes[item.message].append(item.path)
            elif isinstance(item, Rejected):
                quarantine.append(_left_out(item.path, item.reason, ordinal))
            elif isinstance(item, _Unwanted):
                excluded.append(_left_out(item.path, item.reason, ordinal))
                notes[f"left out by wish, {item.reason}"].append(item.path)
            elif isinstance(item, Picture):
                injected[ordinal] += item.candidate.injected
                if item.seen.look is not None:
                    looks[item.seen.sha256] = item.seen.look
            else:
                rows += item
                taken.add(item[0][ID])
            if len(rows) >= AT_ONCE:
                batches.append(pa.RecordBatch.from_pylist(rows, schema=schema))
                rows = []
    batches.append(pa.RecordBatch.from_pylist(rows, schema=schema))
    samples = pa.Table.from_batches(batches, schema=schema)
    if twins := _twins(samples):
        notes["the same bytes as another picture: kept, one latent row"] = twins
    return SamplePlan(
        samples=data_shown.beside(samples, config, keys),
        quarantine=pa.Table.from_pylist(quarantine, schema=schemas.quarantine_schema()),
        warnings=[_warning(message, paths) for message, paths in notes.items()],
        excluded=pa.Table.from_pylist(excluded, schema=schemas.quarantine_schema()),
        looks=looks,
        injected=injected,
        inventories=inventories,
    )


def without(planned: SamplePlan, failed: Mapping[str, str]) -> SamplePlan:
    """The plan with every sample quarantined that needs a row which could not be made.

    Args:
        planned: A plan.
        failed: Reason by key of a latents row: of a picture, or of what it has beside it.

    Raises:
        DataError: it is what a preview shows, which nothing stands in for.
    """
    if not failed:
        return planned
    broken: dict[str, dict[str, Any]] = {}
    beside = schemas.MASK, schemas.REFERENCES, schemas.REJECTED
    columns = [ID, URI, schemas.DATASET, schemas.LATENT_KEY, schemas.SPLIT, *beside]
    needed = planned.samples.select(schemas.of_samples(columns, planned.samples.column_names))
    for batch in needed.to_batches(max_chunksize=AT_ONCE):
        for row in batch.to_pylist():
            for said, key in needed_rows(row):
                if key in failed and row[schemas.SPLIT] == schemas.PREVIEW:
                    raise DataError(f"{row[ID]}={row[URI]!r}: {failed[key]}")
                if key in failed:
                    broken.setdefault(row[ID], _left_out(row[URI], said + failed[key], row[schemas.DATASET]))
    kept = pc.invert(pc.is_in(planned.samples.column(ID), value_set=pa.array(list(broken), pa.string())))
    late_rows = pa.Table.from_pylist(list(broken.values()), schema=schemas.quarantine_schema())
    return replace(
        planned,
        samples=planned.samples.filter(kept),
        quarantine=pa.concat_tables([planned.quarantine, late_rows]),
    )


def refusal(config: Config, plan: SamplePlan) -> str | None:
    """Why the run must not start: nothing kept, or more than `max_quarantined` left out; None when it may."""
    kept = pc.count_distinct(data_shown.left_out(plan.samples).column(ID)).as_py()
    left_out = plan.quarantine.num_rows
    share = left_out / max(1, kept + left_out)
    if kept and share <= config.max_quarantined:
        return None
    shown = pa.concat_tables([plan.quarantine, plan.excluded]) if not kept else plan.quarantine
    listed = [f"  {visible(row[PATH])}: {visible(row[REASON])}" for row in shown.slice(0, LISTED).to_pylist()]
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


def _found(
    config: Config, ordinal: int, inventory: Inventory, *, taken: Collection[str], keys: Keys, mapper: Mapper
) -> Iterator[Note | Rejected | _Unwanted | Picture | list[dict[str, Any]]]:
    """What is in a data set, or what stands for it where pictures are made while training."""
    if not config.slider.target:
        yield from _items(config, ordinal, inventory, taken=taken, keys=keys, mapper=mapper)
        return
    for row in data_samples.unpictured(config.data[ordinal], config.slider.target, ordinal=ordinal, keys=keys):
        (name,) = _unique([row[ID]], ordinal, taken)
        yield [row | {ID: name}]


def _items(
    config: Config, ordinal: int, inventory: Inventory, *, taken: Collection[str], keys: Keys, mapper: Mapper
) -> Iterator[Note | Rejected | _Unwanted | Picture | list[dict[str, Any]]]:
    """All that becomes of a data set: what is left out of it, then each picture with its rows; ids not yet `taken`."""
    data, candidates = config.data[ordinal], list[Candidate]()
    for found in scan(data, ordinal=ordinal):
        if isinstance(found, Candidate):
            candidates.append(found)
        else:
            yield found
    decode = len(candidates) <= DECODE_UP_TO if data.check_images is None else data.check_images
    if not decode and data.check_images is None:
        told = f"{len(candidates)} pictures, only headers read: data.{ordinal}.check_images=true decodes all"
        yield Note(data.path, told)
    pictures: list[Picture] = []
    if inventory.damage:
        yield Note(inventory.uri, inventory.damage)
    looked = inventory.looked([file for one in candidates for file in one.files], decode=decode, mapper=mapper)
    for candidate in candidates:
        seen, *others = islice(looked, len(candidate.files))
        mask, rejected = others.pop(0) if candidate.mask else None, others.pop() if candidate.rejected else None
        picture = Picture(candidate, seen, mask, tuple(others), rejected)
        if problem := picture.seen.problem or _beside_problem(picture) or _too_small(picture, data):
            yield Rejected(candidate.path, problem)
        elif reason := _unwanted(picture, data):
            yield _Unwanted(candidate.path, reason)
        else:
            pictures.append(picture)
    ids = _unique([picture.candidate.id for picture in pictures], ordinal, taken)
    held_out = set() if data.regularisation else _held_out(ids, pictures, config.validation.held_out)
    for name, picture, placed in zip(ids, pictures, places([p.size for p in pictures], data), strict=True):
        split = schemas.VALIDATION if name in held_out else schemas.TRAIN
        variants = transforms(picture.size, placed, data=data, sha256=picture.seen.sha256)
        yield picture
        yield list(data_samples.rows(picture, variants, data, name=name, ordinal=ordinal, split=split, keys=keys))
        yield from (Note(picture.candidate.path, told) for told in _remarks(picture, placed, variants, data))


def _left_out(path: str, reason: str, ordinal: int) -> dict[str, Any]:
    return {PATH: plain(path), REASON: reason, schemas.DATASET: ordinal}


def _twins(samples: pa.Table) -> list[str]:
    """The pictures whose bytes another one has too."""
    pictures = samples.filter(pc.equal(samples.column(schemas.VARIANT), 0))
    counts = pc.value_counts(pictures.column(SHA256))
    several = pc.struct_field(counts, "values").filter(pc.greater(pc.struct_field(counts, "counts"), 1))
    return pictures.column(URI).filter(pc.is_in(pictures.column(SHA256), value_set=several)).to_pylist()


def _beside_problem(picture: Picture) -> str | None:
    """What is wrong with what a picture has beside it, with its name."""
    if picture.mask is not None and picture.mask.problem:
        return f"mask {picture.candidate.mask}: {picture.mask.problem}"
    for uri, seen in zip(picture.candidate.references, picture.references, strict=True):
        if seen.problem:
            return f"reference {uri}: {seen.problem}"
        if min(seen.width, seen.height) < CELL:
            return f"reference {uri}: too small: {seen.width}x{seen.height} px, no side may be under {CELL} px"
    if picture.rejected is not None and picture.rejected.problem:
        return f"rejected {picture.candidate.rejected}: {picture.rejected.problem}"
    return None


def _too_small(picture: Picture, data: Data) -> str | None:
    width, height = picture.size
    if any(choose(width, height, side, aspect=data.crop_aspect, upscale=data.upscale) for side in data.resolutions):
        return None
    least = min(data.resolutions)
    return (
        f"too small: {width}x{height} px fits no bucket of the smallest resolution {least} without being "
        f"enlarged (about {least}x{least} px are needed): use a larger picture, a smaller resolution or upscale=true"
    )


def _unwanted(picture: Picture, data: Data) -> str | None:
    if min(picture.size) < data.min_size:
        return f"shorter side under min_size={data.min_size}"
    if data.max_size is not None and max(picture.size) > data.max_size:
        return f"longer side over max_size={data.max_size}"
    for text in data.skip_captions:
        if any(pattern(text).search(caption) for caption in picture.candidate.captions):
            return f"a caption has {text!r}, which skip_captions names"
    return None


def _unique(ids: list[str], ordinal: int, taken: Collection[str]) -> list[str]:
    """Ids are unique over all data sets: the second data set's `a` becomes `a@1` when the first has an `a`."""
    found: dict[str, None] = {}
    for name in ids:
        while name in taken or name in found:
            name += f"@{ordinal}"
        found[name] = None
    return list(found)


def _held_out(ids: list[str], pictures: list[Picture], share: float) -> set[str]:
    """Ids of the floor(n * share) pictures whose content hashes lowest: more pictures move only the border."""
    if len(pictures) < MIN_FOR_VALIDATION:
        return set()
    count = math.floor(len(pictures) * share + 1e-9)  # 100 * 0.29 is 28.999999999999996
    ranks = (hashlib.sha256(b"validation split\0" + picture.seen.sha256.encode()).digest() for picture in pictures)
    return {name for _, name in sorted(zip(ranks, ids, strict=True))[:count]}


def _remarks(
    picture: Picture, placed: Mapping[int, tuple[int, int]], variants: list[tuple[int, Transform]], data: Data
) -> Iterator[str]:
    """What a person should know of a kept picture."""
    yield from picture.seen.warnings
    for side in data.resolutions:
        if side not in placed:
            yield f"too small for resolution {side}: used at the smaller ones only"
        elif not fits(*picture.size, placed[side]):
            yield f"enlarged for resolution {side}"
    if max(transform.pixels_lost for _, transform in variants) > NOTABLE_LOSS:
        yield f"the crop cuts away more than {NOTABLE_LOSS:.0%} of the picture"
    if picture.mask is not None and (picture.mask.width, picture.mask.height) != picture.size:
        yield "its mask is of another size: it is scaled to the picture's"
    if (worse := picture.rejected) is not None and (worse.width, worse.height) != picture.size:
        grown = not all(fits(worse.width, worse.height, bucket) for bucket in placed.values())
        yield f"its rejected picture is of another size: {'enlarged' if grown else 'cut'} to the preferred's bucket"
    trigger = None if data.regularisation else data.trigger
    if picture.candidate.injected:
        yield f"its caption does not mention the trigger {trigger!r}, which was put in front of it"
    elif trigger and not any(words.mentions(caption, trigger) for caption in picture.candidate.captions):
        yield f"the caption does not contain the trigger {trigger!r}"


def _warning(message: str, paths: list[str]) -> str:
    first = plain(paths[0])
    return f"{first}: {message}" if len(paths) == 1 else f"{len(paths)} pictures: {message} (first: {first})"
