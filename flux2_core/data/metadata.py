"""metadata.jsonl, .csv and .parquet: what a folder's index says of which file, row by row.

A row that cannot be used carries its problem; only a file that cannot be read at all raises.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flux2_core.data.sources.columns import FILE_NAME, text_column
from flux2_core.data.sources.walls import CAPTION_BYTES, refused
from flux2_core.errors import DataError

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
MASK, REFERENCES = "mask", ("reference", "references")


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


def rows(path: str, data: bytes, *, caption: str) -> list[Row]:
    """All rows of a metadata file, in order.

    Args:
        path: Its place, for messages and for its format.
        data: Its bytes.
        caption: `data.caption`, which may name a column.

    Raises:
        DataError: it is UTF-16, or not of its format, or no column is called `file_name` or as `caption` says.
    """
    if path.endswith(".parquet"):
        lines = list(_parquet(path, data))
    elif data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16; save it as UTF-8")
    else:  # undecodable bytes become lone surrogates, which reject their own row only (`captions.clean`)
        text = data.decode("utf-8-sig", "surrogateescape")
        lines = list(_csv(path, text) if path.endswith(".csv") else _jsonl(path, text))
    names = {str(name) for _, row, _ in lines for name in row}
    if names and FILE_NAME not in names:
        raise DataError(f"{path}: its columns must include file_name (columns: {', '.join(sorted(names))})")
    try:
        column = text_column(names, caption=caption) if names else None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return [_row(where, row, column, problem) for where, row, problem in lines]


def _jsonl(path: str, text: str) -> Iterator[tuple[str, dict[str, Any], str | None]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            problem = None if isinstance(row, dict) else "not a JSON object"
        except (ValueError, RecursionError) as error:
            row, problem = {}, f"not a JSON object ({error})"
        yield f"{path}:{number}", row if isinstance(row, dict) else {}, problem


def _csv(path: str, text: str) -> Iterator[tuple[str, dict[str, Any], str | None]]:
    csv.field_size_limit(CAPTION_BYTES)  # the module's default of 128 KiB stops at a 1 MB caption
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        if FILE_NAME not in (reader.fieldnames or ()):
            raise DataError(f"{path}: its first line must name the columns file_name and text")
        for row in reader:
            extra = row.pop(None, None)
            problem = "more fields than columns: put quotes around a text with commas" if extra else None
            yield f"{path}:{reader.line_num}", row, problem
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV ({error})") from error


def _parquet(path: str, data: bytes) -> Iterator[tuple[str, dict[str, Any], str | None]]:
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a Parquet file that can be read ({error}); write it again") from error
    if FILE_NAME not in table.column_names:
        raise DataError(
            f"{path}: its columns must include file_name; pictures inside Parquet files need another file name"
        )
    for number, row in enumerate(table.to_pylist()):
        yield f"{path}#{number}", row, None


def _row(where: str, row: dict[str, Any], column: str | None, text_problem: str | None) -> Row:
    name = row.get(FILE_NAME)
    if not isinstance(name, str) or not name:
        return Row(where, "", problem=text_problem or "the row has no file_name")
    if problem := refused(name):
        return Row(where, name, problem=problem)
    name = os.path.normpath(name)
    mask, references = row.get(MASK), [row[key] for key in REFERENCES if row.get(key)]
    flat = [part for value in references for part in (value if isinstance(value, list) else [value])]
    for beside in (*([mask] if mask else []), *flat):
        wrong = refused(beside) if isinstance(beside, str) else f"{type(beside).__name__}, not the name of a file"
        if wrong and text_problem is None:
            text_problem = f"its mask or reference {beside!r}: {wrong}"
    if text_problem is not None:
        return Row(where, name, text_problem=text_problem)
    beside = tuple(os.path.normpath(part) for part in flat)
    return Row(where, name, row.get(column or ""), mask=os.path.normpath(mask) if mask else None, references=beside)
