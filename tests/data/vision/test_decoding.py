"""From bytes to pictures: damage, modes, depths, frames, and what a camera noted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.vision.pictures import picture, write_picture
from toast.data.vision import BadSample
from toast.data.vision.decoding import FRAMES, TURNED, decode, read_picture, shown_size
from toast.data.vision.noting import Notes


@pytest.mark.filterwarnings("ignore:(Truncated File Read|Corrupt EXIF data):UserWarning")  # of Pillow
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif", "ppm"])
def test_truncated_pictures_are_bad(tmp_path: Path, suffix: str) -> None:
    whole = write_picture(tmp_path / f"whole.{suffix}").read_bytes()
    for length in {0, 1, 10, 30, *(len(whole) * part // 10 for part in range(1, 9))}:
        with pytest.raises(BadSample) as caught:
            decode(whole[:length], "a name")
        assert caught.value.name == "a name"
        assert caught.value.reason
        assert "\n" not in str(caught.value)


def test_damaged_bytes_decode_or_are_bad(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    bad = 0
    for suffix in ("png", "jpg", "gif", "webp"):
        whole = np.frombuffer(write_picture(tmp_path / f"a.{suffix}").read_bytes(), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            where = draw.integers(0, len(whole), 5)
            damaged[where] = draw.integers(0, 256, 5)
            try:
                assert decode(damaged.tobytes(), "a").mode == "RGB"
            except BadSample:
                bad += 1
    assert bad > 50


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadSample, match=r"gone.png: the file does not exist"):
        decode(tmp_path / "gone.png", "gone.png")


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    grey = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    deep = np.asarray(decode(tmp_path / "deep.png", "deep"))
    assert np.array_equal(deep, np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2))
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK"):
        file = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        picture().convert(mode).save(file)
        assert decode(file, mode).mode == "RGB"
    palette = picture().convert("P")
    palette.save(tmp_path / "clear.png", transparency=bytes(range(256)))
    assert np.array_equal(np.asarray(decode(tmp_path / "clear.png", "p")), np.asarray(palette.convert("RGB")))


#: Where EXIF's orientation says that the upper left corner of what is stored is when it is shown.
CORNERS = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", CORNERS)
def test_a_picture_is_turned_as_its_camera_noted(tmp_path: Path, orientation: int, suffix: str) -> None:
    stored = Image.new("RGB", (48, 32), "black")
    stored.paste((255, 255, 255), (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{suffix}", exif=exif)
    found = read_picture(tmp_path / f"a.{suffix}", "a")
    assert found.image.size == ((48, 32) if orientation < 5 else (32, 48))
    with Image.open(tmp_path / f"a.{suffix}") as opened:
        assert shown_size(opened) == found.image.size
    shown = np.asarray(found.image.convert("L"))
    white = [corner for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)) if shown[corner] > 200]
    assert white == [CORNERS[orientation]]
    turned = orientation > 1 and suffix != "tif"  # Pillow turns TIFF itself
    assert found.notes == ((TURNED,) if turned else ())


def test_a_damaged_note_of_a_camera_makes_no_damaged_picture(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.jpg", exif=b"Exif\x00\x00no TIFF header")
    assert decode(tmp_path / "a.jpg", "a").size == (40, 36)


RAMP = np.linspace(0, 1, 256).reshape(16, 16)


@pytest.mark.parametrize(
    ("values", "white"),
    [
        (RAMP.astype(np.float32), "floating-point numbers, of which 1 is taken as white"),
        ((RAMP * 255).astype(np.float32), "floating-point numbers, of which 255 is taken as white"),
        ((RAMP * 255).round().astype(np.int32), "32-bit numbers, of which 255 is taken as white"),
        ((RAMP * 65535).round().astype(np.int32), "32-bit numbers, of which 65535 is taken as white"),
        ((RAMP * 65535).round().astype(np.uint16), None),
    ],
)
def test_depths(tmp_path: Path, values: Any, white: str | None) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    found = read_picture(tmp_path / "a.tif", "a")
    assert np.array_equal(np.asarray(found.image)[..., 0].ravel(), np.arange(256))
    assert found.notes == (() if white is None else (f"holds {white}",))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((RAMP * 1e6).astype(np.int32), "32-bit numbers from 0 to 1e.06; needs 0 to 255 or 0 to 65535"),
        (
            (RAMP - 0.5).astype(np.float32),
            "floating-point numbers from -0.5 to 0.5; needs 0 to 1 or 0 to 255",
        ),
        (np.where(RAMP == 0, np.nan, RAMP).astype(np.float32), "floating-point numbers from nan"),
    ],
)
def test_numbers_without_a_known_white_are_refused(tmp_path: Path, values: Any, message: str) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(BadSample, match=f"a: holds {message}"):
        decode(tmp_path / "a.tif", "a")


@pytest.mark.parametrize("suffix", ["gif", "webp", "tif"])
def test_the_first_of_several_frames_is_taken(tmp_path: Path, suffix: str) -> None:
    first, second = Image.new("RGB", (9, 9), (255, 0, 0)), Image.new("RGB", (9, 9), (0, 0, 255))
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second])
    found = read_picture(tmp_path / f"a.{suffix}", "a")
    assert found.image.getpixel((4, 4)) == pytest.approx((255, 0, 0), abs=3)
    assert found.notes == (FRAMES,)


def test_what_is_empty_or_vast_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(BadSample, match="a: the file is empty"):
        decode(tmp_path / "a.jpg", "a")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadSample, match="a: DecompressionBombError: Image size"):
        decode(write_picture(tmp_path / "a.png"), "a")


def test_notes_are_said_once_and_counted() -> None:
    notes = Notes()
    assert notes.add([("a", TURNED), ("b", TURNED), ("b", FRAMES)]) == [
        f"a {TURNED}; further ones are counted.",
        f"b {FRAMES}; further ones are counted.",
    ]
    assert notes.add([("a", TURNED), ("c", TURNED)]) == []
    assert notes.summary() == [f"3 × {TURNED}: first a", f"1 × {FRAMES}: first b"]
