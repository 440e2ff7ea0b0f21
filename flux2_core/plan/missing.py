"""Why rows are missing: in what they differ from the nearest that are cached, so that no slip costs a cache unseen.

A key hashes the table's fingerprint, what is encoded and how it is cut. So a missing row is looked for under the
fingerprints of the tables beside; what is in none of them, in the samples tables of earlier caches: the same picture
cut otherwise, or other bytes or words in its place. A row with several differences counts in each of them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial, reduce
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from flux2_core.cache import index, keys, proofs
from flux2_core.config.sections import Config
from flux2_core.data import samples as data_samples
from flux2_core.data.intake import SamplePlan
from flux2_core.data.pictures.transform import Transform
from flux2_core.data.samples import AT_ONCE, Wanted
from flux2_core.errors import DataError
from flux2_core.model.folder import ModelFolder
from flux2_core.store import objects, parquet
from flux2_core.store.hashing import differing
from flux2_core.store.keyset import Keys
from flux2_core.store.schemas import (
    CAPTIONS,
    KIND_LATENTS,
    KIND_TEXT,
    LATENT_KEY,
    MASK,
    REFERENCES,
    ROLES,
    SHA256,
    TEXT,
    URI,
)

MOST_ROWS = 100_000  # of a kind that are explained; they take 3 s and 300 MB for each cache that they are compared with
MOST_TABLES, MOST_CACHES = 16, 4  # that are looked into
OWNERS = 8  # pictures of a text that are looked for
NEW, GONE, EDITED, REPLACED, UNEXPLAINED = "new", "gone", "text", "source", "unexplained"
FIELDS = {  # what fields of fingerprints and of image recipes are called, if not by their own names
    **dict.fromkeys(("encoder_files", "vae_files", "family", "projection", "layers", "width"), "model"),
    "tokenizer_files": "tokenizer",
    "system_message": "template",
    "alpha": "background",
    "image": "image recipe",
}
FOLLOW = {"stored": ("projection", "width"), "pads": ("counted",)}  # fields that change with another
CUT = {  # fields of a transform: the first of these that differ, for the others follow
    "bucket": ("bucket_height", "bucket_width"),
    "resize": ("resize_height", "resize_width"),
    "crop": ("crop_top", "crop_left"),
}


class _Former(NamedTuple):
    """What an earlier cache was made of."""

    samples: pa.Table
    texts: frozenset[str]
    """Of no sample."""
    resized: bool
    """Whether it had other resolutions."""


Subject = str | Wanted
Before = Callable[[Mapping[str, Any], _Former], Mapping[str, frozenset[str]]]


def texts(
    config: Config, model: ModelFolder, planned: SamplePlan, missing: Mapping[str, str], *, of: int
) -> dict[str, int]:
    """How many of the missing text rows are missing why; the most frequent reason first.

    Args:
        config: the configuration.
        model: its model.
        planned: what was found.
        missing: texts by key, at most `MOST_ROWS`.
        of: how many are missing in all.
    """
    before = partial(_reworded, planned)
    return _why(config, model, planned, missing.items(), kind=KIND_TEXT, total=of, before=before)


def latents(config: Config, model: ModelFolder, planned: SamplePlan, missing: Keys) -> dict[str, int]:
    """The same of missing latents rows, given by their keys."""
    sought = {key.decode() for key in missing[:MOST_ROWS].tolist()}
    rows = ((key, row) for key, row in _rows(planned.samples, sought) if key in sought)
    return _why(config, model, planned, rows, kind=KIND_LATENTS, total=missing.size, before=_otherwise)


def _why(
    config: Config,
    model: ModelFolder,
    planned: SamplePlan,
    rows: Iterable[tuple[str, Subject]],
    *,
    kind: str,
    total: int,
    before: Before,
) -> dict[str, int]:
    if not total:
        return {}
    left, own = dict(islice(rows, MOST_ROWS)), planned.fingerprints[kind]
    why = Counter({UNEXPLAINED: total - len(left)})
    why += _elsewhere(proofs.SelfTest(config, model, kind), own, left)
    why += _earlier(config, own, left, kind=kind, before=before)
    return dict((why + Counter({NEW: len(left)})).most_common())


def _elsewhere(test: proofs.SelfTest, own: Mapping[str, Any], left: dict[str, Subject]) -> Counter[str]:
    """Reasons of what has a row in another table, which is taken out of `left`; of several the nearest table counts."""
    why = Counter[str]()
    beside = islice(proofs.beside(proofs.URIS[test.kind](test.config, own)), MOST_TABLES)
    tables = [(_named(proofs.changed(test, own, table)), table) for _, table in beside]
    for fields, table in sorted(tables, key=lambda each: len(each[0])):
        there = {_key(table.fingerprint, subject): key for key, subject in left.items()}
        for key in table.present(there):
            why.update(fields)
            del left[there[key]]
    return why


def _earlier(
    config: Config, own: Mapping[str, Any], left: dict[str, Subject], *, kind: str, before: Before
) -> Counter[str]:
    """Reasons of what earlier caches had in another form; of several the one of the nearest settings counts."""
    why = Counter[str]()
    for settings, tree in islice(index.nearest(config), MOST_CACHES):
        if not left:
            break
        try:
            samples = parquet.read_parquet(objects.join(config.output.cache, tree["samples"]))
        except (DataError, FileNotFoundError):  # `verify` says so
            continue
        changed = _named(differing(own, tree[kind]["fingerprint"]))
        resized = any(name.endswith(".resolutions") for name in settings)
        for key, fields in before(left, _Former(samples, frozenset(tree.get(index.TEXTS, ())), resized)).items():
            why.update(fields | changed or {GONE})
            del left[key]
    return why


def _reworded(planned: SamplePlan, left: Mapping[str, str], former: _Former) -> dict[str, frozenset[str]]:
    """Of texts whose picture was cached: with the same words, or with others."""
    sought = pa.array(left.values(), pa.string())
    same, owners = set(former.texts), defaultdict[str, list[int]](list)
    for words, _ in _words(former.samples):
        same.update(words.filter(pc.is_in(words, value_set=sought)).unique().to_pylist())
    for words, rows in _words(planned.samples):
        hit = pc.is_in(words, value_set=sought)
        for text, row in zip(words.filter(hit).to_pylist(), rows.filter(hit).to_pylist(), strict=True):
            if len(owners[text]) < OWNERS:
                owners[text].append(row)
    rows = pa.array({row for each in owners.values() for row in each}, pa.int64())
    known = [
        pc.is_in(planned.samples.column(name).take(rows), value_set=former.samples.column(name).combine_chunks())
        for name in (URI, SHA256)
    ]
    there = set(rows.filter(pc.or_(*known).combine_chunks()).to_pylist())
    edited = {text for text, each in owners.items() if there.intersection(each)}
    found = {key: frozenset({EDITED}) for key, text in left.items() if text in edited}
    return found | {key: frozenset() for key, text in left.items() if text in same}


def _otherwise(left: Mapping[str, Wanted], former: _Former) -> dict[str, frozenset[str]]:
    """Of pictures that were cached: how they were cut, or that other bytes were in their place."""
    nearest: dict[str, frozenset[str]] = {}
    named = defaultdict[tuple[bool, str], list[str]](list)
    for key, row in left.items():
        for name in (row.sha256, str(row)):
            named[row.mask, name].append(key)
    for _, row in _rows(former.samples, {name for _, name in named}):
        found = dict.fromkeys(named.get((row.mask, str(row)), ()), frozenset({REPLACED}))
        for key in named.get((row.mask, row.sha256), ()):
            found[key] = _cut(left[key].transform, row.transform, resized=former.resized)
        for key, fields in found.items():
            nearest[key] = min(nearest.get(key, fields), fields, key=lambda each: (REPLACED in each, len(each)))
    return nearest


def _cut(ours: Transform, theirs: Transform, *, resized: bool) -> frozenset[str]:
    differ = differing(vars(ours), vars(theirs))
    first = [name for name, of in CUT.items() if differ.intersection(of)][:1]
    return frozenset(
        [*("resolution" if name == "bucket" and resized else name for name in first), *differ.intersection({"flip"})]
    )


def _key(fingerprint: Mapping[str, Any], subject: Subject) -> str:
    if isinstance(subject, str):
        return keys.text_key(fingerprint, subject)
    return (keys.mask_key if subject.mask else keys.picture_key)(fingerprint, subject.sha256, subject.transform)


def _named(fields: set[str]) -> frozenset[str]:
    follow = {other for name in fields for other in FOLLOW.get(name, ())}
    return frozenset(FIELDS.get(name, name) for name in fields - follow)


def _rows(samples: pa.Table, sought: Collection[str]) -> Iterator[tuple[str, Wanted]]:
    """What samples need, by key, where they hold a sought name, hash or key; or have a mask or references, that may."""
    names = pa.array(sought, pa.string())
    hits = [pc.is_in(samples.column(name), value_set=names) for name in (URI, SHA256, LATENT_KEY)]
    hits += [pc.is_valid(samples.column(MASK)), pc.greater(pc.list_value_length(samples.column(REFERENCES)), 0)]
    for batch in samples.filter(reduce(pc.or_, hits)).to_batches(max_chunksize=AT_ONCE):
        yield from data_samples.wanted(pa.Table.from_batches([batch])).items()


def _words(samples: pa.Table) -> Iterator[tuple[pa.Array, pa.Array]]:
    """Every text of samples with its row: captions, then those of roles."""
    captions, roles = (samples.column(name).combine_chunks() for name in (CAPTIONS, ROLES))
    yield captions.flatten(), pc.list_parent_indices(captions)
    yield roles.flatten().field(TEXT), pc.list_parent_indices(roles)
