"""Pictures: each odd file has its exact outcome, and pixels mean what their file says."""

import io
import random
import struct
import zlib

import numpy as np
import PIL
import pytest
from PIL import Image, ImageCms

from flux2_core import images
from flux2_core.buckets import Transform, fit
from flux2_core.errors import DataError

SEED = 7


def noise(height=24, width=32, channels=3, seed=SEED):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(height=24, width=32):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 7, y * 9, 255 - x * 3 - y * 3], axis=-1).astype(np.uint8)


def whole(height, width):
    return Transform(height, width, height, width, 0, 0)


def eight_bit(path, height=24, width=32):
    """What `load` returns, back on the 0..255 scale, (H, W, 3)."""
    return np.rint((images.load(path, whole(height, width)).transpose(1, 2, 0) + 1) * 127.5)


def encoded(image, fmt, **options):
    out = io.BytesIO()
    image.save(out, fmt, **options)
    return out.getvalue()


def put(folder, name, data):
    path = folder / name
    path.write_bytes(data)
    return path


def png(width, height, depth, colour_type, raw, *chunks):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    extra = b"".join(chunk(kind, data) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


# D50-adapted primaries, columns R, G, B
SRGB = np.array([[0.4360, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
DISPLAY_P3 = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
ADOBE_RGB = np.array([[0.6097, 0.2053, 0.1492], [0.3111, 0.6257, 0.0632], [0.0195, 0.0609, 0.7446]])


def icc_profile(space, gamma, primaries=None):
    """A version 2 matrix (or grey) profile, written from the ICC specification."""

    def xyz(values):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    text = b"test\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78),
        b"cprt": b"text\0\0\0\0" + text,
        b"wtpt": xyz((0.9642, 1.0, 0.8249)),
    }
    if primaries is None:
        tags[b"kTRC"] = curve
    else:
        for letter, column in zip(b"rgb", primaries.T, strict=True):
            tags[bytes([letter]) + b"XYZ"] = xyz(column)
            tags[bytes([letter]) + b"TRC"] = curve
    body, table, offset = b"", b"", 132 + 12 * len(tags)
    for tag, data in tags.items():
        data += bytes(-len(data) % 4)
        table += tag + struct.pack(">II", offset + len(body), len(data))
        body += data
    head = struct.pack(">I4s4s4s4s4s", 0, b"test", b"\x02\x40\0\0", b"mntr", space, b"XYZ ") + bytes(12) + b"acsp"
    head = (head + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)).ljust(128, b"\0")
    whole_profile = head + struct.pack(">I", len(tags)) + table + body
    return struct.pack(">I", len(whole_profile)) + whole_profile[4:]


def to_srgb_by_hand(rgb, gamma, primaries):
    linear = np.linalg.inv(SRGB) @ primaries @ (rgb.reshape(-1, 3).T / 255.0) ** gamma
    linear = linear.clip(0, 1)
    coded = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (coded.T * 255).reshape(rgb.shape)


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
        inspected = images.inspect(path, decode=decode)
        assert (inspected.height, inspected.width) == seen.shape[:2]
        assert (inspected.problem, inspected.warnings) == (None, ())
    tolerance = 0 if fmt in ("PNG", "WEBP", "TIFF") else 25
    assert np.abs(eight_bit(path, *seen.shape[:2]) - seen).max() <= tolerance


def test_damaged_exif_leaves_the_picture_as_stored(tmp_path):
    """Garbage in the EXIF block is no reason to lose or turn a picture."""
    path = put(tmp_path, "x.png", encoded(Image.fromarray(smooth()), "PNG", exif=b"Exif\0\0garbage"))
    for decode in (False, True):
        seen = images.inspect(path, decode=decode)
        assert (seen.problem, seen.width, seen.height) == (None, 32, 24)
        assert "EXIF" in seen.warnings[0]
    assert np.array_equal(eight_bit(path), smooth())


@pytest.mark.parametrize(("space", "gamma"), [(DISPLAY_P3, 2.2), (ADOBE_RGB, 2.19921875), (SRGB, 1.0)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_an_icc_profile_is_converted_to_srgb(tmp_path, space, gamma, mode):
    """Display P3, Adobe RGB and linear light come out as the matrix arithmetic of the ICC specification says."""
    # a smooth palette, so that mode P is exact
    rgb = np.array([[[r, g, b] for r in (30, 128, 220) for g in (40, 200)] for b in (10, 90, 180, 250)], dtype=np.uint8)
    image = Image.fromarray(rgb)
    image = image.quantize(24, dither=Image.Dither.NONE) if mode == "P" else image.convert(mode)
    assert np.array_equal(np.asarray(image.convert("RGB")), rgb)
    path = put(tmp_path, "x.png", encoded(image, "PNG", icc_profile=icc_profile(b"RGB ", gamma, space)))
    expected = to_srgb_by_hand(rgb, gamma, space)
    assert np.abs(expected - rgb).max() > 8
    assert np.abs(eight_bit(path, *rgb.shape[:2]) - expected).max() <= 2
    assert images.inspect(path, decode=True).warnings == ()


def test_an_srgb_profile_changes_no_pixel(tmp_path):
    """Pixels that are sRGB already stay bit for bit: lcms's rounding would move some of them."""
    rgb = noise()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = put(tmp_path, "x.png", encoded(Image.fromarray(rgb), "PNG", icc_profile=srgb))
    assert np.array_equal(eight_bit(path), rgb)


def test_a_grey_profile_and_an_rgb_profile_on_grey(tmp_path):
    """Grey pictures follow a grey profile; an RGB profile on them (common) is applied to R = G = B."""
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = to_srgb_by_hand(np.repeat(grey[..., None], 3, axis=2), 1.4, SRGB)
    for profile in (icc_profile(b"GRAY", 1.4), icc_profile(b"RGB ", 1.4, SRGB)):
        path = put(tmp_path, "x.png", encoded(Image.fromarray(grey), "PNG", icc_profile=profile))
        assert np.abs(eight_bit(path, 16, 16) - expected).max() <= 2


@pytest.mark.parametrize(
    ("profile", "words"),
    [(b"not a profile at all", "cannot be read"), (icc_profile(b"GRAY", 1.4), "ICC profile is for GRAY")],
)
def test_an_unusable_profile_is_ignored_with_a_warning(tmp_path, profile, words):
    """A broken or unfitting profile leaves pixels as stored, and says so."""
    rgb = noise()
    path = put(tmp_path, "x.png", encoded(Image.fromarray(rgb), "PNG", icc_profile=profile))
    assert np.array_equal(eight_bit(path), rgb)
    for decode in (False, True):
        (warning,) = images.inspect(path, decode=decode).warnings
        assert words in warning


def test_cmyk_is_not_inverted(tmp_path):
    """CMYK JPEGs (which Adobe stores inverted) come out in the right sense, with a warning about the guess."""
    path = put(tmp_path, "x.jpg", encoded(Image.new("CMYK", (32, 24), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(eight_bit(path) - np.array([255, 0, 0])).max() <= 4
    assert "CMYK" in images.inspect(path, decode=True).warnings[0]


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    """PNG and TIFF, either byte order and either sense: 0..65535 becomes 0..255, rounded."""
    deep = np.linspace(0, 65535, 24 * 32).astype(np.uint16).reshape(24, 32)
    expected = np.repeat(np.rint(deep / 257.0)[..., None], 3, axis=2)
    image = Image.fromarray(deep)
    for name, data, want in [
        ("a.png", encoded(image, "PNG"), expected),
        ("b.tif", encoded(image, "TIFF"), expected),
        ("c.tif", encoded(image, "TIFF", tiffinfo={262: 0}), 255 - expected),
        ("d.tif", encoded(Image.frombytes("I;16B", (32, 24), deep.astype(">u2").tobytes()), "TIFF"), expected),
    ]:
        assert np.abs(eight_bit(put(tmp_path, name, data)) - want).max() <= 0, name


def test_sixteen_bit_rgb_png(tmp_path):
    """48-bit PNGs keep their high byte: at most one level from exact."""
    deep = np.linspace(0, 65535, 24 * 32 * 3).astype(">u2").reshape(24, 32, 3)
    raw = b"".join(b"\0" + row.tobytes() for row in deep)
    path = put(tmp_path, "x.png", png(32, 24, 16, 2, raw))
    assert np.abs(eight_bit(path) - deep / 257.0).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_colour_hidden_under_alpha_never_shows(tmp_path, mode):
    """Alpha is laid over white before resizing: what is transparent is white, edges mix with white only."""
    grey = Image.fromarray(np.where(np.arange(32)[None, :] < 16, 0, 200).astype(np.uint8).repeat(24, axis=0))
    alpha = Image.fromarray(np.where(np.arange(32)[None, :] < 16, 0, 255).astype(np.uint8).repeat(24, axis=0))
    image = Image.merge("LA", (grey, alpha)) if mode == "LA" else Image.merge("RGBA", (grey, grey, grey, alpha))
    path = put(tmp_path, "x.png", encoded(image, "PNG"))
    seen = eight_bit(path)
    assert (seen[:, :16] == 255).all()
    assert (seen[:, 16:] == 200).all()
    half = (images.load(path, Transform(12, 16, 12, 16, 0, 0)) + 1) * 127.5
    assert half.min() >= 199.9


def test_half_transparent_is_mixed_with_white(tmp_path):
    """Composition is a*c + (1-a)*255, rounded."""
    rgba = noise(channels=4)
    path = put(tmp_path, "x.webp", encoded(Image.fromarray(rgba), "WEBP", lossless=True, exact=True))
    alpha = rgba[..., 3:] / 255
    assert np.abs(eight_bit(path) - (alpha * rgba[..., :3] + (1 - alpha) * 255)).max() <= 0.51


def test_palette_with_transparency(tmp_path):
    """A palette entry that tRNS makes transparent is white, the others keep their colours."""
    image = Image.new("P", (32, 24), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(0, (0, 0, 16, 24))
    path = put(tmp_path, "x.png", encoded(image, "PNG", transparency=0))
    seen = eight_bit(path)
    assert (seen[:, :16] == 255).all()
    assert (seen[:, 16:] == [200, 100, 50]).all()


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_transparent_grey_at_every_depth(tmp_path, depth):
    """Grey PNGs of 1, 2, 4, 8 and 16 bits with a transparent grey: that one is white, all others keep their level."""
    top = 2**depth - 1
    levels = [0, top] if depth == 1 else [0, 1, top - 1, top]
    hidden = levels[-2]
    bits = "".join(f"{level:0{depth}b}" for level in levels)
    raw = b"\0" + int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    path = put(tmp_path, "x.png", png(len(levels), 1, depth, 0, raw, (b"tRNS", struct.pack(">H", hidden))))
    expected = [255 if level == hidden else round(level * 255 / top) for level in levels]
    assert eight_bit(path, 1, len(levels))[0, :, 0].tolist() == expected


def test_one_bit_and_plain_grey(tmp_path):
    """1-bit is black and white, grey is three equal channels."""
    grey = noise(channels=1)
    assert (eight_bit(put(tmp_path, "g.png", encoded(Image.fromarray(grey), "PNG"))) == grey[..., None]).all()
    bits = encoded(Image.fromarray(grey > 128), "PNG")
    assert (eight_bit(put(tmp_path, "b.png", bits)) == np.where(grey > 128, 255, 0)[..., None]).all()


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_of_several_frames(tmp_path, fmt):
    """GIF, WebP, APNG and TIFF pages: the first frame is used, with a warning."""
    first, second = Image.new("RGB", (32, 24), (255, 0, 0)), Image.new("RGB", (32, 24), (0, 0, 255))
    options = {"lossless": True} if fmt == "WEBP" else {}
    path = put(tmp_path, f"x.{fmt.lower()}", encoded(first, fmt, save_all=True, append_images=[second], **options))
    assert (eight_bit(path) == [255, 0, 0]).all()
    for decode in (False, True):
        assert "the first is used" in images.inspect(path, decode=decode).warnings[0]


def test_the_content_decides_not_the_name(tmp_path):
    """A PNG named .jpg is read as PNG and remarked on; upper case, spaces and unicode in names are nothing special."""
    data = encoded(Image.fromarray(noise()), "PNG")
    seen = images.inspect(put(tmp_path, "x.jpg", data), decode=True)
    assert seen.problem is None
    assert "is PNG" in seen.warnings[0]
    assert np.array_equal(eight_bit(tmp_path / "x.jpg"), noise())
    for name in ("X.PNG", "ein schönes Bild 🐈.png", "e\u0301.png"):
        assert images.inspect(put(tmp_path, name, data), decode=True).warnings == ()


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
    seen = images.inspect(path, decode=decode)
    assert seen.problem is not None
    assert str(path) not in seen.problem
    with pytest.raises(DataError, match=reason) as caught:
        images.load(path, whole(8, 8))
    assert str(caught.value) == f"{path}: {seen.problem}"


@pytest.mark.parametrize("fmt", ["JPEG", "GIF", "WEBP", "TIFF", "BMP", "AVIF", "PNG"])
def test_a_truncated_file_is_found_by_decoding(tmp_path, fmt):
    """Half a file of any format is refused, never padded with grey."""
    data = encoded(Image.fromarray(noise(200, 200)), fmt)
    path = put(tmp_path, f"x.{fmt.lower()}", data[: len(data) // 2])
    assert "damaged" in images.inspect(path, decode=True).problem
    with pytest.raises(DataError, match="damaged"):
        images.load(path, whole(200, 200))


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
        if images.inspect(path, decode=True).problem is None:
            try:
                images.load(path, whole(24, 32))
            except DataError as error:
                assert str(path) in str(error)  # noqa: PT017 - most trials raise nothing


def test_missing_file_and_folder(tmp_path):
    """A path that cannot be read is a problem, not an exception."""
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    for name in ("absent.jpg", "folder.jpg", "dangling.jpg", "loop.jpg"):
        seen = images.inspect(tmp_path / name, decode=True)
        assert seen.problem.startswith("cannot be read")
        assert seen.sha256 == ""


def test_a_changed_file_is_refused(tmp_path):
    """`load` can insist on the bytes that were planned."""
    path = put(tmp_path, "x.png", encoded(Image.fromarray(noise()), "PNG"))
    planned = images.inspect(path, decode=False).sha256
    images.load(path, whole(24, 32), sha256=planned)
    put(tmp_path, "x.png", encoded(Image.fromarray(noise(seed=8)), "PNG"))
    with pytest.raises(DataError, match="changed since"):
        images.load(path, whole(24, 32), sha256=planned)


def test_ignored_png_gamma_is_said(tmp_path):
    """A PNG that declares another gamma than sRGB's is taken as sRGB, with a warning."""
    odd = png(1, 1, 8, 2, bytes(4), (b"gAMA", struct.pack(">I", 100000)))
    usual = png(1, 1, 8, 2, bytes(4), (b"gAMA", struct.pack(">I", 45455)))
    assert "gamma 1" in images.inspect(put(tmp_path, "x.png", odd), decode=False).warnings[0]
    assert images.inspect(put(tmp_path, "x.png", usual), decode=False).warnings == ()


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
    seen = images.load(path, transform)
    assert seen.shape == (3, 32, 48)
    assert seen.dtype == np.float32
    assert np.abs((seen.transpose(1, 2, 0) + 1) * 127.5 - expected).max() <= 1.01


def test_the_value_range_is_torchvisions_bit_for_bit(tmp_path):
    """0..255 maps by ToTensor then Normalize(0.5, 0.5), in fp32: compared with torch's own arithmetic."""
    torch = pytest.importorskip("torch")
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = put(tmp_path, "x.png", encoded(Image.fromarray(grey), "PNG"))
    reference = torch.from_numpy(grey).to(torch.float32).div(255).sub_(0.5).div_(0.5)
    seen = images.load(path, whole(16, 16))
    assert (seen == reference.numpy()).all()
    assert (seen.min(), seen.max()) == (-1, 1)
    assert seen.flags["C_CONTIGUOUS"]


def test_inspect_and_load_agree_on_the_size(tmp_path):
    """The transform that `fit` makes of an inspected, turned picture is what `load` crops."""
    stored = smooth(64, 200)
    exif = Image.Exif()
    exif[0x112] = 6
    path = put(tmp_path, "x.png", encoded(Image.fromarray(stored), "PNG", exif=exif))
    seen = images.inspect(path, decode=False)
    transform = fit(seen.width, seen.height, 64)
    assert transform.bucket_height > transform.bucket_width
    assert images.load(path, transform).shape == (3, transform.bucket_height, transform.bucket_width)


def test_the_recipe_is_plain_and_names_the_decoder():
    """The recipe goes into a fingerprint: text only, with the versions that change pixels."""
    assert all(isinstance(value, str) for value in images.IMAGE_RECIPE.values())
    assert images.IMAGE_RECIPE["pillow"] == PIL.__version__
