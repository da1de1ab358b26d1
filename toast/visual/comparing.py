"""`compare`: where models look, measured over pictures whose targets are known, with intervals."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from toast.files import beside, strict_json
from toast.visual import measures
from toast.visual.grids import Maps
from toast.visual.maps import look
from toast.visual.modes import evaluating

if TYPE_CHECKING:
    from rich.table import Table

FROZEN = "frozen"

#: The measures of a comparison, in order, and what they are called in its table.
MEASURES: dict[str, str] = {
    "on_target": "attention on target",
    "pointing": "pointing game",
    "entropy": "entropy, of even",
    "total_variation": "moved",
    "jensen_shannon": "Jensen-Shannon, bits",
}


@dataclass(frozen=True)
class Estimate:
    """The mean of a measure over pictures.

    Args:
        mean: The mean.
        low: Lower end of its bootstrap interval.
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Comparison:
    """Where models look, by name.

    Args:
        rows: By model, each measure's mean and interval. "moved" (total variation) and Jensen-Shannon are
            against the reference.
        gains: By model other than the reference, the mean of the difference to it, picture by picture.
        values: By model and measure, the value of each picture, `(pictures,)`.
        reference: The model that the others are held against: the frozen one if there is one.
        area: Mean share of the picture that the targets cover: what even attention would reach.
        pictures: Number of pictures.
        confidence: Of the intervals.
        shows: What the maps show.
    """

    rows: dict[str, dict[str, Estimate]]
    gains: dict[str, dict[str, Estimate]]
    values: dict[str, dict[str, Tensor]]
    reference: str
    area: float
    pictures: int
    confidence: float
    shows: str

    def table(self) -> Table:
        """Returns a table for the terminal.

        Raises:
            ImportError: If rich is not there.
        """
        try:
            from rich.table import Table
        except ImportError as error:
            raise ImportError("the table needs rich: pip install 'toast-steering[visual]'") from error
        table = Table(
            title=f"{self.pictures} pictures: {self.shows}",
            caption=f"Mean [{self.confidence:.0%} bootstrap interval]; targets are {self.area:.3f} of the "
            f"area; moved and Jensen-Shannon against {self.reference}.",
        )
        table.add_column("model")
        for name in MEASURES.values():
            table.add_column(name, justify="right")
        for model, row in self.rows.items():
            table.add_row(model, *(str(row[name]) if name in row else "–" for name in MEASURES))
        return table

    def as_dict(self) -> dict[str, Any]:
        """Returns everything but the single values, for JSON."""
        return {
            "models": {model: {k: asdict(v) for k, v in row.items()} for model, row in self.rows.items()},
            "gains": {model: {k: asdict(v) for k, v in row.items()} for model, row in self.gains.items()},
            "reference": self.reference, "area": self.area, "pictures": self.pictures,
            "confidence": self.confidence, "shows": self.shows,
        }  # fmt: skip

    def save(self, path: Path) -> Path:
        """Writes the comparison: `.json`, or `.csv` with a line for each model and measure.

        Raises:
            ValueError: If the name ends otherwise.
        """
        if path.suffix == ".json":
            text = strict_json(self.as_dict(), indent=2) + "\n"
        elif path.suffix == ".csv":
            text = self._as_csv()
        else:
            raise ValueError(f"path: needs a name that ends in .json or .csv; got {str(path)!r}.")
        with beside(path) as new:
            new.write_text(text, encoding="utf-8", newline="")
        return path

    def _as_csv(self) -> str:
        lines = io.StringIO()
        writer = csv.writer(lines, lineterminator="\n")
        head = ("mean", "low", "high")
        writer.writerow(["model", "measure", *head, *(f"gain_{name}" for name in head)])
        for model, row in self.rows.items():
            for name, estimate in row.items():
                gain = self.gains.get(model, {}).get(name)
                gained = [""] * 3 if gain is None else [gain.mean, gain.low, gain.high]
                writer.writerow([model, name, estimate.mean, estimate.low, estimate.high, *gained])
        return lines.getvalue()


