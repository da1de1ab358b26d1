"""Charts: points lie where their values are, and what is no number is left out."""

from __future__ import annotations

import math
import re

import pytest

from toast.report.charts import Axis, Series, averaged, chart, number, running


def places(drawn: str, kind: str) -> list[tuple[float, float]]:
    (line,) = re.findall(rf'<polyline class="{kind}[^"]*" points="([^"]*)"', drawn)
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.split())]


def ticks(drawn: str) -> dict[str, float]:
    """Where the labels of the vertical axis stand."""
    return {text: float(y) for y, text in re.findall(r'<text x="40" y="([^"]*)"[^>]*>([^<]*)</text>', drawn)}


def test_points_lie_where_their_values_are() -> None:
    points = [(0.0, 1.0), (5.0, 3.0), (10.0, 2.0)]
    drawn = str(chart("Loss", [Series("", points)], Axis("step", low=0, high=10), Axis("nats")))
    (x0, y0), (x1, y1), (x2, y2) = places(drawn, "line")
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert (y0 - y2) / (y0 - y1) == pytest.approx(0.5)
    at = ticks(drawn)
    assert (at["1"], at["3"], at["2"]) == (y0, y1, y2)


def test_a_logarithmic_axis_gives_equal_factors_equal_room() -> None:
    points = [(0.0, 1.0), (1.0, 10.0), (2.0, 100.0)]
    drawn = str(chart("", [Series("", points)], Axis("step"), Axis("", log=True)))
    ys = [y for _, y in places(drawn, "line")]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.02)
    assert {"1", "10", "100"} <= ticks(drawn).keys()
    assert "logarithmic" in drawn
    assert "logarithmic" not in chart("", [Series("", [(0, 2), (1, 5)])], Axis(""), Axis("", log=True))
    assert "NaN" not in str(chart("", [Series("", [(0, -1), (1, 5)])], Axis(""), Axis("", log=True)))


def test_what_is_no_number_is_left_out() -> None:
    points = [(0.0, 1.0), (1.0, math.nan), (2.0, math.inf), (3.0, 2.0)]
    drawn = str(chart("", [Series("", points, "dots", "a", list("wxyz"))], Axis(""), Axis("")))
    assert re.findall("<title>(.)</title>", drawn) == ["w", "z"]
    assert not chart("", [Series("", [(0.0, math.nan)])], Axis(""), Axis(""))
    assert "<circle" in chart("", [Series("", [(1.0, 1.0)])], Axis(""), Axis(""))  # one point is no line


def test_long_lines_are_averaged_and_smoothed() -> None:
    points = [(float(i), float(i % 2)) for i in range(1000)]
    short = averaged(points, 100)
    assert len(short) == 100
    assert short[0] == (4.5, 0.5)
    assert averaged(points[:5], 100) == points[:5]
    smooth = running(points, 0.1)
    assert [x for x, _ in smooth] == [x for x, _ in points]
    assert smooth[500][1] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (0.25, "0.25"), (1200, "1200"), (25000, "25k"), (2e6, "2M"), (3e-4, "0.0003"), (1e-7, "1e−7")],
)  # fmt: skip
def test_numbers_are_short(value: float, said: str) -> None:
    assert number(value) == said
