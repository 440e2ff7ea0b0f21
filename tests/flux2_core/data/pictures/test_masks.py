"""Masks: one byte per token, cut as the picture is."""

import numpy as np
import pytest
import torch
from PIL import Image

from flux2_core.data.pictures import masks
from flux2_core.data.pictures.transform import Transform
from flux2_core.errors import DataError
from flux2_core.model.latents import mask_from_bytes
from tests.flux2_core.pictures import encoded, put, whole


def test_tokens_are_means_of_their_pixels(tmp_path):
    """Against the definition, on random grey: the mean over each 16 x 16 px, rounded half up."""
    grey = np.random.default_rng(0).integers(0, 256, (32, 48), dtype=np.uint8)
    path = put(tmp_path, "m.png", encoded(Image.fromarray(grey), "PNG"))
    seen = masks.load(str(path), whole(32, 48))
    expected = [[np.floor(grey[r : r + 16, c : c + 16].mean() + 0.5) for c in (0, 16, 32)] for r in (0, 16)]
    assert seen.dtype == np.uint8
    assert np.array_equal(seen, expected)
    shares = mask_from_bytes(seen.tobytes(), height=2, width=3)
    assert torch.equal(shares, torch.tensor(expected, dtype=torch.float32) / 255)


def test_a_mask_is_cut_like_its_picture(tmp_path):
    """A half-white mask of half the picture's size: scaled, cropped and mirrored by the picture's transform."""
    half = np.zeros((32, 64), np.uint8)
    half[:, 32:] = 255
    path = put(tmp_path, "m.png", encoded(Image.fromarray(half), "PNG"))
    picture_of = {"bucket_height": 64, "bucket_width": 64, "resize_height": 64, "resize_width": 128, "crop_top": 0}
    straight = masks.load(str(path), Transform(**picture_of, crop_left=32))
    assert straight.tolist() == [[0, straight[0, 1], straight[0, 2], 255]] * 4
    assert straight[0, 1] < 10 < 245 < straight[0, 2]
    mirrored = masks.load(str(path), Transform(**picture_of, crop_left=32, flip=True))
    assert np.array_equal(mirrored, straight[:, ::-1])
    assert (masks.load(str(path), Transform(**picture_of, crop_left=64)) >= 245).all()


def test_what_is_transparent_is_not_learned(tmp_path):
    """Alpha counts as black, whatever colour hides under it and whatever `latents.background` is."""
    rgba = np.full((32, 32, 4), 255, np.uint8)
    rgba[:, :16, 3] = 0
    path = put(tmp_path, "m.png", encoded(Image.fromarray(rgba), "PNG"))
    assert masks.load(str(path), whole(32, 32)).tolist() == [[0, 255]] * 2


def test_a_black_mask_is_refused(tmp_path):
    """Nothing would be learned: an error that names the file; also where only the crop is black."""
    grey = np.zeros((32, 32), np.uint8)
    grey[:, 16:] = 255
    path = put(tmp_path, "m.png", encoded(Image.fromarray(grey), "PNG"))
    with pytest.raises(DataError, match=r"m\.png: the mask is black all over the crop"):
        masks.load(str(path), Transform(16, 16, 32, 32, 0, 0))
    assert masks.load(str(path), Transform(16, 16, 32, 32, 0, 16)).tolist() == [[255]]


def test_a_changed_mask_is_refused(tmp_path):
    """Masks are known by their content, as pictures are."""
    path = put(tmp_path, "m.png", encoded(Image.new("L", (32, 32), 255), "PNG"))
    with pytest.raises(DataError, match="changed since"):
        masks.load(str(path), whole(32, 32), sha256="0" * 64)
