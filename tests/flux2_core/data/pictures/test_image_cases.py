"""R1 of reliability.md, one row per case: each odd picture file goes through `plan`, `cache` and `show`.

The outcome is `ok` (no warning), `ok_warn` (with these words) or `quarantine` (with these words in the reason); where
the picture is used, its pixels are compared with what the file means, and its latents with the VAE's own of them. All
cases lie in one data set, so that they are planned and encoded once for each decoder.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux2_core.config.sections import Latents
from flux2_core.data.pictures import load
from flux2_core.data.pictures.transform import Transform
from flux2_core.errors import DataError
from tests.flux2_core.data.pictures.test_colour import ADOBE_RGB, DISPLAY_P3, icc_profile, to_srgb_by_hand
from tests.flux2_core.data.pictures.test_load import BAD_CRC, HEADER_REFUSED, TURNED
from tests.flux2_core.driven import Driven, drive
from tests.flux2_core.pictures import encoded, noise, png, whole

WHITE = 255
OK, WARN, QUARANTINE = "ok", "ok_warn", "quarantine"
SIDE = 80  # over twice the 36 px to which `plan` shrinks what it has decoded; 80 and 96 are trained uncropped
HALF = SIDE // 2
ROW, COLUMN = np.mgrid[0:SIDE, 0:96]
SMOOTH = np.stack([COLUMN * 2, ROW * 3, 255 - COLUMN - ROW], axis=-1).astype(np.uint8)


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


FRAMES = "several frames or pages: the first is used"


def frames(fmt):
    first, second = Image.new("RGB", (SIDE, SIDE), (255, 0, 0)), Image.new("RGB", (SIDE, SIDE), (0, 0, 255))
    options = {"lossless": True} if fmt == "WEBP" else {}
    data = encoded(first, fmt, save_all=True, append_images=[second], **options)
    return Case(WARN, data, FRAMES, f"x.{fmt.lower()}", np.full((SIDE, SIDE, 3), (255, 0, 0)))


def profiled(primaries, gamma):
    rgb = SMOOTH // 2 + 60
    data = encoded(Image.fromarray(rgb), "PNG", icc_profile=icc_profile(b"RGB ", gamma, primaries))
    return Case(OK, data, name="x.png", pixels=to_srgb_by_hand(rgb, gamma, primaries), tolerance=2)


def hidden(mode):
    """Half of the picture is transparent, with a loud colour hidden there."""
    rgba = np.zeros((SIDE, SIDE, 4), np.uint8)
    rgba[:HALF] = (0, 200, 0, 255)
    rgba[HALF:] = (255, 0, 255, 0)
    image, shown = Image.fromarray(rgba), np.full((SIDE, SIDE, 3), WHITE)
    shown[:HALF] = (0, 200, 0)
    if mode == "LA":
        image = image.convert("LA")
        shown[:HALF] = np.asarray(image)[0, 0, 0]
    return Case(OK, encoded(image, "PNG"), name="x.png", pixels=shown)


def palette(transparent):
    indexed = np.repeat([[0], [1]], HALF, axis=0).repeat(SIDE, axis=1).astype(np.uint8)
    image = Image.fromarray(indexed, "P")
    image.putpalette([10, 20, 30, 200, 100, 0])
    shown = np.array([[10, 20, 30], [200, 100, 0]])[indexed]
    if transparent:
        shown[HALF:] = WHITE
    return Case(OK, encoded(image, "PNG", **({"transparency": 1} if transparent else {})), name="x.png", pixels=shown)


def sixteen(channels):
    deep = np.linspace(0, 65535, SIDE * SIDE * channels).astype(">u2").reshape(SIDE, SIDE, channels)
    raw = b"".join(b"\0" + row.tobytes() for row in deep)
    shown = np.broadcast_to(deep / 257.0, (SIDE, SIDE, 3))
    return Case(OK, png(SIDE, SIDE, 16, 0 if channels == 1 else 2, raw), name="x.png", pixels=shown, tolerance=1)


def refused(name, words, as_name="x.jpg"):
    return Case(QUARANTINE, HEADER_REFUSED[name][0], words, as_name)


def plain(name):
    return Case(OK, jpeg(Image.fromarray(SMOOTH)), name=name, pixels=SMOOTH, tolerance=6)


ONE_BIT = np.indices((SIDE, SIDE)).sum(0) % 2 * 255
CASES = {
    **{f"EXIF orientation {value} in a JPEG": turned(value) for value in range(1, 9)},
    "EXIF orientation 6 in a PNG": turned(6, "PNG"),
    "CMYK": Case(WARN, encoded(Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)), "JPEG", quality=100),
                 "CMYK without a usable ICC profile: converted by the plain formula, colours may differ",
                 pixels=np.full((SIDE, SIDE, 3), (255, 0, 0)), tolerance=4),
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
    "PNG named .jpg": Case(WARN, encoded(Image.fromarray(SMOOTH), "PNG"),
                           "the file is PNG, its name says .jpg: read as PNG", pixels=SMOOTH),
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


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each case's file, in a folder of its own of one data set."""
    root = tmp_path_factory.mktemp("pictures")
    found = {}
    for place, (title, case) in enumerate(CASES.items()):
        (root / f"{place:02}").mkdir()
        found[title] = arrange(root / f"{place:02}", title, case)
    return found


