"""R1 of reliability.md, one row per case: what `plan` makes of each odd picture file, and what `load` returns for it.

The outcome is `ok` (no warning), `ok_warn` (with these words) or `quarantine` (with these words in the reason); where
the picture is used, its pixels are compared with what the file means. Both decoders must give the same outcomes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux2_core.config.sections import Config, Latents
from flux2_core.data import intake
from flux2_core.data.pictures import load
from flux2_core.data.pictures.transform import Transform
from flux2_core.data.samples import TRANSFORM
from flux2_core.errors import DataError
from tests.flux2_core.data.pictures.test_colour import ADOBE_RGB, DISPLAY_P3, icc_profile, to_srgb_by_hand
from tests.flux2_core.data.pictures.test_load import BAD_CRC, HEADER_REFUSED, TURNED
from tests.flux2_core.pictures import encoded, noise, png

WHITE = 255
OK, WARN, QUARANTINE = "ok", "ok_warn", "quarantine"
ROW, COLUMN = np.mgrid[0:48, 0:64]
SMOOTH = np.stack([COLUMN * 4, ROW * 5, 255 - COLUMN * 2 - ROW * 2], axis=-1).astype(np.uint8)


@dataclass(frozen=True)
class Case:
    """A file (None: made by `arrange`), its outcome with the words that must be said, and the pixels that it means."""

    outcome: str
    data: bytes | None = None
    words: str = ""
    name: str = "x.jpg"
    pixels: np.ndarray | None = None
    tolerance: int = 0


def jpeg(image, **options):
    return encoded(image, "JPEG", quality=100, subsampling=0, **options)


def turned(orientation, fmt="JPEG"):
    exif = Image.Exif()
    exif[0x112] = orientation
    data = (
        jpeg(Image.fromarray(SMOOTH), exif=exif) if fmt == "JPEG" else encoded(Image.fromarray(SMOOTH), fmt, exif=exif)
    )
    return Case(OK, data, name=f"x.{fmt.lower()}", pixels=TURNED[orientation](SMOOTH), tolerance=6 * (fmt == "JPEG"))


def frames(fmt):
    first, second = Image.new("RGB", (64, 64), (255, 0, 0)), Image.new("RGB", (64, 64), (0, 0, 255))
    options = {"lossless": True} if fmt == "WEBP" else {}
    data = encoded(first, fmt, save_all=True, append_images=[second], **options)
    return Case(WARN, data, "first is used", f"x.{fmt.lower()}", np.full((64, 64, 3), (255, 0, 0)))


def profiled(primaries, gamma):
    rgb = SMOOTH // 2 + 60
    data = encoded(Image.fromarray(rgb), "PNG", icc_profile=icc_profile(b"RGB ", gamma, primaries))
    return Case(OK, data, name="x.png", pixels=to_srgb_by_hand(rgb, gamma, primaries), tolerance=2)


def hidden(mode):
    """Half of the picture is transparent, with a loud colour hidden there."""
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[:32] = (0, 200, 0, 255)
    rgba[32:] = (255, 0, 255, 0)
    image, shown = Image.fromarray(rgba), np.full((64, 64, 3), WHITE)
    shown[:32] = (0, 200, 0)
    if mode == "LA":
        image = image.convert("LA")
        shown[:32] = np.asarray(image)[0, 0, 0]
    return Case(OK, encoded(image, "PNG"), name="x.png", pixels=shown)


def palette(transparent):
    indexed = np.repeat([[0], [1]], 32, axis=0).repeat(64, axis=1).astype(np.uint8)
    image = Image.fromarray(indexed, "P")
    image.putpalette([10, 20, 30, 200, 100, 0])
    shown = np.array([[10, 20, 30], [200, 100, 0]])[indexed]
    if transparent:
        shown[32:] = WHITE
    return Case(OK, encoded(image, "PNG", **({"transparency": 1} if transparent else {})), name="x.png", pixels=shown)


def sixteen(channels):
    deep = np.linspace(0, 65535, 64 * 64 * channels).astype(">u2").reshape(64, 64, channels)
    raw = b"".join(b"\0" + row.tobytes() for row in deep)
    shown = np.broadcast_to(deep / 257.0, (64, 64, 3))
    return Case(OK, png(64, 64, 16, 0 if channels == 1 else 2, raw), name="x.png", pixels=shown, tolerance=1)


def refused(name, words, as_name="x.jpg"):
    return Case(QUARANTINE, HEADER_REFUSED[name][0], words, as_name)


def plain(name):
    return Case(OK, jpeg(Image.fromarray(SMOOTH)), name=name, pixels=SMOOTH, tolerance=6)


ONE_BIT = np.indices((64, 64)).sum(0) % 2 * 255
CASES = {
    **{f"EXIF orientation {value} in a JPEG": turned(value) for value in range(1, 9)},
    "EXIF orientation 6 in a PNG": turned(6, "PNG"),
    "CMYK": Case(WARN, encoded(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG", quality=100), "CMYK without",
                 pixels=np.full((64, 64, 3), (255, 0, 0)), tolerance=4),
    "16-bit grey": sixteen(1),
    "16-bit RGB": sixteen(3),
    "1-bit": Case(OK, encoded(Image.fromarray(ONE_BIT.astype(np.uint8)).convert("1"), "PNG"), name="x.png",
                  pixels=ONE_BIT[..., None]),
    "palette": palette(transparent=False),
    "palette with a transparent entry": palette(transparent=True),
    "RGBA with hidden colour": hidden("RGBA"),
    "LA with hidden grey": hidden("LA"),
    "Display P3": profiled(DISPLAY_P3, 2.2),
    "Adobe RGB": profiled(ADOBE_RGB, 2.19921875),
    "GIF of two frames": frames("GIF"),
    "WebP of two frames": frames("WEBP"),
    "APNG of two frames": frames("PNG"),
    "TIFF of two pages": frames("TIFF"),
    "AVIF": Case(OK, encoded(Image.fromarray(SMOOTH), "AVIF", quality=100), name="x.avif", pixels=SMOOTH, tolerance=16),
    "HEIC": refused("phone.heic", "HEIC", "x.heic"),
    "SVG": refused("drawing.svg", "SVG", "x.svg"),
    "float32 TIFF": refused("float.tif", "mode F", "x.tif"),
    "truncated": Case(QUARANTINE, jpeg(Image.fromarray(noise(200, 200)))[:9000], "damaged"),
    "bad CRC": Case(QUARANTINE, BAD_CRC, "damaged", "x.png"),
    "0 bytes": refused("empty.jpg", "empty"),
    "text named .jpg": refused("text.jpg", "is text"),
    "HTML named .jpg": refused("page.jpg", "HTML"),
    "AppleDouble ._x.jpg beside x.jpg": plain("x.jpg"),
    "AppleDouble named .jpg": refused("mac.jpg", "AppleDouble"),
    "PNG named .jpg": Case(WARN, encoded(Image.fromarray(SMOOTH), "PNG"), "is PNG", pixels=SMOOTH),
    ".JPG": plain("X.JPG"),
    "unicode and spaces in the name": plain("ein schönes Bild 🐈.jpg"),
    "196-megapixel bomb": refused("bomb.png", "196 megapixels", "x.png"),
    "text-chunk bomb": refused("text-bomb.png", "damaged", "x.png"),
    "1x1": Case(QUARANTINE, encoded(Image.new("RGB", (1, 1)), "PNG"), "too small: 1x1", "x.png"),
    "4000x8": Case(QUARANTINE, encoded(Image.new("RGB", (4000, 8)), "PNG"), "too small: 4000x8", "x.png"),
    "symlink loop": Case(QUARANTINE, words="leads nowhere"),
    "dangling link": Case(QUARANTINE, words="leads nowhere"),
    "folder named x.jpg": Case(QUARANTINE, words="folder"),
}  # fmt: skip


def arrange(folder: Path, title: str, case: Case) -> Path:
    """Put a case's file and its caption into a folder."""
    path = folder / case.name
    if case.data is not None:
        path.write_bytes(case.data)
    elif title == "symlink loop":
        path.symlink_to(path)
    elif title == "dangling link":
        path.symlink_to(folder / "nowhere.jpg")
    else:
        path.mkdir()
    path.with_suffix(".txt").write_text("a thing")
    if title.startswith("AppleDouble ._"):
        (folder / f"._{case.name}").write_bytes(HEADER_REFUSED["mac.jpg"][0])
    return path


