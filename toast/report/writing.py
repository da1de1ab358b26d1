"""`write_report`: reads a run, looks at its model, and writes the page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from markupsafe import Markup

import toast
from toast.files.atomic import beside, try_file
from toast.files.templates import render
from toast.report import gallery, results, setting
from toast.report.curves import curves
from toast.report.elements import seconds
from toast.report.held_out import HeldOutLooks, look_at_split
from toast.report.page import page
from toast.report.run_data import RunFiles, read_run, remarks
from toast.report.snippets import loading
from toast.report.texts import texts
from toast.training.data import Splits, language_splits, vision_sources, vision_splits
from toast.training.loaded import LoadedRun, load_run
from toast.training.preparing import open_seeded
from toast.training.text_targets import text_sources, text_splits
from toast.visual.figure import require_matplotlib

#: Figures that a reader wants first.
_FIRST = ("accuracy", "r2", "mean_average_precision", "perplexity", "loss", "token_accuracy")
#: Most unreadable samples that are named.
_NAMED = 10


@dataclass
class _Contents:
    """What could be opened of a run.

    Args:
        loaded: Its model; None if there is none, or it cannot be opened.
        splits: Its data; None if they cannot be opened.
        looks: Vision: what was looked at.
        problems: What could not be done, and why.
    """

    loaded: LoadedRun | None
    splits: Splits | None
    looks: HeldOutLooks | None
    problems: list[str]


def write_report(run: Path, out: Path, *, pictures: int = 8) -> Path:
    """Writes a run's report: one HTML file without network and script.

    What is there is shown: a run that has not ended has its curves and settings, and one whose data or
    backbone cannot be opened any more its figures.

    Args:
        run: The run's folder.
        out: The file; written beside and renamed.
        pictures: Held-out pictures to show (vision); 0 opens neither model nor data.

    Returns:
        The file.

    Raises:
        ImportError: If matplotlib is not there, with how to install it.
        ValueError: If the folder holds no run, or a file in it is damaged.
    """
    require_matplotlib("train")
    try_file(out, "out")
    if pictures < 0:
        raise ValueError(f"pictures: needs 0 or more; got {pictures}.")
    files = read_run(run)
    contents = _open(files) if files.has_adapter and pictures else _Contents(None, None, None, [])
    text = page(
        title=files.name,
        kind=_kind(files),
        head=_head(files, contents),
        sections=[section for section in _sections(files, contents, pictures) if section],
        foot=f"toast {toast.__version__}; from {files.place}",
    )
    with beside(out) as new:
        new.write_text(text, encoding="utf-8", newline="\n")
    return out


def _open(files: RunFiles) -> _Contents:
    """Opens model and data as far as that goes, and looks at the model."""
    contents = _Contents(None, None, None, [])
    try:
        contents.loaded = load_run(files.place)
        contents.splits = _splits(contents.loaded)
        if files.config.task == "vision":
            contents.looks = _looks(contents.loaded, contents.splits)
    except (ValueError, OSError) as error:
        what = ("model", "data", "attention")[(contents.loaded is not None) + (contents.splits is not None)]
        contents.problems.append(f"The {what} cannot be shown: {error}")
    return contents


def _splits(loaded: LoadedRun) -> Splits:
    config = loaded.config
    if config.task == "language" and config.heads:
        return text_splits(config, text_sources(config), loaded.backbone, loaded.answers)
    if config.task == "language":
        return language_splits(config, loaded.backbone)
    return vision_splits(config, vision_sources(config), loaded.backbone, loaded.answers)


def _looks(loaded: LoadedRun, splits: Splits) -> HeldOutLooks:
    frozen = None
    if not loaded.config.method.row.keeps_backbone:
        frozen = open_seeded(loaded.config, loaded.answers.outputs).model.eval()
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        for model in (loaded.model, frozen):
            if model is not None:
                model.to(device)
    return look_at_split(loaded.model, frozen, splits)


def _kind(files: RunFiles) -> str:
    what = "Pre-tuning" if files.stage == "pretune" else "Run"
    return what if files.sweep is None else f"{what} of the sweep {files.sweep.name}"


def _head(files: RunFiles, contents: _Contents) -> Markup:
    bad = (files.result or {}).get("bad_samples") or {}
    unreadable = [f"{name}: {reason}" for name, reason in list(bad.items())[:_NAMED]]
    if len(bad) > _NAMED:
        unreadable.append(f"and {len(bad) - _NAMED:,} more")
    return render(
        "report/templates/head.html.jinja",
        lead=_lead(files, contents),
        warnings=remarks(files) + contents.problems + _of_data(contents),
        unreadable=unreadable,
        unreadable_count=f"{len(bad):,}",
        figures=_figures(files, contents),
    )


def _lead(files: RunFiles, contents: _Contents) -> str:
    """Returns the run in two or three sentences."""
    config, result = files.config, files.result
    method, backbone = config.method.row.title, setting.backbone_name(config)
    method = method[0].upper() + method[1:]
    if result is None:
        return f"{method} on {backbone}; not finished."
    trains = (
        f"{method} trained {result['trainable_parameters']:,} parameters "
        f"({setting.share_trained(result)} of all) on {backbone} in {seconds(result['step_seconds'])}."
    )
    split, measured = files.measured
    sentences = [trains]
    if "accuracy" in measured:
        interval = results.interval(measured)
        before = files.before.get("accuracy")
        grown = "" if before is None else f"; before training it was {before:.1%}"
        within = f" ({interval[0]:.1%} to {interval[1]:.1%})" if interval is not None else ""
        sentences.append(
            f"It classifies {measured['accuracy']:.1%}{within} of {measured['samples']:,} pictures of the "
            f"{split} split correctly{grown}."
        )
    if "perplexity" in measured:
        before = files.before.get("perplexity")
        grown = "" if before is None else f", {before:.2f} before training"
        sentences.append(f"Its perplexity on the {split} split is {measured['perplexity']:.2f}{grown}.")
    shares = gallery.on_target(contents.looks) if contents.looks is not None else None
    if shares is not None and shares[0] is not None:
        frozen, after, area, _ = shares
        sentences.append(
            f"Attention on the labelled object went from {frozen:.2f} to {after:.2f}; it "
            f"covers {area:.2f} of the area."
        )
    return " ".join(sentences)


def _of_data(contents: _Contents) -> list[str]:
    """Returns what is unusual about the data."""
    return list(contents.splits.remarks) if contents.splits is not None else []


def _figures(files: RunFiles, contents: _Contents) -> list[tuple[str, str, str]]:
    """Returns names, values and notes of what a reader wants first; none of a run that has not ended."""
    result = files.result
    if result is None:
        return []
    split, measured = files.measured
    figures = []
    for name in results.named(measured, _FIRST):
        if not name.endswith("loss") or (files.config.task == "language" and not files.heads):
            called = results.called(name)
            interval = results.interval(measured) if name == "accuracy" else None
            note = f"{split} split" if interval is None else "{:.3f} to {:.3f}, 95%".format(*interval)
            note += ", before training → now" if name in files.before else ""
            figures.append((called, files.from_before(name), note))
    shares = gallery.on_target(contents.looks) if contents.looks is not None else None
    if shares is not None:
        before, after, _, count = shares
        value = f"{after:.2f}" if before is None else f"{before:.2f} → {after:.2f}"
        of = f"{count:,} pictures"
        figures.append(("On target", value, f"attention, frozen → now; {of}" if before is not None else of))
    trained = result["trainable_parameters"]
    amount = f"{trained / 1e6:.2f} M" if trained >= 1e5 else f"{trained:,}"
    figures.append(("Trained", amount, f"{setting.share_trained(result)} of all parameters"))
    figures.append(("Time", seconds(result["step_seconds"]), f"{result['steps']:,} steps"))
    return figures


def _sections(files: RunFiles, contents: _Contents, pictures: int) -> list[Markup]:
    made = [results.results(files, contents.looks)]
    loaded, splits = contents.loaded, contents.splits
    if loaded is not None and splits is not None:
        if contents.looks is not None and contents.looks.seen:
            made.append(
                gallery.pictures(
                    contents.looks, splits, loaded.backbone.data, files.config.method.row.attention, pictures
                )
            )
        if files.config.task == "language" and files.config.method.is_toast and not files.heads:
            made.append(texts(loaded.model, loaded.backbone.tokenizer, splits))
    made += [curves(files), setting.setting(files)]
    if loaded is not None:
        made.append(loading(files, loaded.backbone.data))
    return made
