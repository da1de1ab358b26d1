"""Masks as people have them: white, 1, with a palette, of sixteen bits; and those that are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from toast.visual.masks import read_mask

PLACE = np.zeros((6, 8), np.uint8)
PLACE[1:4, 2:7] = 1


def written(tmp_path: Path, image: Image.Image, suffix: str = ".png") -> Path:
    image.save(file := tmp_path / f"mask{suffix}")
    return file


def palette(*colours: tuple[int, int, int]) -> Image.Image:
    image = Image.frombytes("P", (8, 6), PLACE.tobytes())
    image.putpalette([part for colour in colours for part in colour])
    return image


@pytest.mark.parametrize(
    ("image", "suffix"),
    [
        (Image.fromarray(PLACE * 255), ".png"),
        (Image.fromarray(PLACE), ".png"),
        (Image.fromarray(PLACE * 255).convert("1"), ".png"),
        (Image.fromarray(PLACE * 255).convert("RGB"), ".png"),
        (Image.fromarray(PLACE * 255).convert("LA"), ".png"),
        (Image.fromarray(PLACE.astype(np.uint16) * 65535), ".png"),
        (Image.fromarray(PLACE.astype(np.uint16)), ".png"),
        (Image.fromarray(PLACE.astype(np.float32)), ".tif"),
        (palette((0, 0, 0), (128, 0, 0)), ".png"),
        (palette((0, 0, 0), (255, 255, 255)), ".png"),
        (palette((0, 0, 0), (1, 1, 1)), ".png"),
    ],
    ids=[
        "white",
        "one",
        "bit",
        "rgb",
        "alpha",
        "white-16",
        "one-16",
        "float",
        "voc",
        "grey-palette",
        "dark-palette",
    ],
)
def test_the_target_is_white_however_it_is_written(tmp_path: Path, image: Image.Image, suffix: str) -> None:
    found = read_mask(written(tmp_path, image, suffix))
    assert found.mode == "L"
    np.testing.assert_array_equal(np.asarray(found), PLACE * 255)


def test_shades_are_shares_of_a_pixel(tmp_path: Path) -> None:
    shades = (PLACE * np.arange(8, dtype=np.uint8) * 30).astype(np.uint8)
    np.testing.assert_array_equal(read_mask(written(tmp_path, Image.fromarray(shades))), shades)
    assert not np.asarray(read_mask(written(tmp_path, Image.fromarray(PLACE * 0)))).any()


def test_a_mask_that_could_be_anything_is_refused_with_its_values(tmp_path: Path) -> None:
    labels = PLACE.copy()
    labels[4:] = 7
    with pytest.raises(ValueError, match=r"needs 255 \(white\) .* its values are 0, 1, 7\. Write the one"):
        read_mask(written(tmp_path, Image.fromarray(labels)))
    coloured = np.stack([PLACE * 255, PLACE * 0, PLACE * 0], -1)
    with pytest.raises(ValueError, match="has colours; a mask is grey"):
        read_mask(written(tmp_path, Image.fromarray(coloured)))
    (tmp_path / "mask.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="the mask cannot be read"):
        read_mask(tmp_path / "mask.png")
