"""flux2_core.store.schemas: schemas, the identity of a table, Parquet at a URI."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flux2_core.errors import DataError
from flux2_core.store import objects, parquet, schemas


def test_parquet_round_trip(root):
    """A samples table comes back equal, with its metadata, from a folder and from S3."""
    columns = {
        name: pa.array([["a", "b"], []] if kind == pa.list_(pa.string()) else [None, None], kind)
        for name, kind in zip(schemas.samples_schema().names, schemas.samples_schema().types, strict=True)
    }
    columns[schemas.ID] = ["one", "zwei ü"]
    table = pa.table(columns, schema=schemas.samples_schema())
    uri = objects.join(root, "samples.parquet")
    parquet.write_parquet(uri, table, {"fingerprint": "abc"})
    read = parquet.read_parquet(uri)
    assert read.equals(table)
    assert read.schema.metadata[b"fingerprint"] == b"abc"


@pytest.mark.parametrize("place", [0.0, 0.1, 0.2, 0.5, 0.8, 0.9, 1.0])
def test_parquet_damage(tmp_path, place):
    """One bit flipped anywhere in a Parquet file is a DataError that names the file, never other rows."""
    table = pa.table({"path": [f"{n:032x}" for n in range(500)], "reason": ["r"] * 500, "dataset": [0] * 500})
    uri = str(tmp_path / "quarantine.parquet")
    parquet.write_parquet(uri, table.cast(schemas.quarantine_schema()), {})
    data = bytearray(objects.read(uri))
    data[min(int(place * len(data)), len(data) - 1)] ^= 0x10
    objects.write(uri, bytes(data))
    with pytest.raises(DataError, match=r"quarantine\.parquet"):
        parquet.read_parquet(uri)


@pytest.mark.parametrize("keep", [0, 3, 200])
def test_parquet_cut(tmp_path, keep):
    """A truncated Parquet file is a DataError."""
    uri = str(tmp_path / "quarantine.parquet")
    parquet.write_parquet(uri, schemas.quarantine_schema().empty_table(), {})
    objects.write(uri, objects.read(uri)[:keep])
    with pytest.raises(DataError, match="damaged"):
        parquet.read_parquet(uri)


def test_parquet_is_plain(tmp_path):
    """The embedded checksum does not keep another reader from opening the file."""
    table = pa.table({"path": ["a"], "reason": ["b"], "dataset": [0]}).cast(schemas.quarantine_schema())
    parquet.write_parquet(str(tmp_path / "t.parquet"), table, {})
    assert pq.read_table(tmp_path / "t.parquet").equals(table)


def test_parquet_missing(tmp_path):
    """Nothing there is FileNotFoundError, so that a stage can tell absent from damaged."""
    with pytest.raises(FileNotFoundError):
        parquet.read_parquet(str(tmp_path / "no.parquet"))


def test_identity():
    """Kind and fingerprint survive the trip through metadata; another contract version is refused by number."""
    metadata = schemas.identity("text", {"layers": (10, 20, 30), "a": "ü"})
    assert schemas.read_identity("uri", metadata) == ("text", {"layers": [10, 20, 30], "a": "ü"})
    with pytest.raises(DataError, match="contract version is 0"):
        schemas.read_identity("uri", metadata | {schemas.META_CONTRACT: "0"})
    with pytest.raises(DataError, match="damaged"):
        schemas.read_identity("uri", metadata | {schemas.META_FINGERPRINT: '{"a'})


@pytest.mark.parametrize("schema", [schemas.text_schema(), schemas.latents_schema()])
def test_key_is_marked(schema):
    """Without the mark on the key field racing writers duplicate rows."""
    assert schema.field(schemas.KEY).metadata == {b"lance-schema:unenforced-primary-key": b"true"}
    assert not schema.field(schemas.KEY).nullable


def test_rows_are_those_of_a_list(monkeypatch):
    """Rows of a table, one by one, sliced, from behind or all in turn, are the dictionaries of its list of rows."""
    monkeypatch.setattr(parquet, "AT_ONCE", 3)
    table = pa.table({"id": list("abcdefghij"), "parts": [[{"key": str(n)}] * (n % 3) for n in range(10)]})
    places = np.array([7, 1, 2, 9, 3, 0, 8])
    rows, listed = parquet.Rows(table, places), [table.to_pylist()[place] for place in places]
    assert list(rows) == listed == [rows[place] for place in range(len(rows))]
    assert rows[-1] == listed[-1]
    assert list(rows[1:5]) == listed[1:5]
    assert rows.column("id").to_pylist() == [row["id"] for row in listed]
    assert not parquet.Rows(table, places[:0])
    with pytest.raises(IndexError):
        rows[7]
