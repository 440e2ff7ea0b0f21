"""Colour: whatever mode Pillow opened, the same picture as 8-bit sRGB on one background.

Order matters: 16-bit grey to 8-bit, then the ICC profile, then alpha over the background (so that colour hidden under
alpha never shows, and later resizing mixes only what is seen).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, ImageFile, TiffImagePlugin

from flux2_core.errors import DataError

_READABLE = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "I;16", "I;16L", "I;16B"}
_MIN_IS_WHITE = 0
_SRGB_GAMMA = 1 / 2.2
_SAME_LEVELS = 2  # lcms's own round trip through sRGB moves a channel by up to 1 of 255
_CMYK_GUESS = "CMYK without a usable ICC profile: converted by the plain formula, colours may differ"


def prepare(image: ImageFile.ImageFile) -> list[str]:
    """Judge a picture by its header, before its pixels are decoded; returns warnings.

    It also mends Pillow's record of the transparent grey of 2- and 4-bit PNGs, which Pillow forgets to scale.

    Raises:
        DataError: the reason why its pixels have no agreed meaning here.
    """
    mode = image.mode
    if mode not in _READABLE:
        raise DataError(f"pixels of mode {mode} (float, 32-bit or Lab) are not read; save as 8 or 16-bit RGB or grey")
    raw = str(image.tile[0].args if image.tile else "")
    if "I;12" in raw:
        raise DataError("12-bit pixels are not read; save as 8 or 16 bits")
    if raw in ("L;2", "L;4") and "transparency" in image.info:
        image.info["transparency"] *= 255 // (2 ** int(raw[2]) - 1)
    if raw == "RGB;16B" and "transparency" in image.info:
        raise DataError("a transparent colour in a 16-bit RGB PNG is not read; save with an alpha channel or 8 bits")
    return list(_header_warnings(image))


def is_srgb(image: Image.Image) -> bool:
    """Whether an opaque picture is 8-bit sRGB as stored: `to_srgb` would hand it back."""
    return image.mode == "RGB" and _profile(image, "RGB")[0] is None


def to_srgb(image: Image.Image, *, background: str) -> Image.Image:
    """The decoded picture (after `prepare`) as 8-bit RGB: ICC to sRGB, 16-bit grey rounded, alpha over `#rrggbb`."""
    base, alpha = _split(eight_bits(image))
    transform, _ = _profile(image, base.mode)
    if base.mode == "RGB" and transform is None:
        colour = base  # converting would copy the 36 MB of a photo
    else:
        colour = base.convert("RGB") if transform is None else _apply(transform, base)
    if alpha is None:
        return colour
    return Image.composite(colour, Image.new("RGB", colour.size, background), alpha)


def eight_bits(image: Image.Image) -> Image.Image:
    """A decoded picture of 16-bit grey in 8 bits (mode L, LA with a transparent grey); any other as it is.

    Pillow's own `convert` clips 16 bits at 255, its `reduce` refuses them, and no resized copy of a TIFF knows that
    its white is 0.
    """
    if not image.mode.startswith("I;16"):
        return image
    grey_HW, hidden = np.asarray(image), image.info.get("transparency")
    alpha = None if hidden is None else Image.fromarray((grey_HW != hidden).astype(np.uint8) * 255)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(262) == _MIN_IS_WHITE:
        grey_HW = 65535 - grey_HW  # Pillow inverts 8-bit MinIsWhite, but not 16-bit
    grey = Image.fromarray((grey_HW // 257 + (grey_HW % 257 > 128)).astype(np.uint8))  # rounded, without more bits
    made = grey if alpha is None else Image.merge("LA", (grey, alpha))
    made.info = {key: value for key, value in image.info.items() if key == "icc_profile"}
    return made


def _header_warnings(image: Image.Image) -> Iterator[str]:
    base = _base_mode(image)
    transform, warning = _profile(image, base)
    if warning:
        yield warning
    if base == "CMYK" and transform is None:
        yield _CMYK_GUESS
    gamma = image.info.get("gamma")
    if gamma and not image.info.get("icc_profile") and "srgb" not in image.info and abs(gamma - _SRGB_GAMMA) > 0.01:
        yield f"PNG gamma {gamma:.4g} is ignored: pixels are taken as sRGB"


def _base_mode(image: Image.Image) -> str:
    if image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I;16"):
        return "L"
    return "CMYK" if image.mode == "CMYK" else "RGB"


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colour in mode L, RGB or CMYK, and alpha in mode L if there is any."""
    base = _base_mode(image)
    if not image.has_transparency_data:
        return (image if image.mode == base else image.convert(base)), None
    rgba = image.convert("RGBA")
    if base == "L":
        return rgba.getchannel("R"), rgba.getchannel("A")
    return rgba.convert("RGB"), rgba.getchannel("A")


def _apply(transform: ImageCms.ImageCmsTransform, base: Image.Image) -> Image.Image:
    colour = ImageCms.applyTransform(base.convert(transform.input_mode), transform)
    assert colour is not None  # None is for inPlace=True only
    return colour


def _profile(image: Image.Image, mode: str) -> tuple[ImageCms.ImageCmsTransform | None, str | None]:
    icc = image.info.get("icc_profile")
    return _transform(icc, mode) if icc else (None, None)


@lru_cache(maxsize=64)
def _transform(icc: bytes, mode: str) -> tuple[ImageCms.ImageCmsTransform | None, str | None]:
    """The transform of an embedded profile to sRGB (None: pixels are sRGB already, or taken as such) and a warning."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        space = profile.profile.xcolor_space.strip()
        wanted = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}.get(space)
        if wanted is None or (wanted != mode and (wanted, mode) != ("RGB", "L")):
            return None, f"ICC profile is for {space}, the pixels are {mode}: the profile is ignored"
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), wanted, "RGB")
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError):
        return None, "ICC profile cannot be read: pixels are taken as sRGB"
    return (None if wanted != "CMYK" and _is_srgb(transform, wanted) else transform), None


def _is_srgb(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether the transform moves no colour of a 17^3 grid by more than rounding: then pixels stay as stored."""
    levels = np.linspace(0, 255, 17).round().astype(np.uint8)
    if mode == "L":
        before = np.repeat(levels[None, :, None], 3, axis=2)
        probe = Image.fromarray(before[..., 0])
    else:
        before = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(17, 289, 3)
        probe = Image.fromarray(before)
    after = np.asarray(_apply(transform, probe))
    return bool(np.abs(after.astype(int) - before).max() <= _SAME_LEVELS)
