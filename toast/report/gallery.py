"""Where a vision run's model looks: pictures, right and wrong, and how far its attention moved."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from toast.report.charts import Axis, Series, chart
from toast.report.elements import table
from toast.report.held_out import HeldOutLooks, Look
from toast.report.images import as_uri, shown
from toast.training.data import Splits
from toast.visual.measures import share_of_area
from toast.visual.pixels import Preparation


def views(looks: HeldOutLooks, splits: Splits, data: dict[str, Any], attention: str, count: int) -> Markup:
    """Returns the section with the pictures.

    Args:
        looks: What was looked at.
        splits: The run's data.
        data: What the backbone expects of pictures, with `mean` and `std`.
        attention: What the method makes of the frozen model's attention, in a word such as `refocused`.
        count: Pictures to show.
    """
    preparation = Preparation(lambda pixels: pixels, data["mean"], data["std"])
    dataset = getattr(splits, looks.split)
    chosen = looks.chosen(count)
    rows = [
        _row(look, preparation.shown(dataset[0, look.index]["pixels"]), splits.classes, attention)
        for look in chosen
    ]
    right = sum(look.is_right for look in chosen)
    of = f"pictures of the {looks.split} split" + (
        ", for there is no other" if looks.split == "train" else ""
    )
    return Markup(
        "<section><h2>Where it looks</h2><p>{} {}: {} that the model names rightly and {} that it "
        "does not, spread over the split and not picked by how they look. Maps show {}; {}{}.</p>{}{}"
        "</section>"
    ).format(
        len(chosen),
        of,
        right,
        len(chosen) - right,
        looks.shows,
        _scales(looks),
        "; the frame is where the answer is" if any(look.target is not None for look in chosen) else "",
        Markup("").join(rows),
        _numbers(looks, attention),
    )


def _scales(looks: HeldOutLooks) -> str:
    first = looks.seen[0]
    scale = (
        "scales begin at 0" if first.frozen is None else "both attentions of a picture share one scale from 0"
    )
    return scale if first.selection is None else f"{scale}, that of the selection weights fits them"


def _row(look: Look, picture: Tensor, classes: Sequence[str], after: str) -> Markup:
    """Returns one picture and its maps."""
    maps = [look.attention] if look.frozen is None else [look.attention, look.frozen]
    top = float(torch.stack([each.max() for each in maps]).max())
    box = None if look.target is None else box_of(look.target)
    said = classes[look.predicted]
    panels = [_panel(shown(picture, box=box), "input", "")]

    def add(values: Tensor | None, high: float, name: str, share: float | None) -> None:
        if values is not None:
            inside = "" if share is None else f"{share:.2f} in the frame"
            drawn = shown(picture, values, look.cell, high, box=box)
            panels.append(_panel(drawn, name, inside, f"{name} attention over the picture"))

    add(look.frozen, top, "frozen", look.frozen_on_target)
    if look.selection is not None:
        least, most = float(look.selection.min()), float(look.selection.max())
        drawn = shown(picture, look.selection, look.cell, most, least, box)
        note = f"{least:.2f} to {most:.2f}"
        if look.selected is not None:
            note = f"{look.selected[0]:.2f} in the frame, {look.selected[1]:.2f} outside"
        panels.append(_panel(drawn, "selection", note, "selection weights over the picture"))
    add(look.attention, top, after, look.on_target)
    verdict = Markup('<span class="{}">{}</span>').format(
        "right" if look.is_right else "wrong", "✓ right" if look.is_right else "✗ wrong"
    )
    label = "" if look.is_right else f"is {classes[look.label]}"
    return Markup(
        '<figure class="look"><figcaption>{} <b>{}</b> <span>{}</span> <span>{}</span></figcaption>'
        '<div class="panels" style="--n:{}">{}</div></figure>'
    ).format(verdict, said, f"says {look.confidence:.2f}", label, len(panels), Markup("").join(panels))


def _panel(image: Any, name: str, note: str, alt: str = "the picture as the model sees it") -> Markup:
    return Markup('<div><img src="{}" width="{}" height="{}" alt="{}"><p><b>{}</b> {}</p></div>').format(
        as_uri(image), image.width, image.height, alt, name, note
    )


def box_of(target: Tensor) -> tuple[float, float, float, float] | None:
    """Returns the frame around a mask, x0, y0, x1, y1 in pixels; None if the mask is empty.

    Args:
        target: `(height, width)`, 0 to 1.
    """
    rows = (target >= 0.5).any(1).nonzero()[:, 0].tolist()
    columns = (target >= 0.5).any(0).nonzero()[:, 0].tolist()
    if not rows:
        return None
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


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


def _numbers(looks: HeldOutLooks, after: str) -> Markup:
    """Returns how far the attention moved, for pictures named rightly and wrongly, and picture by picture."""
    groups = {
        "all": looks.seen,
        "named rightly": [look for look in looks.seen if look.is_right],
        "named wrongly": [look for look in looks.seen if not look.is_right],
    }
    columns = {
        "frozen, on target": [[look.frozen_on_target for look in group] for group in groups.values()],
        f"{after}, on target": [[look.on_target for look in group] for group in groups.values()],
        "selected inside": [[_selected(look, 0) for look in group] for group in groups.values()],
        "outside": [[_selected(look, 1) for look in group] for group in groups.values()],
        "gain": [[_gain(look) for look in group] for group in groups.values()],
        "moved": [[look.moved for look in group] for group in groups.values()],
    }
    columns = {name: held for name, held in columns.items() if any(v is not None for v in held[0])}
    if not columns:
        return Markup("")
    rows = [
        [name, f"{len(group):,}", *(_mean(held[i]) for held in columns.values())]
        for i, (name, group) in enumerate(groups.items())
    ]
    shares = on_target(looks)
    notes = [
        f"Of {len(looks.seen):,} of the {looks.of:,} pictures of the {looks.split} split; "
        "mean ± two standard errors."
    ]
    if shares is not None:
        notes.append(
            f"The target, in sight in {shares[3]:,} of them, is {shares[2]:.3f} of the area: what even "
            "attention would reach."
        )
    if "outside" in columns:
        notes.append("Selected: the mean selection weight of the tokens on the target and of the others.")
    if "moved" in columns:
        notes.append("Moved: the share of the attention that went elsewhere (total variation), 0 to 1.")
    return Markup('<h3>In numbers</h3><p class="note">{}</p>{}{}').format(
        " ".join(notes), table(["pictures", "", *columns], rows), _scatter(looks, after)
    )


def _selected(look: Look, place: int) -> float | None:
    return None if look.selected is None else look.selected[place]


def _gain(look: Look) -> float | None:
    if look.on_target is None or look.frozen_on_target is None:
        return None
    return look.on_target - look.frozen_on_target


def _mean(values: Sequence[float | None]) -> str:
    held = [value for value in values if value is not None]
    if not held:
        return "–"
    error = 2 * statistics.stdev(held) / len(held) ** 0.5 if len(held) > 1 else 0.0
    return f"{statistics.mean(held):.3f} ± {error:.3f}"


def _scatter(looks: HeldOutLooks, after: str) -> Markup:
    """Returns each picture's share on target, before against after."""
    known = [look for look in looks.seen if None not in (look.frozen_on_target, look.on_target)]
    if not known:
        return Markup("")

    def series(name: str, is_right: bool, colour: Any) -> Series:
        held = [look for look in known if look.is_right is is_right]
        points = [(look.frozen_on_target or 0.0, look.on_target or 0.0) for look in held]
        return Series(name, points, "dots", colour, [f"picture {look.index}" for look in held])

    drawn = chart(
        "Attention on target, picture by picture",
        [series("named rightly", True, "a"), series("wrongly", False, "b")],
        Axis("frozen", 0, 1), Axis(after, 0, 1), diagonal=True,
    )  # fmt: skip
    return Markup(
        '<div class="aside">{}<p class="note">Above the dashed line attention moved onto the target.</p>'
        "</div>"
    ).format(drawn)
