"""Masks and references belong to pictures by name; what is missing is said, never guessed."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flux2_core.config.dataset import Data
from flux2_core.config.places import beside
from flux2_core.config.reading import absolute
from flux2_core.config.sections import Config
from flux2_core.data.listing import Note, Rejected
from flux2_core.data.scan import NO_MASK, Candidate, scan
from flux2_core.data.sources.read import read
from flux2_core.errors import DataError
from flux2_core.store import objects
from tests.flux2_core.layout_files import pack, put

GOOD = b"better"
PICTURES = {"a.png": b"", "a.txt": b"a", "sub/b.jpg": b"", "sub/b.txt": b"b"}


def fill(root, files):
    for name, data in files.items():
        objects.write(objects.join(root, name), data)


def outcome(root, **options):
    found = list(scan(Data(path=root, **options), ordinal=2))
    kept = {item.id: item for item in found if isinstance(item, Candidate)}
    left_out = {item.path.removeprefix(f"{root}/"): item.reason for item in found if isinstance(item, Rejected)}
    notes = {item.path.removeprefix(f"{root}/"): item.message for item in found if isinstance(item, Note)}
    return kept, left_out, notes


def test_masks_below_the_data_set_are_no_samples(root):
    """`masks = "masks"` below `data.path`: any extension, sub-folders too; no mask: all is learned, and said."""
    fill(
        root, {**PICTURES, "c.png": b"", "c.txt": b"c", "masks/a.webp": b"", "masks/sub/b.png": b"", "masks/z.png": b""}
    )
    kept, left_out, notes = outcome(root, masks="masks")
    assert {name: item.mask for name, item in kept.items()} == {
        "a": objects.join(root, "masks/a.webp"), "sub/b": objects.join(root, "masks/sub/b.png"), "c": None,
    }  # fmt: skip
    assert (left_out, notes) == ({}, {"c.png": NO_MASK})


def test_references_in_order_of_their_folders(root, tmp_path):
    """Folders inside and outside; a picture has the references that exist, and that it has fewer is said; one that has
    none is left out, the folders are named."""
    fill(
        root, {**PICTURES, "c.png": b"", "c.txt": b"c", "before/a.jpg": b"", "depth/a.png": b"", "depth/sub/b.png": b""}
    )
    put(tmp_path, "style/a.png", b"")
    style = str(tmp_path / "style")
    kept, left_out, notes = outcome(root, references=("before", "depth", style))
    at = {
        name: objects.join(root, name) for name in ("before", "before/a.jpg", "depth", "depth/a.png", "depth/sub/b.png")
    }
    assert kept["a"].references == (at["before/a.jpg"], at["depth/a.png"], f"{style}/a.png")
    assert kept["sub/b"].references == (at["depth/sub/b.png"],)
    assert notes == {"sub/b.jpg": "it has 1 of 3 references: it is trained with those"}
    places = f"data.2.references.0={at['before']!r} nor data.2.references.1={at['depth']!r} nor"
    assert left_out == {"c.png": f"neither {places} data.2.references.2={style!r} holds a reference of its name"}
    alone = outcome(root, references=(style,))[1]
    assert alone["c.png"] == f"data.2.references.0={style!r} holds no reference of its name"


@pytest.mark.parametrize(("key", "value"), [("drop_references", 0.1), ("reference_size", "target")])
def test_settings_of_references_without_any_are_refused(root, key, value):
    """A key that would do nothing is a mistake; where the rows of metadata bring references it is none."""
    fill(root, PICTURES)
    with pytest.raises(
        DataError, match=rf"data\.2\.{key}={value!r}: no picture has a reference; set data\.2\.references"
    ):
        outcome(root, **{key: value})
    rows = [{"file_name": "a.png", "text": "a", "reference": "sub/b.jpg"}]
    fill(root, {"metadata.jsonl": "\n".join(map(json.dumps, rows)).encode()})
    assert outcome(root, **{key: value})[0]["a"].references


def test_the_same_name_wins_and_two_others_are_no_guess(tmp_path):
    """a.png takes a.png before a.jpg; b.png between b.jpg and b.webp is left out."""
    files = {"a.png": b"", "a.txt": b"a", "b.png": b"", "b.txt": b"b"}
    fill(str(tmp_path), files | {f"m/{name}": b"" for name in ("a.png", "a.jpg", "b.jpg", "b.webp")})
    kept, left_out, _ = outcome(str(tmp_path), masks="m")
    assert kept["a"].mask == f"{tmp_path}/m/a.png"
    assert left_out == {"b.png": "data.2.masks: b.jpg and b.webp could both belong to it: keep one"}


def test_members_of_archives_have_companions_by_their_names(tmp_path):
    """A tar's member finds its mask and reference in folders, by its path in the archive."""
    (tmp_path / "tars").mkdir()
    pack(tmp_path / "tars/0.tar", PICTURES)
    fill(str(tmp_path), {"m/a.png": b"", "m/sub/b.png": b"", "r/a.png": b"", "r/sub/b.png": b""})
    kept, left_out, _ = outcome(str(tmp_path / "tars"), masks=str(tmp_path / "m"), references=(str(tmp_path / "r"),))
    assert kept["sub/b"].mask == f"{tmp_path}/m/sub/b.png"
    assert kept["a"].references == (f"{tmp_path}/r/a.png",)
    assert not left_out


