"""Where a vision run's model looks: pictures, right and wrong, and how far its attention moved."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from toast.files.templates import render
from toast.report.charts import Axis, Series, chart
from toast.report.held_out import HeldOutLooks
from toast.report.images import as_uri, drawn
from toast.training.answer_kinds import Answers, ClassAnswers
from toast.training.data import Splits
from toast.training.many_heads import Heads
from toast.visual.looks import Look
from toast.visual.measures import share_of_area
from toast.visual.panels import FEW, Panel, Row, row_of
from toast.visual.pixels import Preparation


def pictures(looks: HeldOutLooks, splits: Splits, data: dict[str, Any], attention: str, count: int) -> Markup:
    """Returns the section with the pictures.

    Args:
        looks: What was looked at.
        splits: The run's data.
        data: What the backbone expects of pictures, with `mean` and `std`.
        attention: What the method makes of the frozen model's attention, in a word such as `refocused`.
        count: Pictures to show.
    """
    preparation = Preparation.of_pixels(data["mean"], data["std"])
    dataset = getattr(splits, looks.split)
    chosen = looks.chosen(count)
    shown = [
        _picture(look, preparation.shown(item["pixels"]), splits.answers, item["label"], attention)
        for look, item in ((look, dataset[0, look.index]) for look in chosen)
    ]
    classifies = not isinstance(splits.answers, Heads)
    right = sum(look.is_right for look in chosen)
    kinds = f": {right} that the model classifies correctly and {len(chosen) - right} that it does not"
    of = f"pictures of the {looks.split} split" + (
        ", since there is no other" if looks.split == "train" else ""
    )
    frame = "; the frame marks the target" if any(look.target is not None for look in chosen) else ""
    return render(
        "report/templates/pictures.html.jinja",
        introduction=(
            f"{len(chosen)} {of}{kinds if classifies else ''}, spread over the split and not selected by "
            f"appearance. Maps show {looks.shows}; "
            f"{_scales(looks)}{frame}."
        ),
        pictures=shown,
        numbers=_numbers(looks, classifies),
    )


def _scales(looks: HeldOutLooks) -> str:
    first = looks.seen[0]
    scale = (
        "scales begin at 0" if first.frozen is None else "both attentions of a picture share one scale from 0"
    )
    return scale if first.selection is None else f"{scale}, that of the selection weights covers their range"


def _picture(look: Look, picture: Tensor, answers: Answers, labels: Any, after: str) -> dict[str, Any]:
    """Returns one picture, what the model says of it, and its maps."""
    row = row_of(look, picture, after=after, kinds=FEW, box_name="frame", colour_bars=False)
    panels = [_panel(row, panel) for panel in row.panels]
    if isinstance(answers, Heads):
        assert look.scores is not None
        return {"captions": answers.captions(look.scores, labels), "panels": panels}
    assert isinstance(answers, ClassAnswers)
    assert look.predicted is not None
    assert look.label is not None
    classes = answers.names
    return {
        "is_right": look.is_right,
        "predicted": classes[look.predicted],
        "confidence": look.confidence,
        "label": classes[look.label],
        "panels": panels,
    }


def _panel(row: Row, panel: Panel) -> dict[str, Any]:
    image = drawn(row, panel)
    alt = "the picture as the model sees it" if panel.values is None else f"{panel.title} over the picture"
    return {
        "uri": as_uri(image), "width": image.width, "height": image.height,
        "alt": alt, "name": panel.short, "note": panel.note,
    }  # fmt: skip


def on_target(looks: HeldOutLooks) -> tuple[float | None, float, float, int] | None:
    """Returns the mean share of attention on the target, before (if it differs) and after, and of the area.

    And of how many pictures: those whose target is in sight; None if there are none.
    """
    known = [look for look in looks.seen if look.on_target is not None and look.target is not None]
    if not known:
        return None
    before = [look.frozen_on_target for look in known if look.frozen_on_target is not None]
    targets = torch.stack([look.target for look in known if look.target is not None])
    area = float(share_of_area(targets, (targets.shape[1], targets.shape[2])).mean())
    return (
        statistics.mean(before) if before else None,
        statistics.mean(look.on_target for look in known if look.on_target is not None),
        area,
        len(known),
    )


def _numbers(looks: HeldOutLooks, classifies: bool) -> dict[str, Any] | None:
    """Returns how far the attention moved, for pictures classified correctly and not, and picture by picture.

    None if nothing was measured.
    """
    groups = {"all": looks.seen}
    if classifies:
        groups["classified correctly"] = [look for look in looks.seen if look.is_right]
        groups["misclassified"] = [look for look in looks.seen if not look.is_right]
    columns = {
        "frozen, on target": [[look.frozen_on_target for look in group] for group in groups.values()],
        "now, on target": [[look.on_target for look in group] for group in groups.values()],
        "selected inside": [[_selected(look, 0) for look in group] for group in groups.values()],
        "outside": [[_selected(look, 1) for look in group] for group in groups.values()],
        "gain": [[_gain(look) for look in group] for group in groups.values()],
        "moved": [[look.moved for look in group] for group in groups.values()],
    }
    columns = {name: values for name, values in columns.items() if any(v is not None for v in values[0])}
    if not columns:
        return None
    rows = [
        [name, f"{len(group):,}", *(_mean(values[i]) for values in columns.values())]
        for i, (name, group) in enumerate(groups.items())
    ]
    shares = on_target(looks)
    notes = [
        f"Of {len(looks.seen):,} of the {looks.of:,} pictures of the {looks.split} split; "
        "mean ± two standard errors."
    ]
    if shares is not None:
        notes.append(
            f"The target, visible in {shares[3]:,} of them, covers {shares[2]:.3f} of the area: the share of "
            "uniform attention on it."
        )
    if "outside" in columns:
        notes.append("Selected: the mean selection weight of the tokens on the target and of the others.")
    if "moved" in columns:
        notes.append("Moved: the share of the attention that went elsewhere (total variation), 0 to 1.")
    return {
        "note": " ".join(notes),
        "head": ["pictures", "", *columns],
        "rows": rows,
        "scatter": _scatter(looks, classifies),
    }


def _selected(look: Look, place: int) -> float | None:
    return None if look.selected is None else look.selected[place]


def _gain(look: Look) -> float | None:
    if look.on_target is None or look.frozen_on_target is None:
        return None
    return look.on_target - look.frozen_on_target


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    error = 2 * statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else 0.0
    return f"{statistics.mean(known):.3f} ± {error:.3f}"


def _scatter(looks: HeldOutLooks, classifies: bool) -> Markup:
    """Returns each picture's share on target, before against after."""
    known = [look for look in looks.seen if None not in (look.frozen_on_target, look.on_target)]
    if not known:
        return Markup("")

    def series(name: str, is_right: bool, colour: Any) -> Series:
        chosen = [look for look in known if look.is_right is is_right]
        points = [(look.frozen_on_target or 0.0, look.on_target or 0.0) for look in chosen]
        return Series(name, points, "dots", colour, [f"picture {look.index}" for look in chosen])

    shown = [series("classified correctly", True, "a"), series("misclassified", False, "b")]
    return chart(
        "Attention on target, picture by picture",
        shown if classifies else [series("", False, "a")],
        Axis("frozen", 0, 1), Axis("now", 0, 1), diagonal=True,
    )  # fmt: skip
