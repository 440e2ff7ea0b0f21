"""metadata.jsonl, .csv and .parquet: what a folder's index says of which file, row by row.

A row that cannot be used carries its problem; only a file that cannot be read at all raises.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flux2_core.config.places import COLUMN
from flux2_core.data.sources import columns
from flux2_core.data.sources.columns import FILE_NAME, TEXT_COLUMNS, text_column
from flux2_core.data.sources.walls import CAPTION_BYTES, LONGEST_NAME, MOST_ROWS, refused
from flux2_core.errors import DataError

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
MASK, REFERENCES = "mask", ("reference", "references")
THEIRS = {  # names of DiffSynth-Studio and musubi-tuner, where there is no file_name
    "image": FILE_NAME,
    "image_path": FILE_NAME,
    "edit_image": "references",
    "control_path": "references",
}
MOST_COLUMNS = 1_000


Line = tuple[str, dict[str, Any], str | None]  # where it stands, its values by column, what is wrong with it


@dataclass(frozen=True, slots=True)
class Row:
    """One row: where it stands (`file:line`), the file it names (normalised), its caption of any type, what is wrong.

    `problem`: it names no file that may be looked for. `text_problem`: the file is known, what belongs to it is not.
    """

    where: str = field(compare=False)
    file_name: str
    text: object = None
    problem: str | None = None
    text_problem: str | None = None
    mask: str | None = None
    references: tuple[str, ...] = ()
    rejected: str | None = None

    @property
    def beside(self) -> tuple[str, ...]:
        """The files that belong to its picture."""
        return (*(one for one in (self.mask, self.rejected) if one is not None), *self.references)


def rows(path: str, data: bytes, *, caption: str, picture: str = FILE_NAME, rejected: str | None = None) -> list[Row]:
    """All rows of a metadata file, in order.

    Args:
        path: Its place, for messages and for its format.
        data: Its bytes.
        caption: `data.caption`, which may name a column.
        picture: The column that names a row's picture.
        rejected: The column that names the rejected picture of its pair.

    Raises:
        DataError: it is UTF-16, or not of its format, too large, or no column is called as these say.
    """
    kept = {picture, MASK, *REFERENCES, *TEXT_COLUMNS, caption.removeprefix(COLUMN), rejected or picture}
    names: set[str] = set()
    lines: list[Line] = []
    for where, row, problem in _lines(path, data, kept, picture):
        row = _named(row, picture)
        names |= row.keys()
        if len(lines) == MOST_ROWS or len(names) > MOST_COLUMNS:
            raise DataError(
                f"{path}: over {MOST_ROWS:,} rows or {MOST_COLUMNS:,} columns: make several data sets of it"
            )
        lines.append((where, {name: bare(value) for name, value in row.items() if name in kept}, problem))
    for named in (picture, rejected or picture):
        if names and named not in names:
            raise DataError(f"{path}: its columns must include {named} (columns: {', '.join(sorted(names))})")
    try:
        column = text_column(names, caption=caption) if names else None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return [_row(where, row, column, problem, picture=picture, rejected=rejected) for where, row, problem in lines]


def _named(row: dict[str, Any], picture: str) -> dict[str, Any]:
    """A row by our names: as it is where it has the column of its picture."""
    return row if picture in row else {THEIRS.get(name, name): value for name, value in row.items()}


def bare(value: object) -> object:
    """A value out of JSON, of which nested lists keep no more than their kind: they are 20 times as large in memory."""
    if isinstance(value, list):
        nested = next((item for item in value if isinstance(item, list | dict)), None)
        return value if nested is None else [type(nested)()]
    return {} if isinstance(value, dict) else value


def _lines(path: str, data: bytes, kept: Collection[str], picture: str) -> Iterator[Line]:
    if path.endswith(".parquet"):
        return _parquet(path, data, kept, picture)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16; save it as UTF-8")
    # undecodable bytes become lone surrogates, which reject their own row only (`captions.clean`)
    is_csv = path.endswith(".csv")
    text = io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", "surrogateescape", newline="" if is_csv else "\n")
    lines = _short(path, text)
    return _csv(path, lines, picture) if is_csv else _jsonl(path, lines)


def _short(path: str, text: io.TextIOWrapper) -> Iterator[str]:
    """The lines, none of which may be longer than a caption file."""
    for number in itertools.count(1):
        line = text.readline(CAPTION_BYTES + 1)
        if len(line) > CAPTION_BYTES:
            raise DataError(f"{path}:{number}: a line of over {CAPTION_BYTES // 2**20} MiB; one row a line is needed")
        if not line:
            return
        yield line


def _jsonl(path: str, lines: Iterator[str]) -> Iterator[Line]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            problem = None if isinstance(row, dict) else "not a JSON object"
        except (ValueError, RecursionError) as error:
            row, problem = {}, f"not a JSON object ({error})"
        yield f"{path}:{number}", row if isinstance(row, dict) else {}, problem


def _csv(path: str, lines: Iterator[str], picture: str) -> Iterator[Line]:
    csv.field_size_limit(CAPTION_BYTES)  # the module's default of 128 KiB stops at a 1 MB caption
    reader = csv.DictReader(lines, strict=True)
    try:
        if picture not in _named(dict.fromkeys((reader.fieldnames or ())[:MOST_COLUMNS]), picture):
            raise DataError(f"{path}: its first line must name the columns {picture} and text")
        for row in reader:
            extra = row.pop(None, None)
            problem = "more fields than columns: put quotes around a text with commas" if extra else None
            yield f"{path}:{reader.line_num}", row, problem
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV ({error})") from error


def _parquet(path: str, data: bytes, kept: Collection[str], picture: str) -> Iterator[Line]:
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        others = dict.fromkeys(file.schema_arrow.names)
        if picture not in others:
            raise DataError(
                f"{path}: its columns must include {picture}; pictures inside Parquet files need another file name"
            )
        wanted, number = [name for name in others if name in kept], itertools.count()
        for batch in columns.bounded(path, file.iter_batches(columns.FEW_ROWS, columns=wanted)):
            for row in batch.to_pylist():
                yield f"{path}#{next(number)}", {**others, **row}, None
                others = {}  # their names are known now
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a Parquet file that can be read ({error}); write it again") from error


def _row(
    where: str, row: dict[str, Any], column: str | None, text_problem: str | None, *, picture: str, rejected: str | None
) -> Row:
    name = row.get(picture)
    if not isinstance(name, str) or not name:
        return Row(where, "", problem=text_problem or f"the row has no {picture}")
    if problem := refused(name):
        return Row(where, name[:LONGEST_NAME], problem=problem)
    name = os.path.normpath(name)
    mask, references = row.get(MASK), [row[key] for key in REFERENCES if row.get(key)]
    flat = [part for value in references for part in (value if isinstance(value, list) else [value])]
    worse = row.get(rejected or "")
    for beside in (*([mask] if mask else []), *flat, *([worse] if worse else [])):
        wrong = refused(beside) if isinstance(beside, str) else f"{type(beside).__name__}, not the name of a file"
        if wrong and text_problem is None:
            text_problem = f"its mask, reference or rejected picture {repr(beside)[:LONGEST_NAME]}: {wrong}"
    if text_problem is not None:
        return Row(where, name, text_problem=text_problem)
    mask, worse = (os.path.normpath(one) if one else None for one in (mask, worse))
    beside = tuple(map(os.path.normpath, flat))
    return Row(where, name, row.get(column or ""), mask=mask, references=beside, rejected=worse)
