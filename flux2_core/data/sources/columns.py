"""Which columns of a table hold the picture, its name and its caption; the same for Parquet and Lance."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from flux2_core.config.places import COLUMN
from flux2_core.data.sources.walls import MOST_ROWS, UNPACKED_BYTES
from flux2_core.errors import DataError

IMAGE, FILE_NAME = "image", "file_name"
TEXT_COLUMNS = ("text", "caption")
FEW_ROWS = 16  # unpacked at a time: one long value may stand for all of them in a file


@dataclass(frozen=True)
class Rows:
    """What a table says of its pictures, row by row: a name and a caption of any type, None where it has none."""

    names: list[Any]
    texts: list[Any]
    missing: str
    """Why a row without a caption has none."""
    stamps: Sequence[str]
    """What a row's address says of the table as it is now (`read`)."""


def rows(
    uri: str,
    schema: pa.Schema,
    read: Callable[[list[str]], Iterable[pa.RecordBatch]],
    *,
    caption: str,
    stamps: Sequence[str],
    picture: str | None = None,
) -> Rows:
    """Names and captions of all rows; the pictures' bytes stay where they are.

    Args:
        uri: The table, for messages.
        schema: Its columns.
        read: Reads columns, some rows at a time.
        caption: `data.caption`.
        stamps: Of the rows.
        picture: The column that holds the pictures, where it is said.

    Raises:
        DataError: no column holds pictures, `caption` names none, or names and captions are damaged or too large.
    """
    try:
        name, text = _name_column(schema, picture), text_column(schema.names, caption=caption)
    except DataError as error:
        raise DataError(f"{uri}: {error}") from None
    missing = f"no caption: the row has none in column {text}"
    if text is None:
        missing = f'no caption: there is no column text or caption; say caption = "{COLUMN}NAME" ({schema.names})'
    wanted = [column for column in (name, text) if column is not None]
    table, count = pa.table({}), len(stamps)
    if wanted and count:
        batches = list(bounded(uri, read(wanted)))
        table = pa.Table.from_batches(batches) if batches else table
        if table.num_rows != count:
            raise DataError(f"{uri}: damaged: it has {table.num_rows} captions for {count} pictures; write it again")
    try:
        return Rows(_values(table, name, count=count), _values(table, text, count=count), missing, stamps)
    except ValueError as error:
        raise DataError(f"{uri}: names or captions that are no text ({error}); write it again") from error


def bounded(uri: str, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Batches of names and captions, as long as they are no more than memory is meant for.

    Raises:
        DataError: too many rows or bytes; names them.
    """
    rows = size = 0
    for batch in batches:
        rows, size = rows + batch.num_rows, size + batch.nbytes
        if rows > MOST_ROWS or size > UNPACKED_BYTES:
            told = f"over {MOST_ROWS:,} rows or {UNPACKED_BYTES // 2**20:,} MiB of names and captions"
            raise DataError(f"{uri}: {told}: make several of it")
        yield batch


def picture_column(schema: pa.Schema, named: str | None = None) -> str:
    """The column `image`, or the only one of picture bytes (binary, a Lance blob, or a struct with `bytes`).

    Raises:
        DataError: there is none, or several; or that which is `named` holds none.
    """
    found = [field.name for field in schema if _holds_bytes(field.type)]
    if named in found or (named is None and IMAGE in found):
        return named or IMAGE
    if named is not None:
        raise DataError(f"{COLUMN}{named} holds no picture bytes (columns that do: {', '.join(found) or 'none'})")
    if len(found) != 1:
        what = f"several columns of bytes ({', '.join(found)})" if found else "no column of picture bytes"
        raise DataError(f"it has {what}: name the pictures' column {IMAGE!r} (columns: {', '.join(schema.names)})")
    return found[0]


def bytes_column(schema: pa.Schema, named: str | None = None) -> str:
    """Where a row has its picture's bytes: `picture_column`, or `bytes` in that struct."""
    name = picture_column(schema, named)
    return f"{name}.bytes" if pa.types.is_struct(schema.field(name).type) else name


def text_column(names: Collection[str], *, caption: str) -> str | None:
    """The column that `column:NAME` names, or `text` or `caption`; None where captions come from elsewhere.

    Raises:
        DataError: it names none of them, or both `text` and `caption` are there.
    """
    wanted = [caption.removeprefix(COLUMN)] if caption.startswith(COLUMN) else TEXT_COLUMNS
    found = [name for name in wanted if name in names]
    if caption not in ("auto", "metadata") and wanted is TEXT_COLUMNS:
        return None
    if len(found) > 1:
        raise DataError(f'it has both columns {" and ".join(found)}: say which, caption = "{COLUMN}{found[0]}"')
    if not found and wanted is not TEXT_COLUMNS:
        raise DataError(f"caption={caption!r}: there is no such column (columns: {', '.join(sorted(names))})")
    return found[0] if found else None


def address(row: int, column: str | None) -> str:
    """A picture's address: its row, and the column where one is named."""
    return str(row) if column is None else f"{row}:{column}"


def located(address: str) -> tuple[int, str | None]:
    """The row that a picture's address names, and the column where it names one.

    Raises:
        DataError: its row is no number.
    """
    row, _, column = address.partition(":")
    if not row.isdecimal():
        raise DataError(f"{address!r} is no number of a row")
    return int(row), column or None


def picture_bytes(value: Any) -> bytes | None:
    """The bytes in a cell of the pictures' column, None where it is empty."""
    return value["bytes"] if isinstance(value, dict) else value


def _name_column(schema: pa.Schema, picture: str | None) -> str | None:
    image = picture_column(schema, picture)
    if FILE_NAME in schema.names:
        return FILE_NAME
    kind = schema.field(image).type
    return f"{image}.path" if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0 else None


def _values(table: pa.Table, name: str | None, *, count: int) -> list[Any]:
    if name is None or not count:
        return [None] * count
    if name in table.column_names:
        return table.column(name).to_pylist()
    struct, _, field = name.partition(".")
    return pc.struct_field(table.column(struct), field).to_pylist()


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_bytes(kind.field(place).type)
    blob = isinstance(kind, pa.BaseExtensionType) and kind.extension_name.startswith("lance.blob")
    return blob or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
