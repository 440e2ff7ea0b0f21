"""Pictures and captions are paired by name only, and nothing leaves the folder."""

import csv
import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from flux2_core.config.dataset import Data
from flux2_core.data.listing import Note, Rejected
from flux2_core.data.scan import Candidate, scan
from flux2_core.errors import DataError


def picture(colour="red"):
    out = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(out, "PNG")
    return out.getvalue()


PNG = picture()


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def outcome(root, **options):
    """Ids with captions, relative paths with reasons, relative paths with notes."""
    found = list(scan(Data(path=str(root), **options), ordinal=0))
    base = f"{os.path.abspath(root)}/"
    kept = {item.id: item.captions[0] for item in found if isinstance(item, Candidate)}
    left_out = {item.path.removeprefix(base): item.reason for item in found if isinstance(item, Rejected)}
    notes = {item.path.removeprefix(base): item.message for item in found if isinstance(item, Note)}
    assert len(kept) == sum(isinstance(item, Candidate) for item in found)
    assert all(len(item.captions) == 1 for item in found if isinstance(item, Candidate))
    return kept, left_out, notes


def jsonl(*rows):
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)


def test_sidecars_are_found_by_name_in_sorted_order(root):
    """Folders are read recursively; the id is the path without its extension; order is that of names."""
    write(root, {"b.png": PNG, "b.txt": "bee", "a/c.JPG": PNG, "a/c.txt": "sea\n", "a/b.webp": PNG, "a/b.TXT": "two"})
    kept, left_out, notes = outcome(root)
    assert list(kept.items()) == [("a/b", "two"), ("a/c", "sea"), ("b", "bee")]
    assert (left_out, notes) == ({}, {})


def test_paths_are_absolute(root, monkeypatch):
    """A relative `data.path` still gives absolute picture paths."""
    write(root, {"a.png": PNG, "a.txt": "x"})
    monkeypatch.chdir(root.parent)
    (found,) = scan(Data(path="photos"), ordinal=0)
    assert found.path == str(root / "a.png")


def test_same_base_names_are_never_confused(root):
    """a.png beside a.jpg keep their extensions as ids; equal names in two folders pair within their folder."""
    write(root, {"a.png": PNG, "a.jpg": PNG, "a.txt": "both", "x/b.png": PNG, "x/b.txt": "in x",
                 "y/b.png": PNG, "y/b.txt": "in y", "c.png": PNG, "c.png.gif": PNG,
                 "c.txt": "c", "c.png.txt": "gif"})  # fmt: skip
    kept, left_out, notes = outcome(root)
    assert kept == {"a.jpg": "both", "a.png": "both", "x/b": "in x", "y/b": "in y", "c": "c", "c.png.gif": "gif"}
    assert left_out == {}
    assert set(notes) == {"a.jpg", "a.png"}


@pytest.mark.parametrize(
    ("sidecar", "reason"),
    [
        (None, "a.txt is missing"),
        (b"", "blank"),
        (b" \r\n\xef\xbb\xbf", "blank"),
        ("é".encode("latin-1"), "not UTF-8"),
        ("x".encode("utf-16"), "UTF-16"),
        (b"a\0b", "NUL"),
        (b"a [trigger]", "no trigger is set"),
    ],
)
def test_a_picture_without_a_usable_caption_is_left_out(root, sidecar, reason):
    """Missing, blank and undecodable captions are reasons; the neighbour is untouched."""
    write(root, {"a.png": PNG, "b.png": PNG, "b.txt": "fine"})
    if sidecar is not None:
        write(root, {"a.txt": sidecar})
    kept, left_out, _ = outcome(root)
    assert kept == {"b": "fine"}
    assert list(left_out) == ["a.png"]
    assert reason in left_out["a.png"]


