"""Pictures, arrays and pages as files."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from tests.visual.text.test_cells import HOSTILE, SENTENCES, tiny_tokenizer
from tests.visual.text.test_html import Page, views_of
from tests.visual.text.test_looking import ANSWER, PROMPT, plain_decoder, steer
from toast.visual.text import matrices
from toast.visual.text.exporting import save_arrays, visualize_text
from toast.visual.text.matrices import draw_matrices

HARD = "<b>日$\x1b"


@pytest.mark.parametrize("prompt", [PROMPT, HOSTILE])
def test_arrays_come_back(prompt: str, tmp_path: Path) -> None:
    views = views_of(prompt, ANSWER)
    path = save_arrays(views, tmp_path / "new" / "text.npz")
    assert [*path.parent.iterdir()] == [path]
    with np.load(path, allow_pickle=False) as held:
        assert json.loads(str(held["tokens"])) == views.tokens
        assert "".join(text for text, _, _ in json.loads(str(held["cells"]))) == views.text
        for name in ("token_ids", "is_prompt", "selection_weights", "attention_change", "received_change",
                     "first_attention", "second_attention"):  # fmt: skip
            assert np.array_equal(held[name], getattr(views, name).numpy())
        assert (int(held["block"]), str(held["head"]), int(held["left_out"])) == (2, "mean", 0)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn."""
    drawn: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        drawn.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return drawn


def test_the_picture_shows_both_passes_on_one_scale(tmp_path: Path, figures: list[Figure]) -> None:
    views = views_of(PROMPT, ANSWER)
    draw_matrices(views, tmp_path / "text.png")
    panels = [axis for axis in figures[0].axes if axis.images]
    assert [axis.get_title() for axis in panels] == ["first pass", "second pass", "difference"]
    first, second, difference = (axis.images[0] for axis in panels)
    visible = np.tri(len(views.tokens), dtype=bool)
    shown = (views.first_attention, views.second_attention, views.second_attention - views.first_attention)
    for image, expected in zip((first, second, difference), shown, strict=True):
        assert np.array_equal(np.asarray(image.get_array())[visible], expected.numpy()[visible])
        assert np.ma.getmaskarray(image.get_array())[~visible].all()
    assert first.get_clim() == second.get_clim() == (0, pytest.approx(1.0))
    low, high = difference.get_clim()
    assert -low == high == pytest.approx(float(shown[2].abs().max()))
    labels = [axis.get_ylabel() for axis in figures[0].axes if axis not in panels]
    assert labels == ["attention", "second minus first"]
    written = [label.get_text() for label in panels[0].get_yticklabels()]
    assert written == [token.replace(" ", "·") for token in views.tokens]
    assert first.norm(0.25) == pytest.approx(0.5)  # the square root
    assert [difference.norm(0), difference.norm(low / 4)] == pytest.approx([0.5, 0.25])


def test_any_text_is_drawn(tmp_path: Path) -> None:
    views = views_of("$$ \\frac{ $x^$ _{ 日\x00\x1b\u202e<>&", ANSWER)
    for kind in ("png", "svg"):
        path = draw_matrices(views, tmp_path / "deep" / f"text.{kind}")
        assert [*path.parent.iterdir()] == [path]
        if kind == "png":
            with Image.open(path) as image:
                assert image.width > 2 * image.height > 400
        else:
            root = ET.parse(path).getroot()
            assert root.tag.endswith("svg")
            assert not [node for node in root.iter() if node.tag.endswith("script")]
        path.unlink()


def test_labels_are_short_and_known_to_the_font(figures: list[Figure], tmp_path: Path) -> None:
    label = matrices._label_of
    assert label("日") == "U+65E5"
    assert label(" the\n") == "·the↵"
    assert label("a" * 20) == "a" * 13 + "…"
    draw_matrices(views_of(SENTENCES[0] * 3, ANSWER), tmp_path / "text.png")
    assert len(figures[0].axes[0].get_xticklabels()) <= 72


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install 'toast-steering\[visual\]'"):
        draw_matrices(views_of(PROMPT, ANSWER), Path("a.png"))


def test_names_of_files_are_checked(tmp_path: Path) -> None:
    views = views_of(PROMPT, ANSWER)
    with pytest.raises(ValueError, match=r"path must end in \.png or \.svg; got 'a\.pdf'"):
        draw_matrices(views, tmp_path / "a.pdf")
    with pytest.raises(ValueError, match=r"path must end in \.npz; got 'a\.npy'"):
        save_arrays(views, tmp_path / "a.npy")
    assert not [*tmp_path.iterdir()]


def test_one_call_writes_all_files(tmp_path: Path) -> None:
    model, tokenizer = steer(plain_decoder()), tiny_tokenizer()
    files = visualize_text(model, tokenizer, [PROMPT, PROMPT], tmp_path, answers=[ANSWER, HARD], head=1)
    kinds = (".html", ".png", ".svg", ".npz")
    assert files == [tmp_path / f"text-{number}{kind}" for number in (1, 2) for kind in kinds]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    page = Page((tmp_path / "text-2.html").read_bytes().decode())
    assert page.texts == [PROMPT, HARD] * 3
    assert "Where the model looks, 2 of 2" in page.visible
    assert "Attention of block 2, head 1." in page.visible
    one = visualize_text(model, tokenizer, PROMPT, tmp_path / "one", max_new_tokens=2, title="A < B")
    page = Page(one[0].read_text())
    assert page.texts[0] == PROMPT
    assert "A < B" in page.visible
    with pytest.raises(ValueError, match="one for each of 2 prompts, or None; got 1"):
        visualize_text(model, tokenizer, [PROMPT, PROMPT], tmp_path, answers=[ANSWER])