def test_all_44_cases_are_there() -> None:
    """The table holds as many cases as reliability.md counts."""
    assert len(CASES) == 44


@pytest.mark.parametrize("decoder", ["pil", "fast"])
@pytest.mark.parametrize("title", CASES)
def test_each_case_has_its_outcome(tmp_path: Path, title: str, decoder: str) -> None:
    """`plan` keeps, remarks on or quarantines the picture, and `load` returns the pixels that the file means."""
    case = CASES[title]
    path = arrange(tmp_path, title, case)
    config = Config.model_validate({
        "model": {"path": "m"}, "latents": {"decoder": decoder},
        "data": [{"path": str(tmp_path), "resolutions": [32], "crop_aspect": "preserve"}],
    })  # fmt: skip
    planned = intake.build(config, text_key=str, latent_key=lambda s, t: f"{s}{t}", mask_key=lambda s, t: s)
    kept, left_out = planned.samples.to_pylist(), planned.quarantine.to_pylist()
    about = [warning for warning in planned.warnings if "text file without a picture" not in warning]
    if case.outcome == QUARANTINE:
        assert not kept
        assert [row["path"] for row in left_out] == [str(path)]
        assert case.words in left_out[0]["reason"]
        return
    assert not left_out
    assert [row["uri"] for row in kept] == [str(path)]
    assert bool(about) == (case.outcome == WARN), about
    assert case.words in " ".join(about)
    height, width = case.pixels.shape[:2]
    assert (kept[0]["height"], kept[0]["width"]) == (height, width)
    whole = Transform(height, width, height, width, 0, 0)
    seen = load.load(str(path), whole, latents=config.latents)
    assert np.abs(seen.astype(float) - case.pixels).max() <= case.tolerance
    small = load.load(str(path), Transform(**{name: kept[0][name] for name in TRANSFORM}), latents=config.latents)
    assert small.shape == (kept[0]["bucket_height"], kept[0]["bucket_width"], 3)


@pytest.mark.parametrize("title", [t for t, case in CASES.items() if case.outcome == QUARANTINE and case.data])
def test_what_plan_did_not_open_is_refused_by_load(tmp_path: Path, title: str) -> None:
    """The encoder gives the reason that `plan` would have given, with the path; too small ones never get there."""
    path = arrange(tmp_path, title, CASES[title])
    reason = load.inspect(str(path), decode=True, latents=Latents()).problem
    if reason is None:
        assert CASES[title].words.startswith("too small")
        return
    for decoder in ("pil", "fast"):
        with pytest.raises(DataError) as caught:
            load.load(str(path), Transform(16, 16, 16, 16, 0, 0), latents=Latents(decoder=decoder))
        assert str(caught.value) == f"{path}: {reason}"
