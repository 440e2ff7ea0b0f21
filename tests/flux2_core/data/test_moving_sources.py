"""R19: data that is edited while it is planned or encoded gives no picture a caption of another one."""

import hashlib
import json
import os
import shutil

import lance
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flux2_core.config.sections import Config, Latents
from flux2_core.data import intake, samples
from flux2_core.data.pictures import load
from flux2_core.errors import DataError
from tests.flux2_core import layout_files
from tests.flux2_core.layout_files import picture_table
from tests.flux2_core.pictures import encoded, noise

WORDS = ("red", "sky", "tan", "off")
CHANGED = "has changed since it was planned; run again"


def colour(word):
    return tuple(hashlib.sha256(word.encode()).digest()[:3])


def picture(word):
    """A picture with the caption's own colour in its corner, all of one length, whatever compresses them."""
    pixels_HWC = noise(16, 16, seed=list(word.encode()))
    pixels_HWC[0, 0] = colour(word)
    return encoded(Image.fromarray(pixels_HWC), "BMP")


def items(*words):
    return [(f"{word}.png", word, picture(word)) for word in words]


SET = items(*WORDS[:3])


def lance_deleted(root):
    lance.dataset(str(root / "train.lance")).delete("text = 'red'")


def lance_appended(root):
    lance.write_dataset(picture_table(items("off")), str(root / "train.lance"), mode="append")


def lance_rewritten(root):
    shutil.rmtree(root / "train.lance")
    layout_files.lance_table(root, SET[::-1])


def parquet_replaced(root):
    pq.write_table(picture_table(SET[1:]), root / "train-00000.parquet")


def parquet_replaced_by_one_of_its_size(root):
    path = root / "train-00000.parquet"
    size, seen = path.stat().st_size, path.stat()
    layout_files.parquet(root, SET[::-1])
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert path.stat().st_size == size


def tar_rewritten(root):
    texts = [text for _, text, _ in SET]
    layout_files.tar(root, [(name, text, picture(text)) for (name, *_), text in zip(SET, texts[::-1], strict=True)])


def picture_replaced(root):
    (root / "red.png").write_bytes(picture("off"))


def metadata_edited(root):
    rows = [{"file_name": name, "text": "off"} for name, *_ in SET]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


KEPT = {  # by case: the layout, and how many are kept; the others have a reason
    lance_deleted: ("lance", 3),
    lance_appended: ("lance", 3),
    lance_rewritten: ("lance", 0),
    parquet_replaced: ("parquet", 0),
    parquet_replaced_by_one_of_its_size: ("parquet", 0),
    tar_rewritten: ("tar", 0),
    picture_replaced: ("folder", 2),
    metadata_edited: ("jsonl", 3),
}
ROWS = [case for case, (layout, _) in KEPT.items() if layout not in ("folder", "jsonl")]


def config(root):
    sets = [{"path": str(root), "resolutions": [16]}]
    return Config.model_validate({"model": {"path": "m"}, "data": sets, "max_quarantined": 1.0})


def keys():
    return samples.Keys(text=str, latent=lambda sha256, _: sha256, mask=lambda sha256, _: sha256)


def encoding(planned):
    """What the encoder makes of a plan: the colour of each sample that is kept, by its caption; why others are not."""
    pixels, failed = {}, {}
    for key, row in samples.wanted(planned.samples).items():
        try:
            pixels[key] = load.load(row.uri, row.transform, latents=Latents(), sha256=row.sha256)
        except DataError as error:
            failed[key] = str(error).removeprefix(f"{row.uri}: ")
    left = intake.without(planned, failed)
    seen = {row["captions"][0]: pixels[row["latent_key"]] for row in left.samples.to_pylist()}
    return seen, dict(zip(left.quarantine["path"].to_pylist(), left.quarantine["reason"].to_pylist(), strict=True))


def unmixed(case, seen, reasons):
    assert not {word for word, pixels in seen.items() if not np.array_equal(pixels[0, 0], colour(word))}, "mispaired"
    assert len(seen) == KEPT[case][1]
    assert len(reasons) == len(SET) - len(seen)
    for path, reason in reasons.items():
        assert CHANGED in reason
        assert "@" not in path


@pytest.mark.parametrize("case", KEPT, ids=lambda case: case.__name__)
def test_r19_edited_between_plan_and_encode(tmp_path, case):
    """R19: 8 cases: what was planned is encoded, or left out by its name; no caption goes to another picture."""
    assert len(KEPT) == 8
    layout_files.write(KEPT[case][0], str(tmp_path / "set"), SET, tmp=tmp_path)
    planned = intake.build(config(tmp_path / "set"), keys())
    assert planned.samples.num_rows == 3
    case(tmp_path / "set")
    unmixed(case, *encoding(planned))


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.__name__)
def test_edited_between_captions_and_pictures(tmp_path, case):
    """The same while it is planned: captions were read, and then the container is another one."""
    layout_files.write(KEPT[case][0], str(tmp_path / "set"), SET, tmp=tmp_path)

    def edited(function, files):
        case(tmp_path / "set")
        return list(map(function, files))

    unmixed(case, *encoding(intake.build(config(tmp_path / "set"), keys(), mapper=edited)))
