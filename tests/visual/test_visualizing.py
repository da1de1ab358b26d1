"""`visualize` draws what was computed, whatever pictures are called and however large they are."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests import zoo
from tests.models import images, vit
from tests.visual.seen import steer
from toast.visual.figure import _Drawing, draw
from toast.visual.looks import looks_of
from toast.visual.maps import look
from toast.visual.panels import Panel, Row, row_of
from toast.visual.pixels import Preparation, find_preparation, open_picture
from toast.visual.visualizing import visualize


def to_pixels(picture: Image.Image) -> Tensor:
    return torch.tensor(np.array(picture)).permute(2, 0, 1) / 255


def steered(**options: Any) -> tuple[Any, Tensor]:
    x = images(2)
    return steer(vit(**options), x), x


def test_the_files_hold_what_was_looked_at(tmp_path: Path) -> None:
    model, x = steered()
    model.train()
    drawn = visualize(model, x, out=tmp_path / "out", block=1)
    assert model.training
    assert drawn == [tmp_path / "out" / f"image-{i}.png" for i in range(2)]
    kinds = sorted(path.suffix for path in (tmp_path / "out").iterdir())
    assert kinds == [".npz", ".npz", ".png", ".png", ".svg", ".svg"]
    views = look(model.eval(), x[1:], block=1)
    with np.load(tmp_path / "out" / "image-1.npz", allow_pickle=False) as held:
        for name in ("attention", "frozen", "selection", "difference"):
            assert np.array_equal(held[name], getattr(views, name).values[0].numpy())
            assert held[f"{name}_cell"].tolist() == [4, 4]
        assert np.array_equal(held["signal_2"], views.signals[2].values[0].numpy())
        assert held["picture"].shape == (16, 16, 3)
        assert str(held["shows"]) == views.name
    assert ET.parse(tmp_path / "out" / "image-0.svg").getroot().tag.endswith("svg")


def test_the_same_drawing_is_the_same_file(tmp_path: Path) -> None:
    model, x = vit(), images(1)
    loaded = "matplotlib.pyplot" in sys.modules
    for folder in ("one", "two"):
        visualize(model, x, out=tmp_path / folder)
    for name in ("image-0.png", "image-0.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert ("matplotlib.pyplot" in sys.modules) == loaded  # it keeps a state for all drawings


def test_both_attentions_have_one_scale_and_the_difference_its_own() -> None:
    model, x = steered()
    views = look(model, x)
    box = torch.tensor([[0, 0, 8, 8]] * 2)
    made = {panel.caption: panel for panel in row_of(looks_of(views, box)[0], x[0]).panels}
    share = float(views.frozen.values[0, :2, :2].sum())
    frozen = made[f"frozen attention: {share:.2f} in the box"]
    (refocused,) = [panel for panel in made.values() if panel.short in ("refocused", "not moved")]
    top = max(views.frozen.values[0].max(), views.attention.values[0].max())
    assert frozen.high == refocused.high == pytest.approx(float(top))
    assert frozen.unit == f"share on patches ({float(views.frozen_on_patches[0]):.2f} of all)"
    difference = made["difference to the frozen model"]
    assert difference.low == -difference.high
    assert difference.high == pytest.approx(float(views.difference.values[0].abs().max()))
    assert len(made) == 6

    def plain(**options: Any) -> Row:
        return row_of(looks_of(look(vit(), x, **options))[0], x[0])

    assert [panel.caption for panel in plain().panels] == ["input", "attention"]
    nothing = plain(method="grad-cam", target=lambda output: 0 * output[:, 0])
    assert nothing.panels[1].unit == "0 everywhere"


@pytest.mark.parametrize("size", [(16, 160), (160, 16), (12, 40)], ids=str)
def test_no_size_breaks_the_layout(size: tuple[int, int]) -> None:
    """Everything that is drawn lies within the figure, and no text over a picture."""
    height, width = size
    values = torch.rand(4, 5)
    made = [
        Panel(
            "a caption of some more words than fit in one line " * 2,
            values=values,
            cell=(height / 4, width / 5),
        )
    ] * 6
    row = Row(torch.rand(height, width, 3), made, [0, 0, 4, 4], dict.fromkeys(range(40), 1.0), 3)
    drawing = _Drawing([row], "x" * 300 + " $a$ and 名 and \n more", smooth=True)
    figure = drawing.figure
    figure.canvas.draw()
    whole = figure.bbox
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    texts = [text.get_window_extent() for text in figure.texts]
    for box in boxes + texts:
        assert box.x0 >= whole.x0 - 1
        assert box.x1 <= whole.x1 + 1
        assert box.y0 >= whole.y0 - 1
        assert box.y1 <= whole.y1 + 1
    for text in texts:
        assert not any(text.overlaps(axes.get_window_extent()) for axes in figure.axes)
    assert len(figure.axes) == 6 + 6 + 1


def test_names_make_files_and_titles(tmp_path: Path) -> None:
    model, _ = steered()
    odd = "$x_1$ 名前 " + "long " * 30
    paths = [tmp_path / "a" / f"{odd}.png", tmp_path / "b" / f"{odd}.png", tmp_path / "a" / " .png"]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), "teal").save(path)
    out = tmp_path / "out"
    drawn = visualize(
        model, paths, out=out, processor=to_pixels, mean=[0.0] * 3, std=[1.0] * 3, formats=["svg"]
    )
    assert len({path.name.casefold() for path in drawn}) == 3
    assert all(path.parent == out and path.is_file() and len(path.name) < 90 for path in drawn)
    with np.load(drawn[0].with_suffix(".npz")) as held:
        assert held["picture"][0, 0] * 255 == pytest.approx([0, 128, 128])


@pytest.mark.parametrize("name", ["timm-swin", "timm-convnext"])
def test_other_families_are_drawn(name: str, tmp_path: Path) -> None:
    bare, x = zoo.build(name), next(iter(zoo.example(name).values()))
    (drawn,) = visualize(steer(bare, x), x[:1], out=tmp_path, formats=["png"], labels=["a", "b"])
    with Image.open(drawn) as picture:
        assert picture.size[0] > 600


def test_timm_says_how_pictures_are_prepared() -> None:
    model = vit(img_size=(8, 16))
    model.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0}
    found = find_preparation(model)
    picture = Image.new("RGB", (64, 32), (200, 100, 50))
    pixels = found.prepare(picture)
    assert pixels.shape == (3, 8, 16)
    assert (found.shown(pixels)[4, 4] * 255).tolist() == pytest.approx([200, 100, 50], abs=0.01)


def test_an_image_processor_says_how_pictures_are_prepared() -> None:
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.2] * 3, image_std=[0.5] * 3)
    found = find_preparation(vit(), processor)
    pixels = found.prepare(Image.new("RGB", (64, 32), (200, 100, 50)))
    assert pixels.shape == (3, 8, 8)
    assert (found.shown(pixels)[4, 4] * 255).tolist() == pytest.approx([200, 100, 50], abs=0.01)


def test_without_statistics_a_picture_is_stretched() -> None:
    shown = Preparation(lambda picture: picture).shown(torch.tensor([[[-3.0, 1.0]]]))
    assert shown.tolist() == [[[0, 0, 0], [1, 1, 1]]]


def test_a_picture_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    picture = Image.new("L", (20, 10))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg").size == (10, 20)
    assert open_picture(picture).mode == "RGB"


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    model, x = vit(), images(2)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG no picture")
    for given, options, message in [
        ([tmp_path / "none.png"], {"processor": to_pixels}, "there is no file '.*none.png'"),
        ([broken], {"processor": to_pixels}, "is not a picture that Pillow can read"),
        ([3], {"processor": to_pixels}, "needs paths, pictures of Pillow or pixels"),
        ([], {"processor": to_pixels}, "needs at least one picture"),
        ([broken], {}, "VisionTransformer does not say how its pictures are prepared. Pass processor="),
        (x[0], {}, r"needs pixels \(batch, channels, height, width\); got \(3, 16, 16\)"),
        (x, {"formats": ["bmp"]}, r"needs some of png, svg, pdf; got \['bmp'\]"),
        (x, {"boxes": torch.zeros(1, 4)}, "got 1 for more pictures"),
    ]:
        with pytest.raises(ValueError, match=message):
            visualize(model, given, out=tmp_path / "out", **options)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("toast.visual.figure.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'toast-steering\[visual\]'"):
        draw([Row(torch.rand(4, 4, 3), [Panel("input")])], [tmp_path / "a.png"])
