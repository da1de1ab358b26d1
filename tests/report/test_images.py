"""Maps lie over the places that they are of."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from PIL import Image

from toast.report.images import as_uri, shown
from toast.visual.targets import frame


def test_the_brightest_place_is_that_of_the_greatest_value() -> None:
    values = torch.zeros(4, 8)
    values[1, 6] = 0.5
    drawn = np.asarray(shown(torch.full((16, 32, 3), 0.4), values, (4, 4), high=0.5, side=320).convert("L"))
    assert drawn.shape == (160, 320)
    row, column = np.unravel_index(drawn.argmax(), drawn.shape)
    assert 40 <= row < 80
    assert 240 <= column < 280
    corner = shown(torch.full((16, 32, 3), 0.4), values, (4, 4), high=0.5, low=-0.5, side=320)
    assert (
        np.asarray(corner)[0, 0].sum()
        > np.asarray(shown(torch.full((16, 32, 3), 0.4), values, (4, 4)))[0, 0].sum()
    )


def test_a_grid_may_be_larger_or_smaller_than_the_picture() -> None:
    picture = torch.full((10, 10, 3), 0.5)
    for cell in ((4.0, 4.0), (3.0, 3.0)):
        drawn = np.asarray(shown(picture, torch.ones(3, 3), cell, side=100))
        assert drawn.shape == (100, 100, 3)
        covered = round(3 * cell[0]) * 10
        assert (np.ptp(drawn[:covered, :covered], (0, 1)) == 0).all()
    assert drawn[95, 95].tolist() == [drawn[95, 95, 0]] * 3  # grey, beyond the grid
    assert len(set(drawn[5, 5].tolist())) == 3


def test_the_frame_is_around_the_target() -> None:
    target = torch.zeros(12, 20)
    target[2:7, 5:11] = 1
    assert frame(target) == [5, 2, 11, 7]
    assert frame(torch.zeros(12, 20)) is None
    drawn = np.asarray(shown(torch.full((12, 20, 3), 0.5), box=(5, 2, 11, 7), side=200))
    changed = np.argwhere((drawn != 128).any(-1))
    assert abs(changed.min(0) - [20, 50]).max() <= 2
    assert abs(changed.max(0) - [70, 110]).max() <= 2


def test_pictures_are_read_back_from_the_page() -> None:
    image = Image.new("RGB", (9, 7), (200, 30, 60))
    read = Image.open(io.BytesIO(base64.b64decode(as_uri(image).removeprefix("data:image/jpeg;base64,"))))
    assert read.size == (9, 7)
    assert abs(np.asarray(read, np.int16) - np.asarray(image, np.int16)).max() < 12
