"""The picture of the benchmark: cost against the depth of steering, a line for each batch size."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from toast.benchmark.timing import Ratio


def draw(ratios: dict[str, Ratio], path: Path) -> None:
    """Draws what `measures.depth` found.

    Args:
        ratios: By `batch N, from block M`, the cost as a multiple of the plain model's.
        path: The PNG file.
    """
    from matplotlib.figure import Figure

    lines: dict[int, list[tuple[int, Ratio]]] = defaultdict(list)
    for name, ratio in ratios.items():
        batch, block = map(int, re.findall(r"\d+", name))
        lines[batch].append((block, ratio))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for batch, points in lines.items():
        blocks = [block for block, _ in points]
        medians = [ratio.median for _, ratio in points]
        spread = [
            [ratio.median - ratio.low for _, ratio in points],
            [ratio.high - ratio.median for _, ratio in points],
        ]
        axes.errorbar(blocks, medians, yerr=spread, marker="o", capsize=3, label=f"batch {batch}")
    axes.axhline(2, color="grey", linewidth=1, linestyle=":", label="two passes")
    axes.set_xlabel("first steered block")
    axes.set_ylabel("time of a forward pass, × plain")
    axes.set_ylim(bottom=0.9)
    axes.legend()
    figure.savefig(path, dpi=150)
