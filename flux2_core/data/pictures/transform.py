"""The way from an oriented picture to model input, in pixels: what a latents row depends on beside the file's bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Transform:
    """How an oriented picture becomes model input: resize to (resize_height, resize_width), crop, perhaps flip."""

    bucket_height: int
    bucket_width: int
    resize_height: int
    resize_width: int
    crop_top: int
    crop_left: int
    flip: bool = False

    @property
    def pixels_lost(self) -> float:
        """Share (0..1) of the resized picture that the crop cuts away."""
        return 1.0 - self.bucket_height * self.bucket_width / (self.resize_height * self.resize_width)
