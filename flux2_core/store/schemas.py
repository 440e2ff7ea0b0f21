"""Names and schemas of every table that a stage reads or writes."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pyarrow as pa

from flux2_core.errors import DataError
from flux2_core.store.hashing import canonical

CONTRACT_VERSION = 2  # raised when a column or its meaning changes; a stage refuses another one
SAME_ROWS = ("1", "2")  # contracts under which tensor tables are alike: their rows are used on (2 changed samples only)

# Lance tables (flux2_core/store/table.py); `payload` is a Lance blob column, `checksum` covers the whole row
KEY, PAYLOAD, CHECKSUM = "key", "payload", "checksum"
ROW_ID = "_rowid"  # Lance's own, stable for the life of a row
ROW_ADDRESS = "_rowaddr"  # Lance's own: number of the fragment, times 2**32, plus the place in it
TEXT, TOKENS = "text", "tokens"
HEIGHT, WIDTH = "height", "width"  # of latents: in tokens (16 px each); of samples: px of the oriented source

# columns of the samples table, Parquet
ID, VARIANT, URI, SHA256 = "id", "variant", "uri", "sha256"
CAPTIONS, TEXT_KEYS, LATENT_KEY = "captions", "text_keys", "latent_key"
BUCKET_HEIGHT, BUCKET_WIDTH = "bucket_height", "bucket_width"
RESIZE_HEIGHT, RESIZE_WIDTH = "resize_height", "resize_width"
CROP_TOP, CROP_LEFT, FLIP = "crop_top", "crop_left", "flip"
DATASET, REPEATS, WEIGHT, REGULARISATION = "dataset", "repeats", "weight", "regularisation"
SPLIT, PIXELS_LOST = "split", "pixels_lost"
ROLES, MASK, REFERENCES = "roles", "mask", "references"
REJECTED = "rejected"  # a column only of tables with pairs: all others keep the bytes of before
TRAIN, VALIDATION = "train", "validation"  # the values of `split`,
PREVIEW = "preview"  # and of what is no sample: a picture that a preview's prompt shows the model

# columns of the quarantine table, Parquet
PATH, REASON = "path", "reason"
KIND_TEXT, KIND_LATENTS = "text", "latents"
META_KIND, META_CONTRACT, META_FINGERPRINT = "cacheloom.kind", "cacheloom.contract", "cacheloom.fingerprint"
META_PROOF = "cacheloom.proof"  # what the libraries of its rows made of fixed inputs; no part of the fingerprint


def text_schema() -> pa.Schema:
    """One row per distinct text: its own token rows as bytes, the exact text, the number of tokens."""
    return _keyed(pa.field(TEXT, pa.string()), pa.field(TOKENS, pa.int32()))


def latents_schema() -> pa.Schema:
    """One row per picture and transform: bytes of (128, height, width), sides in tokens."""
    return _keyed(pa.field(HEIGHT, pa.int32()), pa.field(WIDTH, pa.int32()))


def samples_schema(*, pairs: bool = False) -> pa.Schema:
    """One row per (sample, transform variant); lengths in px of the oriented source or of the resized picture."""
    return pa.schema(
        [
            (ID, pa.string()),
            (VARIANT, pa.int32()),
            (URI, pa.string()),
            (SHA256, pa.string()),
            (WIDTH, pa.int32()),
            (HEIGHT, pa.int32()),
            (CAPTIONS, pa.list_(pa.string())),
            (TEXT_KEYS, pa.list_(pa.string())),
            (LATENT_KEY, pa.string()),
            (ROLES, pa.list_(pa.struct([("role", pa.string()), (TEXT, pa.string()), (KEY, pa.string())]))),
            *_transform(),
            (MASK, pa.struct(_source())),
            (REFERENCES, pa.list_(pa.struct([*_source(), *_transform()]))),
            *([(REJECTED, pa.struct([*_source(), *_transform()]))] if pairs else []),
            (DATASET, pa.int32()),
            (REPEATS, pa.int32()),
            (WEIGHT, pa.float32()),
            (REGULARISATION, pa.bool_()),
            (SPLIT, pa.string()),
            (PIXELS_LOST, pa.float32()),
        ]
    )


def of_samples(names: Iterable[str], there: Collection[str]) -> list[str]:
    """Those columns of a samples table, of which `REJECTED` need not be there."""
    return [name for name in names if name != REJECTED or name in there]


def _source() -> list[tuple[str, pa.DataType]]:
    """A picture beside the sample's own, its place, content and latent key."""
    return [(URI, pa.string()), (SHA256, pa.string()), (LATENT_KEY, pa.string())]


def _transform() -> list[tuple[str, pa.DataType]]:
    """Fields of `flux2_core.data.pictures.transform.Transform`."""
    sizes = (BUCKET_HEIGHT, BUCKET_WIDTH, RESIZE_HEIGHT, RESIZE_WIDTH, CROP_TOP, CROP_LEFT)
    return [*((name, pa.int32()) for name in sizes), (FLIP, pa.bool_())]


def quarantine_schema() -> pa.Schema:
    """One row per sample that was left out, with the reason."""
    return pa.schema([(PATH, pa.string()), (REASON, pa.string()), (DATASET, pa.int32())])


def identity(kind: str, fingerprint: Mapping[str, Any], proof: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The schema metadata by which a Lance table says what it holds."""
    said = {META_KIND: kind, META_CONTRACT: str(CONTRACT_VERSION), META_FINGERPRINT: canonical(dict(fingerprint))}
    return said | ({} if proof is None else {META_PROOF: canonical(dict(proof))})


def read_identity(uri: str, metadata: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """(kind, fingerprint) out of a table's schema metadata.

    Raises:
        DataError: another contract version, or metadata that is damaged.
    """
    contract = metadata.get(META_CONTRACT)
    if contract not in SAME_ROWS:
        raise DataError(
            f"{uri}: contract version is {contract}, this cacheloom reads {CONTRACT_VERSION}; "
            "choose another output.cache and run `cacheloom cache` to write the rows again"
        )
    kind = metadata.get(META_KIND)
    try:
        fingerprint = json.loads(metadata.get(META_FINGERPRINT, ""))
    except ValueError:
        fingerprint = None
    if kind not in (KIND_TEXT, KIND_LATENTS) or not isinstance(fingerprint, dict):
        raise DataError(
            f"{uri}: its kind ({kind}) or fingerprint is unreadable: damaged; remove the table, cache again"
        )
    return kind, fingerprint


def _keyed(*attributes: pa.Field) -> pa.Schema:
    """Key, attributes, checksum, payload.

    Lance matches concurrent merges by the marked key field: without the mark racing writers duplicated rows
    (design.md, Data plane). store.py turns the payload into Lance's blob type when it creates the table.
    """
    key = pa.field(KEY, pa.string(), nullable=False, metadata={"lance-schema:unenforced-primary-key": "true"})
    return pa.schema([key, *attributes, pa.field(CHECKSUM, pa.uint64()), pa.field(PAYLOAD, pa.large_binary())])
