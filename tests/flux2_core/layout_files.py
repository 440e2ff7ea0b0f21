"""One data set in every layout: the same names, captions and bytes, whatever holds them."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import lance
import pyarrow as pa
import pyarrow.parquet as pq

from flux2_core.store import objects

Item = tuple[str, str | None, bytes | None]  # name, caption, the picture's bytes


def put(folder: Path, name: str, data: bytes) -> None:
    """Write one file and the folders to it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def textfiles(folder: Path, items: list[Item]) -> None:
    """Pictures and `.txt` beside them."""
    for name, caption, data in items:
        if data is not None:
            put(folder, name, data)
        if caption is not None:
            put(folder, f"{name.rsplit('.', 1)[0]}.txt", caption.encode())


def metadata(suffix: str) -> Callable[[Path, list[Item]], None]:
    """Pictures and one metadata file."""

    def write(folder: Path, items: list[Item]) -> None:
        rows = [{"file_name": name, "text": caption} for name, caption, _ in items]
        for name, _, data in items:
            if data is not None:
                put(folder, name, data)
        put(folder, f"metadata.{suffix}", encode(rows, suffix))

    return write


def encode(rows: list[dict[str, object]], suffix: str) -> bytes:
    """Rows as JSON lines, CSV or Parquet."""
    if suffix == "parquet":
        out = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), out)
        return out.getvalue()
    if suffix == "jsonl":
        return "\n".join(map(json.dumps, rows)).encode()
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def picture_table(items: list[Item]) -> pa.Table:
    """Rows of pictures as Hugging Face writes them."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pictures = pa.array([{"bytes": data, "path": name} for name, _, data in items], kind)
    return pa.table({"image": pictures, "text": pa.array([caption for _, caption, _ in items], pa.string())})


def parquet(folder: Path, items: list[Item]) -> None:
    """One Parquet file, two rows to a group."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(picture_table(items), folder / "train-00000.parquet", row_group_size=2)


def lance_table(folder: Path, items: list[Item]) -> None:
    """One Lance table."""
    lance.write_dataset(picture_table(items), str(folder / "train.lance"))


def tar(folder: Path, items: list[Item]) -> None:
    """One tar of pictures and `.txt` files."""
    files = [(name, data) for name, _, data in items]
    files += [(f"{name.rsplit('.', 1)[0]}.txt", text and text.encode()) for name, text, _ in items]
    folder.mkdir(parents=True, exist_ok=True)
    pack(folder / "00000.tar", dict(files))


def pack(path: Path, files: dict[str, bytes | None], *more: tarfile.TarInfo) -> None:
    """A tar of these files (None: left out) and of members without bytes."""
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            if data is not None:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        for info in more:
            archive.addfile(info)


LAYOUTS: dict[str, Callable[[Path, list[Item]], None]] = {
    "folder": textfiles,
    "jsonl": metadata("jsonl"),
    "csv": metadata("csv"),
    "metadata.parquet": metadata("parquet"),
    "parquet": parquet,
    "tar": tar,
    "lance": lance_table,
}


def write(layout: str, root: str, items: list[Item], *, tmp: Path) -> None:
    """The data set below a root, which may be a prefix on S3."""
    folder = tmp / "upload" if objects.is_remote(root) else Path(root)
    folder.mkdir(parents=True, exist_ok=True)
    LAYOUTS[layout](folder, items)
    if objects.is_remote(root):
        for path in folder.rglob("*"):
            if path.is_file():
                objects.write(objects.join(root, str(path.relative_to(folder))), path.read_bytes())