@pytest.fixture(scope="module", params=["pil", "fast"])
def driven(
    request: pytest.FixtureRequest, paths: dict[str, Path], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Driven:
    """All cases planned and cached; whole pictures of 80 and 96 px are what is trained."""
    root = next(iter(paths.values())).parents[1]
    pictures = {"path": str(root), "resolutions": [SIDE], "crop_aspect": "preserve"}
    return drive(tiny_model, tmp_path_factory.mktemp("cache"), pictures, latents={"decoder": request.param})


@pytest.mark.parametrize("title", CASES)
def test_r1_each_case_has_its_outcome(driven: Driven, paths: dict[str, Path], title: str) -> None:
    """`plan` quarantines it with its reason, which `show` repeats; or `show` has the latents of what the file means."""
    case, path = CASES[title], paths[title]
    sample_id = f"{path.parent.name}/{path.stem}"
    if case.outcome == QUARANTINE:
        assert case.words in driven.reasons[str(path)]
        with pytest.raises(DataError) as caught:
            driven.show(sample_id)
        assert str(caught.value) == f"{sample_id}: quarantined ({driven.reasons[str(path)]})"
        return
    assert str(path) not in driven.reasons
    seen = load.load(str(path), whole(*case.pixels.shape[:2]), latents=driven.config.latents)
    meant = np.broadcast_to(case.pixels, seen.shape)
    assert np.abs(seen.astype(float) - meant).max() <= case.tolerance
    shown = driven.show(sample_id)["latents"]
    assert shown.equal(driven.encoded(seen))
    assert shown.equal(driven.encoded(meant)) or case.tolerance


def test_r1_plan_warns_of_the_odd_ones_alone(driven: Driven) -> None:
    """Every case with the outcome `ok_warn` is counted under its words, and no other picture under any."""
    expected = Counter(case.words for case in CASES.values() if case.outcome == WARN)
    texts = {"a text file without a picture of its name": 3}  # beside the links that lead nowhere and the folder
    twins = {"the same bytes as another picture: kept, one latent row": 3}
    assert driven.warnings == {**expected, **texts, **twins}
    outcomes = Counter(case.outcome for case in CASES.values())
    assert driven.plan["samples"]["kept"] == outcomes[OK] + outcomes[WARN]
    assert len(driven.reasons) == outcomes[QUARANTINE]


@pytest.mark.parametrize("title", [t for t, case in CASES.items() if case.outcome == QUARANTINE and case.data])
def test_what_plan_did_not_open_is_refused_by_load(paths: dict[str, Path], title: str) -> None:
    """The encoder gives the reason that `plan` would have given, with the path; too small ones never get there."""
    path = paths[title]
    reason = load.inspect(str(path), decode=True, latents=Latents()).problem
    if reason is None:
        assert CASES[title].words.startswith("too small")
        return
    for decoder in ("pil", "fast"):
        with pytest.raises(DataError) as caught:
            load.load(str(path), Transform(16, 16, 16, 16, 0, 0), latents=Latents(decoder=decoder))
        assert str(caught.value) == f"{path}: {reason}"
