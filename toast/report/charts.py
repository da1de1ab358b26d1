"""Charts as inline SVG: drawn in the colours of the page, light or dark, and sized for a phone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from markupsafe import Markup

Points = Sequence[tuple[float, float]]

# Of a chart, in units that are pixels on a phone.
_WIDTH, _HEIGHT = 360, 216
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 16, 10, 34
#: Most points of a line; more are averaged.
_MOST = 240


@dataclass(frozen=True)
class Series:
    """What is drawn in one colour.

    Args:
        name: For the legend; none if empty.
        points: x and y; those that are no finite numbers are left out.
        kind: How.
        colour: `a` or `b`, of the page.
        tips: Shown for a point that is pointed at.
        sizes: Of single points, 0 to 1, by their area; none draws all alike.
    """

    name: str
    points: Points
    kind: Literal["line", "faint", "dots", "marked"] = "line"
    colour: Literal["a", "b"] = "a"
    tips: Sequence[str] = ()
    sizes: Sequence[float] = ()


@dataclass(frozen=True)
class Axis:
    """One axis.

    Args:
        name: With its unit.
        low: Where it begins; None fits the points.
        high: Where it ends; None fits the points.
        log: Whether it is logarithmic where the values are positive and span more than a factor of 10.
        whole: Whether it counts something, and has whole numbers alone.
    """

    name: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    whole: bool = False


def chart(title: str, series: Sequence[Series], x: Axis, y: Axis, diagonal: bool = False) -> Markup:
    """Returns a chart with its title and legend; nothing if there are no points.

    Args:
        title: Above it.
        series: What is drawn; the later over the earlier.
        x: The horizontal axis.
        y: The vertical axis.
        diagonal: Whether to draw the line where both are equal.
    """
    series = [_finite(each) for each in series]
    points = [point for each in series for point in each.points]
    if not points:
        return Markup("")
    across = _Scale(x, [p[0] for p in points], _LEFT, _WIDTH - _RIGHT)
    down = _Scale(y, [p[1] for p in points], _HEIGHT - _BOTTOM, _TOP)
    parts = [
        *(_horizontal(tick, down) for tick in down.ticks),
        *(_vertical(tick, across) for tick in across.ticks),
    ]
    if diagonal:
        low, high = max(across.low, down.low), min(across.high, down.high)
        parts.append(_path([(low, low), (high, high)], across, down, "diagonal"))
    parts += [_drawn(each, across, down) for each in series]
    parts.append(
        Markup('<text class="name" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 4, x.name
        )
    )
    label = ", ".join(each.name for each in series if each.name)
    return Markup(
        '<figure class="chart"><figcaption><b>{}</b>{}</figcaption>'
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg></figure>'
    ).format(
        title,
        _legend(series, y, down.log),
        _WIDTH,
        _HEIGHT,
        f"{title}: {label or y.name}",
        Markup("").join(parts),
    )


def averaged(points: Points, most: int = _MOST) -> list[tuple[float, float]]:
    """Returns as many points, each the mean of its neighbours, where there are more."""
    if len(points) <= most:
        return list(points)
    bounds = [i * len(points) // most for i in range(most + 1)]
    return [_mean(points[a:b]) for a, b in itertools.pairwise(bounds)]


def running(points: Points, share: float = 0.08) -> list[tuple[float, float]]:
    """Returns the running mean over a share of the points, which stand in the middle of it."""
    reach = max(1, round(len(points) * share / 2))
    return [(x, _mean(points[max(0, i - reach) : i + reach + 1])[1]) for i, (x, _) in enumerate(points)]


def _mean(points: Points) -> tuple[float, float]:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def _finite(series: Series) -> Series:
    kept = [i for i, (x, y) in enumerate(series.points) if math.isfinite(x) and math.isfinite(y)]
    return replace(
        series,
        points=[series.points[i] for i in kept],
        tips=[series.tips[i] for i in kept if series.tips],
        sizes=[series.sizes[i] for i in kept if series.sizes],
    )


class _Scale:
    """Maps values to places.

    Args:
        axis: The axis.
        values: What it has to hold.
        start: Place of its lower end.
        end: Place of its upper end.
    """

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        from matplotlib.ticker import LogLocator, MaxNLocator

        self.log = axis.log and 0 < 10 * min(values) < max(values)
        low = min(values) if axis.low is None else axis.low
        high = max(values) if axis.high is None else axis.high
        if low == high:
            high = low + (abs(low) or 1.0)
        decades = math.log10(high / low) if self.log else 0.0
        subs = (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
        steps = [1, 2, 5, 10] if axis.whole else [1, 2, 2.5, 5, 10]
        locator = (
            LogLocator(subs=subs, numticks=6) if self.log else MaxNLocator(5, steps=steps, min_n_ticks=3)
        )
        ticks = [float(tick) for tick in locator.tick_values(low, high)]
        # An end that is not given is a tick, so that no point lies on the frame.
        below, above = [t for t in ticks if t <= low], [t for t in ticks if t >= high]
        self.low = low if axis.low is not None or not below else below[-1]
        self.high = high if axis.high is not None or not above else above[0]
        self.ticks = [tick for tick in ticks if self.low <= tick <= self.high]
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        """Returns the place of a value."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 2)


def _horizontal(tick: float, scale: _Scale) -> Markup:
    return Markup('<path class="grid" d="M{0} {1}H{2}"/><text x="{3}" y="{1}" dy=".32em">{4}</text>').format(
        _LEFT, scale(tick), _WIDTH - _RIGHT, _LEFT - 6, number(tick)
    )


def _vertical(tick: float, scale: _Scale) -> Markup:
    return Markup('<text class="x" x="{}" y="{}">{}</text>').format(
        scale(tick), _HEIGHT - _BOTTOM + 14, number(tick)
    )


def _drawn(series: Series, across: _Scale, down: _Scale) -> Markup:
    parts = []
    if series.kind != "dots" and len(series.points) > 1:
        parts.append(_path(series.points, across, down, f"{series.kind} {series.colour}"))
    if series.kind in ("dots", "marked") or len(series.points) == 1:
        tips = series.tips or [""] * len(series.points)
        radii = [1.5 + 6 * size**0.5 for size in series.sizes] or [3.2] * len(series.points)
        for (x, y), tip, radius in zip(series.points, tips, radii, strict=True):
            title = Markup("<title>{}</title>").format(tip) if tip else ""
            parts.append(
                Markup('<circle class="{}" cx="{}" cy="{}" r="{}">{}</circle>').format(
                    series.colour, across(x), down(y), f"{radius:.2g}", title
                )
            )
    return Markup("").join(parts)


def _path(points: Points, across: _Scale, down: _Scale, kind: str) -> Markup:
    steps = " ".join(f"{across(x):g},{down(y):g}" for x, y in points)
    return Markup('<polyline class="{}" points="{}"/>').format(kind, steps)


def _legend(series: Sequence[Series], y: Axis, log: bool) -> Markup:
    keys = [
        Markup('<span class="key {}">{}</span>').format(f"{each.kind} {each.colour}", each.name)
        for each in series
        if each.name and each.points
    ]
    if len(keys) < 2:
        label = ", ".join(part for part in (y.name, "logarithmic" * log) if part)
        return Markup(' <span class="key">{}</span>').format(label) if label else Markup("")
    return Markup("").join(keys)


def number(value: float) -> str:
    """Returns a number in as few characters as it can be read from."""
    if value and abs(value) < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-").replace("-", "−")
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{round(value, 6):g}".replace("-", "−")
