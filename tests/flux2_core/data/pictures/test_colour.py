"""Colour: every pixel format comes out as the sRGB picture that its file describes, on white."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from flux2_core.data.pictures.transform import Transform
from tests.flux2_core.pictures import eight_bit, encoded, inspect, load, noise, png, put

# D50-adapted primaries, columns R, G, B
SRGB = np.array([[0.4360, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])


HP_SRGB = np.array([[0.436066, 0.385147, 0.143066], [0.222488, 0.716873, 0.060608], [0.013916, 0.097076, 0.714096]])
DISPLAY_P3 = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])


ADOBE_RGB = np.array([[0.6097, 0.2053, 0.1492], [0.3111, 0.6257, 0.0632], [0.0195, 0.0609, 0.7446]])


def icc_profile(space, gamma, primaries=None):
    """A version 2 matrix (or grey) profile, written from the ICC specification; gamma None: sRGB's own curve."""

    def xyz(values):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round((gamma or 0) * 256))
    if gamma is None:
        coded = np.linspace(0, 1, 1024)
        linear = np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)
        curve = b"curv\0\0\0\0" + struct.pack(">I", 1024) + np.rint(linear * 65535).astype(">u2").tobytes()
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
    assert inspect(path, decode=True).warnings == ()


def test_an_srgb_profile_changes_no_pixel(tmp_path):
    """Pixels that are sRGB already stay bit for bit, whoever wrote the profile: converting would move some by one."""
    rgb = noise(200, 200)
    littlecms = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (littlecms, icc_profile(b"RGB ", None, HP_SRGB)):
        path = put(tmp_path, "x.png", encoded(Image.fromarray(rgb), "PNG", icc_profile=profile))
        assert np.array_equal(eight_bit(path, 200, 200), rgb)


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
        (warning,) = inspect(path, decode=decode).warnings
        assert words in warning


def test_cmyk_is_not_inverted(tmp_path):
    """CMYK JPEGs (which Adobe stores inverted) come out in the right sense, with a warning about the guess."""
    path = put(tmp_path, "x.jpg", encoded(Image.new("CMYK", (32, 24), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(eight_bit(path) - np.array([255, 0, 0])).max() <= 4
    assert "CMYK" in inspect(path, decode=True).warnings[0]


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
    half = load(path, Transform(12, 16, 12, 16, 0, 0)).transpose(2, 0, 1)
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


def test_ignored_png_gamma_is_said(tmp_path):
    """A PNG that declares another gamma than sRGB's is taken as sRGB, with a warning."""
    odd = png(1, 1, 8, 2, bytes(4), (b"gAMA", struct.pack(">I", 100000)))
    usual = png(1, 1, 8, 2, bytes(4), (b"gAMA", struct.pack(">I", 45455)))
    assert "gamma 1" in inspect(put(tmp_path, "x.png", odd), decode=False).warnings[0]
    assert inspect(put(tmp_path, "x.png", usual), decode=False).warnings == ()
