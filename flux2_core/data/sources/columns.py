"""Which columns of a table hold the picture, its name and its caption; the same for Parquet and Lance."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import pyarrow as pa

from flux2_core.config.sections import COLUMN
from flux2_core.errors import DataError

IMAGE, FILE_NAME = "image", "file_name"
TEXT_COLUMNS = ("text", "caption")


@dataclass(frozen=True)
class Columns:
    """The column of captions and that of the pictures' names (dotted inside a struct), where there are any."""

    text: str | None
    name: str | None


def picture_column(schema: pa.Schema) -> str:
    """The column `image`, or the only one of picture bytes (binary, a Lance blob, or a struct with `bytes`).

    Raises:
        DataError: there is none, or several.
    """
    found = [field.name for field in schema if _holds_bytes(field.type)]
    if IMAGE in found:
        return IMAGE
    if len(found) != 1:
        what = f"several columns of bytes ({', '.join(found)})" if found else "no column of picture bytes"
        raise DataError(f"it has {what}: name the pictures' column {IMAGE!r} (columns: {', '.join(schema.names)})")
    return found[0]


def columns(schema: pa.Schema, *, caption: str) -> Columns:
    """Columns of captions and of names.

    Raises:
        DataError: `column:NAME` names none of them, or no column holds pictures.
    """
    image = picture_column(schema)
    name = FILE_NAME if FILE_NAME in schema.names else None
    kind = schema.field(image).type
    if name is None and pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        name = f"{image}.path"
    return Columns(text_column(schema.names, caption=caption), name)


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


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_bytes(kind.field(place).type)
    blob = isinstance(kind, pa.BaseExtensionType) and kind.extension_name.startswith("lance.blob")
    return blob or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