def test_the_default_caption_stands_in_for_none_and_blank_only(root):
    """`default_caption` replaces a missing or blank caption, never one that is there but unreadable."""
    write(root, {"a.png": PNG, "b.png": PNG, "b.txt": " ", "c.png": PNG, "c.txt": b"\xff\xff bad"})
    kept, left_out, _ = outcome(root, default_caption="a [trigger]", trigger="sks")
    assert kept == {"a": "a sks", "b": "a sks"}
    assert list(left_out) == ["c.png"]


def test_sources_of_captions(root):
    """`filename`, a fixed caption, `textfile` beside metadata: each takes its own source and no other."""
    write(root, {"a_red_cat.png": PNG, "a_red_cat.txt": "from text", "metadata.jsonl": ""})
    write(root, {"metadata.jsonl": jsonl({"file_name": "a_red_cat.png", "text": "from metadata"})})
    assert outcome(root, caption="filename")[0] == {"a_red_cat": "a red cat"}
    assert outcome(root, caption="photo of [name]", trigger="Ann")[0] == {"a_red_cat": "photo of Ann"}
    assert outcome(root, caption="textfile")[0] == {"a_red_cat": "from text"}
    assert outcome(root, caption="metadata")[0] == {"a_red_cat": "from metadata"}
    assert outcome(root)[0] == {"a_red_cat": "from metadata"}


def test_orphans_and_twins_of_caption_files(root):
    """A text without picture is noted, not silently passed over; a.txt beside a.TXT is not guessed between."""
    write(root, {"a.png": PNG, "a.txt": "one", "a.TXT": "two", "b.png": PNG, "b.txt": "b", "lost.txt": "?"})
    kept, left_out, notes = outcome(root)
    assert kept == {"b": "b"}
    assert "differ only in case" in left_out["a.png"]
    assert "without a picture" in notes["lost.txt"]


