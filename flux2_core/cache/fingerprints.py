"""The fingerprints of the two tensor tables, made of files and settings; no model is loaded.

What follows from a configuration alone is in `cache.settings`; what libraries make of it is proven by `cache.proofs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import PIL
from PIL import features

from flux2_core.cache.settings import latents_settings, text_settings
from flux2_core.config.sections import Config, Latents
from flux2_core.model.folder import ModelFolder
from flux2_core.store.hashing import digest, files_digest


def text_fingerprint(model: ModelFolder, config: Config) -> dict[str, Any]:
    """Everything that the bytes of a text row depend on, beside the text itself."""
    files = {
        "encoder_files": files_digest(model.path / "text_encoder", _names(model, "text_encoder")),
        "tokenizer_files": files_digest(model.path / "tokenizer", _tokenizer_names(model)),
        "tokenizers_version": version("tokenizers"),
    }
    if config.text.quantize != "none":
        files["quanto_version"] = version("optimum-quanto")
    return {name: value for name, value in (text_settings(model, config) | files).items() if value is not None}


def latents_fingerprint(model: ModelFolder, config: Config) -> dict[str, Any]:
    """Everything that the bytes of a latent row depend on, beside the picture and its transform."""
    vae_files = files_digest(model.path / "vae", _names(model, "vae"))
    return latents_settings(config) | {"image": digest(recipe(config.latents)), "vae_files": vae_files}


def _names(model: ModelFolder, part: str) -> list[str]:
    return ["config.json", *(file.name for file in model.weight_files(part))]


def _tokenizer_names(model: ModelFolder) -> list[str]:
    return sorted(
        file.name
        for file in (model.path / "tokenizer").iterdir()
        if file.suffix in {".json", ".jinja", ".txt", ".model"}
    )


def recipe(latents: Latents, versions: Mapping[str, str | None] | None = None) -> dict[str, str | None]:
    """Everything that the pixels depend on besides the file and the transform; part of the latents' fingerprint.

    `versions`: of the libraries of another time; unset: of those that are here.
    """
    used = picture_libraries() if versions is None else versions
    made = {
        "orientation": "EXIF applied",
        "frame": "first",
        "colour": "ICC to sRGB, perceptual; without a profile taken as sRGB",
        "alpha": f"over {latents.background.lower()}, before resizing",
        "sixteen_bit": "grey (x+128)//257, colour high byte",
        "resize": "PIL BILINEAR, antialiased",
        "range": "((x/255)-0.5)/0.5 in fp32",
        "mask": "alpha over black, grey, resized and cropped like the picture, mean of 16x16 px in 8 bits",
        **{name: used[name] for name in ("pillow", "libjpeg_turbo", "littlecms2")},
    }
    if latents.decoder == "fast":
        with_torch = f"then bilinear, antialiased by torch {used['torch']}, then colour"
        shrunk = f"undamaged RGB and grey JPEGs at the least n/8 that covers the resized picture, {with_torch}"
        made["decoder"] = f"simplejpeg {used['simplejpeg']}: {shrunk}; others by Pillow"
    return made


def picture_libraries() -> dict[str, str | None]:
    """Versions of everything that pictures are decoded with."""
    compiled = {name: features.version(name) for name in ("libjpeg_turbo", "littlecms2")}
    torch = version("torch").partition("+")[0]
    return {"pillow": PIL.__version__, **compiled, "simplejpeg": version("simplejpeg"), "torch": torch}
