"""Runs to report on, and a reader of pages that is stricter than a browser."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image

from tests.training.settings import vision
from toast.training.run import run

TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "footer", "h1", "h2", "h3", "p", "section",
    "div", "span", "b", "i", "small", "ul", "li", "dl", "dt", "dd", "pre", "code", "figure", "figcaption",
    "img", "svg", "path", "polyline", "circle", "text", "details", "summary", "table", "thead", "tbody", "tr",
    "th", "td",
}  # fmt: skip
_ALONE = {"meta", "img"}


class Page(HTMLParser):
    """Reads a page: what is not balanced, not known, or could load or run something, fails.

    Attributes:
        text: All that is said.
        codes: Contents of the blocks of code.
        images: The pictures, with their descriptions.
        circles: How many points the charts have.
        marked: Names of the rows that stand out.
        rows: The cells of each row of a table.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, Any]]] = []
        self.text = ""
        self.codes: list[str] = []
        self.images: list[tuple[str, Image.Image]] = []
        self.circles = 0
        self.marked: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        attributes = dict(attrs)
        assert tag in TAGS
        assert not any(name.startswith("on") or name in ("href", "srcset", "action") for name in attributes)
        if tag == "img":
            kind, _, data = attributes["src"].partition("base64,")
            assert kind == "data:image/jpeg;"
            self.images.append((attributes["alt"], Image.open(io.BytesIO(base64.b64decode(data)))))
        else:
            assert "src" not in attributes
        self.circles += tag == "circle"
        if tag not in _ALONE:
            self.open.append((tag, attributes))
        inside = [name for name, _ in self.open]
        if tag == "code" and inside[-2:] == ["pre", "code"]:
            self.codes.append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        inside = [name for name, _ in self.open]
        if inside and inside[-1] == "style":
            assert "url(" not in data
            assert "@import" not in data
            return
        self.text += data
        if inside[-2:] == ["pre", "code"]:
            self.codes[-1] += data
        if "td" in inside or "th" in inside:
            self.rows[-1][-1] += data
        if "th" in inside and any(held.get("class") == "marked" for _, held in self.open):
            self.marked.append(data)


def run_on_pictures(tmp: Path, **settings: Any) -> Path:
    """Trains a step or two on pictures whose test split has boxes; returns the run's folder."""
    vision(tmp)  # writes the pictures
    boxes = {f"class{i % 3}/{i:03d}.png": [i, 3, i + 9, 17] for i in range(8)}
    (tmp / "pictures" / "test" / "boxes.json").write_text(json.dumps(boxes))
    config = vision(tmp, **{"epochs": None, "steps": 2, **settings})
    run(config, "tune")
    return config.folder