def test_what_is_no_picture_file(root, tmp_path):
    """Hidden and AppleDouble files are ignored; folders, pipes and links named like pictures have their reasons."""
    write(tmp_path, {"elsewhere/secret.png": PNG})
    write(root, {"ok.png": PNG, "ok.txt": "ok", "._ok.png": b"\0\x05\x16\x07", ".hidden.png": PNG, ".git/x.png": PNG,
                 "dir.jpg/in.png": PNG, "dir.jpg/in.txt": "in", "notes.md": "#"})  # fmt: skip
    os.mkfifo(root / "pipe.png")
    (root / "dangling.png").symlink_to(root / "nothing.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "out.png").symlink_to(tmp_path / "elsewhere" / "secret.png")
    (root / "outdir").symlink_to(tmp_path / "elsewhere")
    (root / "self").symlink_to(root)
    (root / "link.png").symlink_to(root / "ok.png")
    (root / "link.txt").symlink_to(root / "ok.txt")
    kept, left_out, _ = outcome(root)
    assert kept == {"ok": "ok", "dir.jpg/in": "in", "link": "ok"}
    expected = {"dir.jpg": "a folder", "pipe.png": "not a regular file", "dangling.png": "nowhere",
                "loop.png": "nowhere", "out.png": "leaves", "outdir": "leaves", "self": "own place"}  # fmt: skip
    assert left_out.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in left_out[name]


def test_a_caption_link_out_of_the_folder_is_refused(root, tmp_path):
    """The folder is a wall for captions too."""
    write(tmp_path, {"passwords.txt": "root:x"})
    write(root, {"a.png": PNG})
    (root / "a.txt").symlink_to(tmp_path / "passwords.txt")
    kept, left_out, _ = outcome(root)
    assert kept == {}
    assert "leaves" in left_out["a.png"]


def test_a_picture_without_a_picture_name_is_found(root):
    """A file whose name says nothing is asked for its first bytes."""
    write(root, {"IMG_0001": PNG, "IMG_0001.txt": "a", "b.bin": b"\x01\x02", "b.txt": "not a picture"})
    kept, _, notes = outcome(root)
    assert kept == {"IMG_0001": "a"}
    assert set(notes) == {"b.txt"}


def test_an_undecodable_file_name_is_left_out(root):
    """A name that is not UTF-8 cannot stand in a table: reason, with the bytes shown."""
    with open(os.fsencode(root) + b"/caf\xe9.png", "wb") as file:
        file.write(PNG)
    write(root, {"naïve 🐈.png": PNG, "naïve 🐈.txt": "cat"})
    kept, left_out, _ = outcome(root)
    assert kept == {"naïve 🐈": "cat"}
    ((path, reason),) = left_out.items()
    assert path.isascii()
    assert "not valid UTF-8" in reason


def as_csv(rows):
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerows([("file_name", "text"), *rows])
    return out.getvalue()


@pytest.mark.parametrize("layout", ["jsonl", "csv"])
def test_metadata_pairs_by_file_name(root, layout):
    """Rows in any order, a missing file, an unlisted picture, a.png beside a.jpg: no caption goes astray."""
    rows = [("sub/a.png", 'sub, "quoted"\nnext'), ("a.jpg", "jpg"), ("gone.png", "gone"), ("./a.png", "png")]
    text = as_csv(rows) if layout == "csv" else jsonl(*({"file_name": name, "text": text} for name, text in rows))
    write(root, {f"metadata.{layout}": b"\xef\xbb\xbf" + text.encode()})
    write(root, {"a.png": PNG, "a.jpg": PNG, "sub/a.png": PNG, "extra.png": PNG, "extra.txt": "not asked"})
    kept, left_out, _ = outcome(root)
    assert kept == {"a.png": "png", "a.jpg": "jpg", "sub/a": 'sub, "quoted"\nnext'}
    assert "missing" in left_out.pop("gone.png")
    assert "no row" in left_out.pop("extra.png")
    assert left_out == {}


@pytest.mark.parametrize(
    "name",
    ["../x.png", "sub/../../x.png", "sub/../ok.png", "/etc/passwd", "file:///etc/passwd", "http://h/x.png", "https://h/x.png",
     "s3://b/x.png", "a\0.png", "C:\\x.png", "\\\\host\\x.png", "..\\x.png", "out/x.png"],
)  # fmt: skip
@pytest.mark.parametrize("layout", ["jsonl", "csv"])
def test_metadata_cannot_leave_the_folder(root, tmp_path, name, layout):
    """Every way out of the folder is refused with its row; the good row beside it stays."""
    write(tmp_path, {"x.png": PNG, "elsewhere/x.png": PNG})
    (root / "out").symlink_to(tmp_path / "elsewhere")
    write(root, {"ok.png": PNG})
    rows = [("ok.png", "ok"), (name, "bad")]
    text = as_csv(rows) if layout == "csv" else jsonl(*({"file_name": name, "text": text} for name, text in rows))
    write(root, {f"metadata.{layout}": text})
    kept, left_out, _ = outcome(root)
    assert kept == {"ok": "ok"}
    left_out.pop("out")
    ((path, reason),) = left_out.items()
    assert ":2" in reason or ":3" in reason
    assert "\0" not in path


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"file_name": "a.png", "text": 7}, "int, not a string"),
        ({"file_name": "a.png", "text": {"x": 1}}, "dict, not a string"),
        ({"file_name": "a.png", "text": ["x", 7]}, "list with int"),
        ({"file_name": "a.png", "text": []}, "blank"),
        ({"file_name": "a.png", "text": None}, "no caption"),
        ({"file_name": "a.png"}, "no caption"),
        ({"file_name": "a.png", "text": "  "}, "blank"),
        ('{"file_name": "a.png", "text": "\\ud800"}', "lone surrogate"),
        ({"file_name": "a.png", "text": "x\0"}, "NUL"),
    ],
)
def test_metadata_texts_are_not_guessed(root, row, reason):
    """A text that is not a usable string leaves its picture out."""
    write(root, {"a.png": PNG, "metadata.jsonl": jsonl(row)})
    kept, left_out, _ = outcome(root)
    assert kept == {}
    assert reason in left_out["a.png"]


