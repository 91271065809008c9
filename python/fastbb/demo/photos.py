# SPDX-License-Identifier: Apache-2.0
"""Photographs that are files of the installed scikit-image package; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastbb._console import UsageError, require

if TYPE_CHECKING:
    from PIL.Image import Image

PHOTOS = {
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "rocket": "rocket.jpg",
    "motorcycle": "motorcycle_left.png",
    "hubble deep field": "hubble_deep_field.jpg",
    "retina": "retina.jpg",
    "tissue": "ihc.png",
}
"""Colour photographs and micrographs in scikit-image's wheel: name -> file."""


def load_photos(count: int) -> list[tuple[str, Image]]:
    """`count` pairs (name, RGB image), starting over when there are fewer photographs.

    Files are opened by path, because scikit-image's own loaders download what they do not find.

    Raises: UsageError when scikit-image or Pillow is missing or ships none of the files.
    """
    skimage_data = require("skimage.data", "loading the photographs")
    pillow = require("PIL.Image", "loading the photographs")
    folder = Path(str(skimage_data.__file__)).parent
    present = {name: folder / file for name, file in PHOTOS.items() if (folder / file).is_file()}
    if not present:
        raise UsageError(f"scikit-image has none of {list(PHOTOS.values())} in {folder}")
    names = list(present)
    images = {name: pillow.open(present[name]).convert("RGB") for name in names[:count]}
    return [(name, images[name]) for name in (names[i % len(names)] for i in range(count))]
