"""`compare`: what models say and where they look, measured over pictures, with intervals."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from math import isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from toast.files.atomic import beside, strict_json
from toast.visual import measures, targets
from toast.visual.attention_maps import AttentionMaps
from toast.visual.looks import (
    ACCURACY,
    ENTROPY,
    JENSEN_SHANNON,
    ON_TARGET,
    POINTING,
    TOTAL_VARIATION,
    UNKNOWN,
    looks_of,
)
from toast.visual.maps import look
from toast.visual.modes import evaluating

if TYPE_CHECKING:
    from rich.table import Table

FROZEN = "frozen"
#: Pixels; targets, if there are any; and labels, if there are any.
Batch = tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor | None]

#: The measures of a comparison, in order, and what they are called in its table.
MEASURES: dict[str, str] = {
    ACCURACY: "accuracy",
    ON_TARGET: "attention on target",
    POINTING: "pointing game",
    targets.INSIDE: "selected inside target",
    targets.OUTSIDE: "selected outside",
    targets.RATIO: "inside over outside",
    ENTROPY: "entropy / uniform",
    TOTAL_VARIATION: "moved",
    JENSEN_SHANNON: "Jensen-Shannon, bits",
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
    """What models say and where they look, measured over pictures: what `toast.compare` returns.

    Args:
        rows: By model, each measure's mean and interval, as far as it was measured: accuracy where labels are
            known, attention on target, pointing game and selection where targets are in sight (for what is
            measured on targets see `toast.visual.targets`). "moved" (total variation) and Jensen-Shannon are
            against the reference.
        gains: By model other than the reference, the mean of the difference to it, picture by picture.
        values: By model and measure, the value of each picture, `(pictures,)`; not a number where there is
            none. The ratio of selection is one of means and has none.
        reference: The model that the others are held against: the frozen one if there is one.
        area: Mean share of the picture that the targets in sight cover: what even attention would reach;
            None if there are none.
        pictures: Number of pictures.
        in_sight: How many of them have a target in sight.
        out_of_sight: How many have one that the preparation has cropped away.
        confidence: Of the intervals.
        shows: What the maps show.
    """

    rows: dict[str, dict[str, Estimate]]
    gains: dict[str, dict[str, Estimate]]
    values: dict[str, dict[str, Tensor]]
    reference: str
    area: float | None
    pictures: int
    in_sight: int
    out_of_sight: int
    confidence: float
    shows: str

    def table(self) -> Table:
        """Returns a table for the terminal: a row for each measure, a column for each model.

        Raises:
            ImportError: If rich is not there.
        """
        try:
            from rich.table import Table
        except ImportError as error:
            raise ImportError("the table needs rich: pip install 'toast-steering[visual]'") from error
        table = Table(
            title=f"{self.pictures} pictures: {self.shows}",
            caption=f"Mean [{self.confidence:.0%} bootstrap interval]; {self._of_targets()}moved and "
            f"Jensen-Shannon against {self.reference}.",
        )
        table.add_column("")
        for model in self.rows:
            table.add_column(model, justify="right")
        for name, called in MEASURES.items():
            if any(name in row for row in self.rows.values()):
                table.add_row(called, *(str(row[name]) if name in row else "–" for row in self.rows.values()))
        return table

    def _of_targets(self) -> str:
        """Returns the remarks on targets below the table."""
        if self.area is None:
            return "" if not self.out_of_sight else f"all {self.out_of_sight} targets are cropped away; "
        away = f", {self.out_of_sight} more are cropped away" if self.out_of_sight else ""
        return f"{self.in_sight} visible targets{away}, {self.area:.3f} of the area; "

    def as_dict(self) -> dict[str, Any]:
        """Returns everything but the single values, for JSON, which knows no infinite end of an interval."""

        def plain(table: dict[str, dict[str, Estimate]]) -> dict[str, Any]:
            return {
                model: {
                    k: {n: x if isfinite(x) else None for n, x in asdict(v).items()} for k, v in row.items()
                }
                for model, row in table.items()
            }

        return {
            "models": plain(self.rows),
            "gains": plain(self.gains),
            "reference": self.reference, "area": self.area, "pictures": self.pictures,
            "in_sight": self.in_sight, "out_of_sight": self.out_of_sight,
            "confidence": self.confidence, "shows": self.shows,
        }  # fmt: skip

    def save(self, path: Path | str) -> Path:
        """Writes the comparison: `.json`, or `.csv` with a line for each model and measure.

        Raises:
            ValueError: If the name ends otherwise.
        """
        path = Path(path)
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
    batches: Iterable[Batch],
    *,
    classifiers: Collection[str] | None = None,
    tolerance: float = 0.0,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    **options: Any,
) -> Comparison:
    """Measures what models say of pictures and where they look, on targets if these are known.

    The frozen model need not be given: it is the first pass of the first steered model, or the model without
    its adapter of the first other one. All are put in evaluation mode while they are measured.

    Args:
        models: Models by name, on the same pictures: steered, with another adapter, fully tuned.
        batches: Pixels as the models take them, `(batch, channels, height, width)`; the targets: boxes
            `(batch, 4)`, x0, y0, x1, y1 in these pixels, or masks `(batch, height, width)`, 0 to 1, not a
            number where one is not known, or None; and, if there are any, labels `(batch,)`, -100 where one
            is not known.
        classifiers: Models whose classes are those of the labels; None is all that are given.
        tolerance: Of the pointing game, in pixels.
        confidence: Of the percentile bootstrap intervals (Efron 1979) over pictures.
        resamples: Number of bootstrap samples; the same ones for all models.
        seed: Of these.
        **options: Of `toast.visual.maps.look`, such as `block`, `head` or `method`.

    Raises:
        ValueError: If there is no model or no picture, or a batch's targets or labels are not as many as its
            pictures.
    """
    if not models:
        raise ValueError("models: needs at least one model; got none.")
    found: dict[str, list[dict[str, float]]] = {}
    areas: list[Tensor] = []
    out_of_sight = 0
    shows = ""
    with ExitStack() as modes:
        for model in models.values():
            modes.enter_context(evaluating(model))
        for batch in batches:
            pixels, target, labels = _checked(batch)
            size = (pixels.shape[-2], pixels.shape[-1])
            seen = targets.in_sight(target, size)
            areas.append(measures.share_of_area(target[seen], size))
            out_of_sight += int((targets.is_known(target) & ~seen).sum())
            maps: dict[str, AttentionMaps] = {}
            for name, model in models.items():
                maps[name] = look(model, pixels, **options)
                shows = shows or maps[name].name
                before = maps[name].before
                if before is not None and FROZEN not in models:
                    maps.setdefault(FROZEN, before)
            reference = FROZEN if FROZEN in maps else next(iter(maps))
            for name in sorted(maps, key=lambda name: name != reference):
                looks = looks_of(
                    maps[name], target, labels, reference=maps[reference].attention, tolerance=tolerance
                )
                found.setdefault(name, []).extend(each.measures for each in looks)
    if not found:
        raise ValueError("batches: needs at least one batch of pictures; got none.")
    classified = [name for name in models if classifiers is None or name in classifiers]
    values = {
        name: _columns(rows, MEASURES if name in classified else MEASURES.keys() - {ACCURACY})
        for name, rows in found.items()
    }
    reference = next(iter(values))
    pictures = len(found[reference])
    draws = torch.randint(pictures, (resamples, pictures), generator=torch.Generator().manual_seed(seed))
    estimate = partial(_estimate, draws=draws, confidence=confidence)
    same = (TOTAL_VARIATION, JENSEN_SHANNON)  # nothing to gain: they are against the reference already
    against = values[reference]
    area = torch.cat(areas)
    return Comparison(
        rows={
            name: {k: estimate(v) for k, v in row.items() if name != reference or k not in same}
            | _ratio(row, draws, confidence)
            for name, row in values.items()
        },
        gains={
            name: {k: estimate(v - against[k]) for k, v in row.items() if k not in same and k in against}
            for name, row in values.items()
            if name != reference
        },
        values=values,
        reference=reference,
        area=float(area.mean()) if len(area) else None,
        pictures=pictures,
        in_sight=len(area),
        out_of_sight=out_of_sight,
        confidence=confidence,
        shows=shows,
    )


def _checked(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a batch with a target and a label for each picture, unknown ones as such.

    Raises:
        ValueError: If there are more or fewer than pictures.
    """
    pixels, target, labels = (*batch, None)[:3]
    if target is None:
        target = torch.full((len(pixels), 4), torch.nan)
    if labels is None:
        labels = torch.full((len(pixels),), UNKNOWN)
    for name, given in (("target", target), ("label", labels)):
        if len(given) != len(pixels):
            raise ValueError(
                f"batches: needs a {name} for each picture; got {len(pixels)} pictures and {len(given)}."
            )
    return pixels, target.cpu(), labels.cpu()


