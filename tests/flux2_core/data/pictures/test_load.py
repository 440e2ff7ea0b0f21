"""Pictures: each odd file has its exact outcome, and pixels mean what their file says."""

import random
import zlib
from importlib.metadata import version

import numpy as np
import PIL
import pytest
from PIL import Image

from flux2_core.cache.fingerprints import recipe
from flux2_core.config.sections import Latents
from flux2_core.data.pictures import likeness
from flux2_core.data.pictures.transform import Transform
from flux2_core.errors import DataError
from tests.flux2_core.pictures import SEED, eight_bit, encoded, fit, inspect, load, noise, png, put, tiff, whole


def smooth(height=24, width=32):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 7, y * 9, 255 - x * 3 - y * 3], axis=-1).astype(np.uint8)


TURNED = {  # orientation -> stored pixels to seen pixels, by the EXIF specification's description of row 0, column 0
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, fmt, orientation):
    """All 8 orientations in every format that has them: size and pixels are those a viewer shows."""
    stored = smooth()
    exif = Image.Exif()
    exif[0x112] = orientation
    options = {"lossless": True} if fmt == "WEBP" else {"quality": 100} if fmt in ("JPEG", "AVIF") else {}
    path = put(tmp_path, f"x.{fmt.lower()}", encoded(Image.fromarray(stored), fmt, exif=exif, **options))
    seen = TURNED[orientation](stored)
    for decode in (False, True):
        inspected = inspect(path, decode=decode)
        assert (inspected.height, inspected.width) == seen.shape[:2]
        assert (inspected.problem, inspected.warnings) == (None, ())
    tolerance = 0 if fmt in ("PNG", "WEBP", "TIFF") else 25
    assert np.abs(eight_bit(path, *seen.shape[:2]) - seen).max() <= tolerance


def test_damaged_exif_leaves_the_picture_as_stored(tmp_path):
    """Garbage in the EXIF block is no reason to lose or turn a picture."""
    path = put(tmp_path, "x.png", encoded(Image.fromarray(smooth()), "PNG", exif=b"Exif\0\0garbage"))
    for decode in (False, True):
        seen = inspect(path, decode=decode)
        assert (seen.problem, seen.width, seen.height) == (None, 32, 24)
        assert "EXIF" in seen.warnings[0]
    assert np.array_equal(eight_bit(path), smooth())


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_of_several_frames(tmp_path, fmt):
    """GIF, WebP, APNG and TIFF pages: the first frame is used, with a warning."""
    first, second = Image.new("RGB", (32, 24), (255, 0, 0)), Image.new("RGB", (32, 24), (0, 0, 255))
    options = {"lossless": True} if fmt == "WEBP" else {}
    path = put(tmp_path, f"x.{fmt.lower()}", encoded(first, fmt, save_all=True, append_images=[second], **options))
    assert (eight_bit(path) == [255, 0, 0]).all()
    for decode in (False, True):
        assert "the first is used" in inspect(path, decode=decode).warnings[0]


def test_a_phones_second_picture_is_no_second_frame(tmp_path):
    """Phones append a preview or gain map to a JPEG (MPO): no reason to warn about each photo."""
    main, preview = Image.new("RGB", (32, 24), (0, 200, 0)), Image.new("RGB", (8, 6))
    path = put(tmp_path, "x.jpg", encoded(main, "MPO", save_all=True, append_images=[preview]))
    assert inspect(path, decode=True).warnings == ()
    assert np.abs(eight_bit(path) - [0, 200, 0]).max() <= 3


def test_the_content_decides_not_the_name(tmp_path):
    """A PNG named .jpg is read as PNG and remarked on; upper case, spaces and unicode in names are nothing special."""
    data = encoded(Image.fromarray(noise()), "PNG")
    seen = inspect(put(tmp_path, "x.jpg", data), decode=True)
    assert seen.problem is None
    assert "is PNG" in seen.warnings[0]
    assert np.array_equal(eight_bit(tmp_path / "x.jpg"), noise())
    for name in ("X.PNG", "ein schönes Bild 🐈.png", "e\u0301.png"):
        assert inspect(put(tmp_path, name, data), decode=True).warnings == ()