def test_metadata_names_masks_and_references(root):
    """Columns `mask`, `reference` and `references` name files of the folder, which are then no samples."""
    rows = [
        {"file_name": "a.png", "text": "a", "mask": "a-mask.png", "references": ["x.png", "./y/z.png"]},
        {"file_name": "b.png", "text": "b", "reference": "x.png"},
        {"file_name": "c.png", "text": "c", "references": ["x.png"] * 11},
        {"file_name": "d.png", "text": "d", "mask": 7},
        {"file_name": "e.png", "text": "e", "references": ["x.png"] * 10},
        {"file_name": "f.png", "text": "f"},
        {"file_name": "f.png", "text": "f", "mask": "a-mask.png"},
    ]
    names = ("a.png", "b.png", "c.png", "d.png", "e.png", "f.png", "a-mask.png", "x.png", "y/z.png")
    fill(root, dict.fromkeys(names, b"") | {"metadata.jsonl": "\n".join(map(json.dumps, rows)).encode()})
    kept, left_out, _ = outcome(root)
    assert kept["a"].mask == objects.join(root, "a-mask.png")
    assert kept["a"].references == (objects.join(root, "x.png"), objects.join(root, "y/z.png"))
    assert (kept["b"].mask, kept["b"].references) == (None, (objects.join(root, "x.png"),))
    assert len(kept["e"].references) == 10
    assert left_out.keys() == {"c.png", "d.png", "f.png"}
    assert "several rows say different things of it" in left_out["f.png"]
    assert "up to 10" in left_out["c.png"]
    assert "its mask, reference or rejected picture 7: int" in left_out["d.png"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"masks": "nowhere"}, r"data\.2\.masks=.*no such folder"),
        ({"references": ("sub", "nowhere")}, r"data\.2\.references\.1=.*no such folder"),
        ({"masks": "other"}, "no mask there has the name of a picture"),
    ],
)
def test_a_folder_that_gives_nothing_is_refused(tmp_path, options, says):
    """A misspelt folder stops the run instead of training without masks or references."""
    fill(str(tmp_path), {**PICTURES, "other/z.png": b""})
    with pytest.raises(DataError, match=says):
        outcome(str(tmp_path), **options)


def test_where_relative_folders_lie(tmp_path, monkeypatch):
    """Below `data.path` if it is there, else where the command runs; below a prefix on S3; absolute ones stay."""
    (tmp_path / "photos/masks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    data = [
        {"path": "photos", "masks": "masks", "references": ["masks", "other", "/r", "s3://b/r/"]},
        {"path": "s3://b/p/", "references": ["r"]},
    ]
    config = absolute(Config.model_validate({"model": {"path": "m"}, "data": data}))
    assert config.data[0].masks == str(tmp_path / "photos/masks")
    assert config.data[0].references == (str(tmp_path / "photos/masks"), str(tmp_path / "other"), "/r", "s3://b/r")
    assert config.data[1].references == ("s3://b/p/r",)
    assert absolute(config) == config
    assert beside("photos", "masks") == str(tmp_path / "photos/masks")


def test_pairs_by_name(root):
    """A folder of preferred pictures is the path; each has the worse one of its name, or is left out."""
    files = {"good/a.png": b"", "good/a.txt": b"a", "good/b.png": b"", "good/b.txt": b"b"}
    fill(root, files | {"bad/a.jpg": b"", "bad/z.png": b""})
    better, worse = objects.join(root, "good"), objects.join(root, "bad")
    data = Data(preferred=better, rejected=worse)
    found = list(scan(data, ordinal=0))
    (kept,) = (item for item in found if isinstance(item, Candidate))
    assert (kept.path, kept.captions, kept.rejected) == (f"{better}/a.png", ("a",), f"{worse}/a.jpg")
    assert kept.files == (kept.path, kept.rejected)
    (left_out,) = (item for item in found if isinstance(item, Rejected))
    assert left_out.path == f"{better}/b.png"
    assert left_out.reason == f"data.0.rejected={worse!r} holds no rejected picture of its name"


def test_pairs_of_columns(root):
    """Metadata and Parquet name both pictures of a pair in a row: columns of names, or of the pictures' bytes."""
    rows = [{"yes": "a.png", "no": "b.png", "text": "a"}, {"yes": "c.png", "text": "c"}]
    rows.append({"yes": "d.png", "no": "../x.png", "text": "d"})
    fill(root, dict.fromkeys(("m/a.png", "m/b.png", "m/c.png", "m/d.png"), b""))
    fill(root, {"m/metadata.jsonl": "\n".join(map(json.dumps, rows)).encode()})
    columns = {"preferred": "column:yes", "rejected": "column:no"}
    kept, left_out, _ = outcome(objects.join(root, "m"), **columns)
    assert {name: item.rejected for name, item in kept.items()} == {"a": objects.join(root, "m/b.png")}
    assert left_out["c.png"] == "its row names no rejected picture in column:no"
    assert "its mask, reference or rejected picture '../x.png'" in left_out["d.png"]
    table = pa.table({"yes": [GOOD, b"x"], "no": [b"worse", b"y"], "text": ["a", "b"]})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    fill(root, {"p/0.parquet": sink.getvalue().to_pybytes()})
    kept, _, _ = outcome(objects.join(root, "p"), **columns)
    first = next(iter(kept.values()))
    assert first.captions == ("a",)
    assert (read(first.path), read(first.rejected)) == (GOOD, b"worse")
    with pytest.raises(DataError, match=r"column:nowhere holds no picture bytes \(columns that do: yes, no\)"):
        outcome(objects.join(root, "p"), preferred="column:nowhere", rejected="column:no")


def test_columns_where_there_are_none(tmp_path):
    """A folder of files and an archive have no columns, and say so."""
    fill(str(tmp_path), PICTURES)
    with pytest.raises(DataError, match="a folder of picture files, which has no columns: rejected='column:no'"):
        outcome(str(tmp_path), preferred="column:yes", rejected="column:no")
