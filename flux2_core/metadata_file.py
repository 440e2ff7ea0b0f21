"""metadata.jsonl and metadata.csv: which caption a folder's index gives to which file, row by row.

A row that cannot be used carries its problem; only a file that cannot be read at all raises.
"""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

from flux2_core import captions
from flux2_core.errors import DataError

NAMES = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class Row:
    """One row: where it stands (`file:line`), the file it names, its `text` of any type, and what is wrong.

    `problem`: it names no file that may be looked for. `text_problem`: the file is known, its text is not.
    """

    where: str
    file_name: str
    text: Any
    problem: str | None = None
    text_problem: str | None = None


def rows(path: Path) -> list[Row]:
    """All rows of a metadata file, in order.

    Raises:
        DataError: it is UTF-16, or not CSV, or its header lacks `file_name`.
    """
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16; save it as UTF-8")
    # Undecodable bytes become lone surrogates, which reject their own row only (`captions.clean`).
    text = data.decode("utf-8-sig", "surrogateescape")
    return _csv_rows(path, text) if path.suffix == ".csv" else _jsonl_rows(path, text)


def _jsonl_rows(path: Path, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            rows.append(Row(where, "", None, f"not a JSON object ({error})"))
            continue
        rows.append(_row(where, row) if isinstance(row, dict) else Row(where, "", None, "not a JSON object"))
    return rows


def _csv_rows(path: Path, text: str) -> list[Row]:
    csv.field_size_limit(captions.MAX_CAPTION_BYTES)  # the module's default of 128 KiB stops at a 1 MB caption
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        if "file_name" not in (reader.fieldnames or ()):
            raise DataError(f"{path}: its first line must name the columns file_name and text")
        for row in reader:
            where = f"{path}:{reader.line_num}"
            extra = row.pop(None, None)
            problem = "more fields than columns: put quotes around a text with commas" if extra else None
            rows.append(replace(_row(where, row), text_problem=problem))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV ({error})") from error
    return rows


def _row(where: str, row: dict[str, Any]) -> Row:
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        return Row(where, "", None, "the row has no file_name")
    return Row(where, name, row.get("text"), _refused(name))


def _refused(name: str) -> str | None:
    if "\0" in name:
        return "file_name holds a NUL character"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "file_name is not valid UTF-8"
    if re.match(r"(?i)[a-z][a-z0-9+.-]*://|file:|data:", name) or PureWindowsPath(name).drive:
        return "file_name is a URL or names a drive; name a file inside the data set's folder"
    if name.startswith(("/", "\\")):
        return "file_name is an absolute path; name a file relative to the data set's folder"
    if ".." in re.split(r"[/\\]", name):
        return "file_name leaves the data set's folder ('..')"
    return None