def huge_png():
    return png(14000, 14000, 8, 0, b"")


def text_bomb():
    bomb = b"Comment\0\0" + zlib.compress(bytes(200 * 2**20), 1)
    return png(2, 2, 8, 0, bytes(6), (b"zTXt", bomb), (b"zTXt", bomb))


JPEG_BYTES = encoded(Image.fromarray(noise(200, 200)), "JPEG")
PNG_BYTES = encoded(Image.fromarray(noise(64, 64)), "PNG")
BAD_CRC = PNG_BYTES[:-20] + bytes([PNG_BYTES[-20] ^ 1]) + PNG_BYTES[-19:]

HEADER_REFUSED = {
    "empty.jpg": (b"", "empty"),
    "text.jpg": (b"just some words\n", "text"),
    "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
    "drawing.svg": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40), "HEIC"),
    "clip.jpg": (b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + bytes(40), "video"),
    "mac.jpg": (b"\0\x05\x16\x07\0\x02\0\0Mac OS X" + bytes(60), "AppleDouble"),
    "x.psd": (b"8BPS\0\x01" + bytes(40), "Photoshop"),
    "x.dng": (encoded(Image.fromarray(noise()), "TIFF"), "camera raw"),
    "bytes.png": (b"\xde\xad\xbe\xef" * 20, "no known format .starts with de ad"),
    "half.png": (PNG_BYTES[: len(PNG_BYTES) // 2], "damaged"),
    "crc.png": (BAD_CRC, "damaged.*IDAT"),
    "header.jpg": (JPEG_BYTES[:40], "damaged"),
    "bomb.png": (huge_png(), "196 megapixels; up to 100"),
    "text-bomb.png": (text_bomb(), "damaged.*(large|memory)"),
    "float.tif": (encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"), "mode F"),
    "int.tif": (encoded(Image.fromarray(np.zeros((8, 8), np.int32)), "TIFF"), "mode I"),
    "trns16.png": (
        png(1, 1, 16, 2, bytes(7), (b"tRNS", bytes(6))),
        "transparent colour in a 16-bit RGB",
    ),
}


@pytest.mark.parametrize("name", HEADER_REFUSED)
@pytest.mark.parametrize("decode", [False, True])
def test_what_is_no_usable_picture_has_its_reason(tmp_path, name, decode):
    """Broken, foreign and monstrous files are problems with words, and `load` raises the same words with the path."""
    data, reason = HEADER_REFUSED[name]
    path = put(tmp_path, name, data)
    seen = inspect(path, decode=decode)
    assert seen.problem is not None
    assert str(path) not in seen.problem
    with pytest.raises(DataError, match=reason) as caught:
        load(path, whole(8, 8))
    assert str(caught.value) == f"{path}: {seen.problem}"


LARGE = 200  # px: over twice the 36 to which `inspect` shrinks what it has decoded
DEEP = np.linspace(0, 65535, LARGE).astype(np.uint16)[:, None] // np.array([1, 2], np.uint16).repeat(LARGE // 2)


def deep_png(colour_type, *planes, extra=()):
    rows = np.stack(planes, axis=-1).astype(">u2")
    return png(LARGE, LARGE, 16, colour_type, b"".join(b"\0" + row.tobytes() for row in rows), *extra)


def deep_tiff(photometric, *planes, **options):
    raw = np.stack(planes, axis=-1).astype("<u2").tobytes()
    return tiff(LARGE, LARGE, len(planes), raw, photometric=photometric, **options)


FLIPPED = DEEP[::-1]
SHALLOW = Image.fromarray(np.stack([DEEP // 257, FLIPPED // 257, DEEP // 300], axis=-1).astype(np.uint8))
LOOKED_AT = {
    "16-bit grey PNG": deep_png(0, DEEP),
    "16-bit grey PNG with a transparent grey": deep_png(0, DEEP, extra=[(b"tRNS", DEEP[120, 0].tobytes()[::-1])]),
    "16-bit grey PNG with alpha": deep_png(4, DEEP, FLIPPED),
    "16-bit RGB PNG": deep_png(2, DEEP, FLIPPED, DEEP),
    "16-bit RGBA PNG": deep_png(6, DEEP, FLIPPED, DEEP, FLIPPED),
    "16-bit grey TIFF": deep_tiff(1, DEEP),
    "16-bit grey TIFF, white is 0": deep_tiff(0, DEEP),
    "16-bit grey TIFF, packed": encoded(Image.fromarray(DEEP), "TIFF", compression="tiff_lzw"),
    "16-bit grey TIFF, big-endian": encoded(
        Image.frombytes("I;16B", (LARGE, LARGE), DEEP.astype(">u2").tobytes()), "TIFF"
    ),
    "16-bit RGB TIFF": deep_tiff(2, DEEP, FLIPPED, DEEP),
    "16-bit RGBA TIFF": deep_tiff(2, DEEP, FLIPPED, DEEP, FLIPPED, extra=2),
    **{f"{mode} TIFF": encoded(SHALLOW.convert(mode), "TIFF")
       for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")},
    **{f"{mode} PNG": encoded(SHALLOW.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGBA")},
    "L JPEG": encoded(SHALLOW.convert("L"), "JPEG"),
    "P GIF": encoded(SHALLOW.convert("P"), "GIF"),
    "P BMP": encoded(SHALLOW.convert("P"), "BMP"),
    "RGBA WebP": encoded(SHALLOW.convert("RGBA"), "WEBP"),
    "RGBA AVIF": encoded(SHALLOW.convert("RGBA"), "AVIF"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOKED_AT)
def test_what_load_reads_inspect_looks_at(tmp_path, name):
    """Every kind of pixels is decoded and shrunk without complaint, and looks like what `load` returns."""
    path = put(tmp_path, "x.bin", LOOKED_AT[name])
    seen = inspect(path, decode=True)
    assert (seen.problem, seen.width, seen.height) == (None, LARGE, LARGE)
    whole_look = likeness.look(Image.fromarray(load(path, whole(LARGE, LARGE))))
    if not name.startswith(
        ("1 ", "P ")
    ):  # dithered here, and Pillow does not average them: it takes some of the pixels
        assert likeness.alike([seen.look, whole_look]) == [[0, 1]]


def test_a_tiff_of_a_kind_that_is_not_read(tmp_path):
    """16-bit grey with alpha: sound, but Pillow knows no such TIFF; the reason does not call it damaged alone."""
    path = put(tmp_path, "x.tif", deep_tiff(1, DEEP, FLIPPED, extra=2))
    assert inspect(path, decode=True).problem == (
        "damaged, or of a kind that is not read: save it again as PNG, 8 or 16-bit"
    )


@pytest.mark.parametrize("fmt", ["JPEG", "GIF", "WEBP", "TIFF", "BMP", "AVIF", "PNG"])
def test_a_truncated_file_is_found_by_decoding(tmp_path, fmt):
    """Half a file of any format is refused, never padded with grey."""
    data = encoded(Image.fromarray(noise(200, 200)), fmt)
    path = put(tmp_path, f"x.{fmt.lower()}", data[: len(data) // 2])
    assert "damaged" in inspect(path, decode=True).problem
    with pytest.raises(DataError, match="damaged"):
        load(path, whole(200, 200))


@pytest.mark.parametrize("fmt", ["JPEG", "GIF", "WEBP", "TIFF", "BMP", "AVIF", "PNG"])
def test_damage_never_crashes(tmp_path, fmt):
    """120 random overwrites per format: an outcome every time, never an exception of the decoder's own kind."""
    draw = random.Random(SEED)
    clean = encoded(Image.fromarray(smooth()), fmt)
    for trial in range(120):
        data = bytearray(clean)
        for _ in range(draw.choice([1, 4, 40])):
            data[draw.randrange(len(data) if trial % 2 else min(len(data), 200))] = draw.randrange(256)
        path = put(tmp_path, f"x.{fmt.lower()}", bytes(data))
        if inspect(path, decode=True).problem is None:
            try:
                load(path, whole(24, 32))
            except DataError as error:
                assert str(path) in str(error)  # noqa: PT017 - most trials raise nothing


def test_missing_file_and_folder(tmp_path):
    """A path that cannot be read is a problem, not an exception."""
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    for name in ("absent.jpg", "folder.jpg", "dangling.jpg", "loop.jpg"):
        seen = inspect(tmp_path / name, decode=True)
        assert seen.problem.startswith("cannot be read")
        assert seen.sha256 == ""


def test_a_changed_file_is_refused(tmp_path):
    """`load` can insist on the bytes that were planned."""
    path = put(tmp_path, "x.png", encoded(Image.fromarray(noise()), "PNG"))
    planned = inspect(path, decode=False).sha256
    load(path, whole(24, 32), sha256=planned)
    put(tmp_path, "x.png", encoded(Image.fromarray(noise(seed=8)), "PNG"))
    with pytest.raises(DataError, match="changed since"):
        load(path, whole(24, 32), sha256=planned)


def triangle(source, size):
    """Antialiased linear resampling of axis 0, by its definition: a triangle two source or target steps wide."""
    scale = len(source) / size
    reach = max(scale, 1.0)
    rows = []
    for target in range(size):
        centre = (target + 0.5) * scale
        low, high = max(0, int(centre - reach + 0.5)), min(len(source), int(centre + reach + 0.5))
        weights = np.maximum(0, 1 - np.abs((np.arange(low, high) + 0.5 - centre) / reach))
        rows.append(np.tensordot(weights / weights.sum(), source[low:high].astype(np.float64), axes=1))
    return np.array(rows)


@pytest.mark.parametrize("flip", [False, True])
def test_resize_crop_and_flip_follow_their_definition(tmp_path, flip):
    """Pixels equal the antialiased triangle filter written out in floats, within its 8-bit rounding, then the crop."""
    rgb = noise(90, 150)
    transform = Transform(32, 48, 36, 60, 2, 5, flip=flip)
    path = put(tmp_path, "x.png", encoded(Image.fromarray(rgb), "PNG"))
    across = np.rint(triangle(rgb.swapaxes(0, 1), 60)).swapaxes(0, 1)
    expected = triangle(across, 36)[2:34, 5:53]
    expected = expected[:, ::-1] if flip else expected
    seen = load(path, transform)
    assert seen.shape == (32, 48, 3)
    assert seen.dtype == np.uint8
    assert np.abs(seen - expected).max() <= 1.01


def test_inspect_and_load_agree_on_the_size(tmp_path):
    """The transform that `fit` makes of an inspected, turned picture is what `load` crops."""
    stored = smooth(64, 200)
    exif = Image.Exif()
    exif[0x112] = 6
    path = put(tmp_path, "x.png", encoded(Image.fromarray(stored), "PNG", exif=exif))
    seen = inspect(path, decode=False)
    transform = fit(seen.width, seen.height, 64)
    assert transform.bucket_height > transform.bucket_width
    assert load(path, transform).shape == (transform.bucket_height, transform.bucket_width, 3)


def test_the_recipe_is_plain_and_names_the_decoder():
    """The recipe goes into a fingerprint: text only, with the versions that change pixels and each setting's effect."""
    recipes = [recipe(Latents(**latents)) for latents in ({}, {"decoder": "fast"}, {"background": "#00FF00"})]
    assert all(isinstance(value, str) for made in recipes for value in made.values())
    assert recipes[0]["pillow"] == PIL.__version__
    assert recipes[0] != recipes[1] != recipes[2] != recipes[0]
    assert all(f"{name} {version(name).split('+')[0]}" in recipes[1]["decoder"] for name in ("simplejpeg", "torch"))
    assert recipe(Latents(background="#00ff00")) == recipes[2], "the same colour in other letters"