def compare(
    models: Mapping[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    tolerance: float = 0.0,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    **options: Any,
) -> Comparison:
    """Measures where models look on pictures whose targets are known.

    The frozen model need not be given: it is the first pass of the first steered model, or the model without
    its adapter of the first other one. All are put in evaluation mode while they are measured.

    Args:
        models: Models by name, on the same pictures: steered, with another adapter, fully tuned.
        batches: Pixels as the models take them, `(batch, channels, height, width)`, and the targets: boxes
            `(batch, 4)`, x0, y0, x1, y1 in these pixels, or masks `(batch, height, width)`.
        tolerance: Of the pointing game, in pixels.
        confidence: Of the percentile bootstrap intervals (Efron 1979) over pictures.
        resamples: Number of bootstrap samples; the same ones for all models.
        seed: Of these.
        **options: Of `toast.visual.maps.look`, such as `block`, `head` or `method`.

    Raises:
        ValueError: If there is no model or no picture, or a batch's targets are not as many as its pictures.
    """
    if not models:
        raise ValueError("models: needs at least one model; got none.")
    found: dict[str, dict[str, list[Tensor]]] = {}
    area: list[Tensor] = []
    shows = ""
    with ExitStack() as modes:
        for model in models.values():
            modes.enter_context(evaluating(model))
        for pixels, target in batches:
            if len(target) != len(pixels):
                raise ValueError(
                    f"batches: needs a target for each picture; got {len(pixels)} pictures and {len(target)}."
                )
            target = target.cpu()
            area.append(measures.share_of_area(target, (pixels.shape[-2], pixels.shape[-1])))
            maps: dict[str, Maps] = {}
            for name, model in models.items():
                views = look(model, pixels, **options)
                shows = shows or views.name
                if views.frozen is not None and FROZEN not in models:
                    maps.setdefault(FROZEN, views.frozen)
                maps[name] = views.attention
            reference = FROZEN if FROZEN in maps else next(iter(maps))
            for name in sorted(maps, key=lambda name: name != reference):
                row = found.setdefault(name, {})
                for measure, found_here in _measured(maps[name], target, maps[reference], tolerance).items():
                    row.setdefault(measure, []).append(found_here.double())
    if not found:
        raise ValueError("batches: needs at least one batch of pictures; got none.")
    values = {name: {k: torch.cat(parts) for k, parts in row.items()} for name, row in found.items()}
    reference = next(iter(values))
    pictures = len(values[reference]["on_target"])
    draws = torch.randint(pictures, (resamples, pictures), generator=torch.Generator().manual_seed(seed))
    estimate = partial(_estimate, draws=draws, confidence=confidence)
    same = ("total_variation", "jensen_shannon")  # nothing to gain: they are against the reference already
    return Comparison(
        rows={
            name: {k: estimate(v) for k, v in row.items() if name != reference or k not in same}
            for name, row in values.items()
        },
        gains={
            name: {k: estimate(v - values[reference][k]) for k, v in row.items() if k not in same}
            for name, row in values.items()
            if name != reference
        },
        values=values,
        reference=reference,
        area=float(torch.cat(area).mean()),
        pictures=pictures,
        confidence=confidence,
        shows=shows,
    )


def _measured(maps: Maps, target: Tensor, reference: Maps, tolerance: float) -> dict[str, Tensor]:
    """Returns the measures of each picture; of change only where both have the same grid."""
    found = {
        "on_target": measures.share_in_target(maps.values, target, maps.cell),
        "pointing": measures.pointing_game(maps.values, target, maps.cell, tolerance),
        "entropy": measures.entropy(maps.values),
    }
    if maps.values.shape == reference.values.shape:
        found["total_variation"] = measures.total_variation(maps.values, reference.values)
        found["jensen_shannon"] = measures.jensen_shannon(maps.values, reference.values)
    return found


def _estimate(values: Tensor, draws: Tensor, confidence: float) -> Estimate:
    """Returns the mean with its percentile bootstrap interval.

    Args:
        values: Of each picture, `(pictures,)`.
        draws: Bootstrap samples, `(resamples, pictures)`.
        confidence: Of the interval.
    """
    means = values[draws].mean(1)
    ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=means.dtype)
    low, high = torch.quantile(means, ends).tolist()
    return Estimate(float(values.mean()), low, high)