def _columns(rows: list[dict[str, float]], names: Collection[str]) -> dict[str, Tensor]:
    """Returns the measures in the order of the table, a value for each picture, as far as any has one."""
    return {
        name: torch.tensor([row.get(name, nan) for row in rows], dtype=torch.double)
        for name in MEASURES
        if name in names and any(name in row for row in rows)
    }


def _ratio(row: dict[str, Tensor], draws: Tensor, confidence: float) -> dict[str, Estimate]:
    """Returns the ratio of the mean selection weights; its interval is that of the ratios of resamples."""
    if targets.INSIDE not in row:
        return {}
    means = {name: float(row[name].nanmean()) for name in (targets.INSIDE, targets.OUTSIDE)}
    mean = targets.ratio(means)
    if mean is None:
        return {}
    drawn = row[targets.INSIDE][draws].nanmean(1) / row[targets.OUTSIDE][draws].nanmean(1)
    return {targets.RATIO: _interval(mean, drawn, confidence)}


def _estimate(values: Tensor, draws: Tensor, confidence: float) -> Estimate:
    """Returns the mean with its percentile bootstrap interval.

    Args:
        values: Of each picture, `(pictures,)`; those that are not a number count in no mean.
        draws: Bootstrap samples, `(resamples, pictures)`.
        confidence: Of the interval.
    """
    return _interval(float(values.nanmean()), values[draws].nanmean(1), confidence)


def _interval(mean: float, drawn: Tensor, confidence: float) -> Estimate:
    """Returns a figure with the percentile interval of what resamples give.

    A resample without any picture that counts gives none. Where its weights outside are all 0, the ratio is
    infinite, and so may be the end of the interval: hence no interpolation.
    """
    ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=drawn.dtype)
    low, high = torch.nanquantile(drawn, ends, interpolation="nearest").tolist()
    return Estimate(mean, low, high)