def test_bad_lines_are_left_out_by_their_number(root):
    """Lines that are no JSON objects, or name nothing, stand in quarantine as file:line; blank lines do not."""
    write(root, {"a.png": PNG, "metadata.jsonl": jsonl("{broken", "[1]", {"text": "x"}, "", {"file_name": 3},
                                                       {"file_name": "a.png", "text": "a"})})  # fmt: skip
    kept, left_out, _ = outcome(root)
    assert kept == {"a": "a"}
    assert {Path(path).name for path in left_out} == {f"metadata.jsonl:{line}" for line in (1, 2, 3, 5)}


def test_a_wrongly_encoded_row_harms_only_itself(root):
    """latin-1 in one row of UTF-8 metadata: that picture is left out."""
    for name, sep in (("metadata.jsonl", b""), ("metadata.csv", b"file_name,text\n")):
        good = b'{"file_name": "a.png", "text": "a"}\n' if not sep else b"a.png,a\n"
        bad = b'{"file_name": "b.png", "text": "caf\xe9"}\n' if not sep else b"b.png,caf\xe9\n"
        write(root, {"a.png": PNG, "b.png": PNG, name: sep + good + bad})
        kept, left_out, _ = outcome(root)
        assert kept == {"a": "a"}
        assert "UTF-8" in left_out["b.png"]
        (root / name).unlink()


def test_two_rows_for_one_picture(root):
    """The same caption twice is noted; two different ones are not chosen between."""
    rows = [
        {"file_name": name, "text": text}
        for name, text in [("a.png", "x"), ("./a.png", "x"), ("b.png", "x"), ("b.png", "y")]
    ]
    write(root, {"a.png": PNG, "b.png": PNG, "metadata.jsonl": jsonl(*rows)})
    kept, left_out, notes = outcome(root)
    assert kept == {"a": "x"}
    assert "different things" in left_out["b.png"]
    assert "several rows" in notes["a.png"]


def test_csv_that_would_be_misread(root):
    """An unquoted comma leaves its row out; an unclosed quote or a missing header refuses the file; 1 MB passes."""
    write(
        root, {"a.png": PNG, "b.png": PNG, "metadata.csv": "file_name,text\na.png,a cat, sitting\nb.png," + "x" * 10**6}
    )
    kept, left_out, _ = outcome(root)
    assert kept == {"b": "x" * 10**6}
    assert "quotes" in left_out["a.png"]
    for text, reason in [('file_name,text\na.png,"open\nb.png,b\n', "not CSV"), ("a.png,a cat\n", "columns")]:
        write(root, {"metadata.csv": text})
        with pytest.raises(DataError, match=reason):
            list(scan(Data(path=str(root)), ordinal=0))


def test_data_sets_that_are_refused_as_a_whole(root, tmp_path):
    """Missing folder, no pictures, two metadata files, metadata out of the folder or absent though asked for."""

    def refused(path=root, **options):
        with pytest.raises(DataError) as caught:
            list(scan(Data(path=str(path), **options), ordinal=3))
        return str(caught.value)

    assert "data.3.path" in refused(tmp_path / "absent")
    assert "no pictures" in refused()
    write(root, {"a.png": PNG})
    assert "caption='metadata' is none of auto, textfile" in refused(caption="metadata")
    write(tmp_path, {"m.jsonl": "{}"})
    (root / "metadata.jsonl").symlink_to(tmp_path / "m.jsonl")
    assert "leaves" in refused()
    (root / "metadata.jsonl").unlink()
    write(root, {"metadata.jsonl": "a".encode("utf-16")})
    assert "UTF-16" in refused()
    write(root, {"metadata.csv": "file_name,text\n"})
    assert "keep one" in refused()
