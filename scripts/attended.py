"""Where a model looks that is told what to attend to: `python scripts/attended.py RUN... [--out PICTURE]`.

RUN is the folder of a finished stage one on the embedded backbone, such as configs/offline/demo-pretune.yaml.
Each test picture holds a piece of clothing and a clip-art object, and the model is told to attend to one of
them (`toast.attend_to`): by the patch at its centre, as it is or less the mean feature of the picture, or by
the mean feature of its class in training pictures, less that of all. Beside it: the model unsteered, by the
task embedding of its adapter, and by random embeddings. Measured are the shares of the last block's attention
on the object that is meant and on the other, and the selection weights inside and outside of its box.

`untrained` is the same adapter before stage one, with B = 1 in the place of B = 0, with which nothing is
steered: every block's values get the selected features as they are. Results: docs/attending.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import toast
from toast.commands.errors import run_script
from toast.embedded import MEAN, STD, Pictures, load_backbone, load_two_objects, normalise
from toast.embedded.two_objects import LABELS, Part
from toast.files.atomic import beside
from toast.report.images import shown
from toast.steering import steering_of
from toast.visual.attention_maps import AttentionMaps
from toast.visual.measures import coverage, share_in_target
from toast.visual.pixels import Preparation
from toast.visual.targets import inside_and_outside

CELL = (14.0, 14.0)
TRAINING = 300  # pictures that class means are taken of
Objects = dict[str, Pictures]


def objects(part: Part, count: int, seed: int) -> Objects:
    """Returns the same pictures with the labels and boxes of each of their two objects."""
    return {labels: load_two_objects(part, count, labels, seed) for labels in LABELS}


def features(model: nn.Module, images: Tensor) -> Tensor:
    """Returns what the selector reads of patches, `(pictures, patches, width)`."""
    normed = toast.first_pass(model, normalise(images)).normed
    assert normed is not None
    return normed[:, 1:]


def class_means(read: Tensor, pictures: Pictures) -> Tensor:
    """Returns the mean of what is read inside the boxes of each class, `(classes, width)`."""
    inside = coverage(pictures.boxes, 8, 8, CELL).flatten(1)
    means = torch.einsum("np,npw->nw", inside, read) / inside.sum(1, keepdim=True)
    one_hot = F.one_hot(pictures.labels).float()
    return one_hot.T @ means / one_hot.sum(0)[:, None]


def centres(read: Tensor, pictures: Pictures) -> Tensor:
    """Returns the features of the patches at the centres of the boxes, `(pictures, width)`."""
    x, y = (
        (pictures.boxes[:, :2] + pictures.boxes[:, 2:])
        .div(2 * CELL[0], rounding_mode="floor")
        .long()
        .unbind(1)
    )
    return read[torch.arange(len(read)), y * 8 + x]


def ways(model: nn.Module, test: Objects, seed: int) -> Iterator[tuple[str, str | None, Tensor | None]]:
    """Yields what a model is told: how, which object is meant, and the embedding; None: the adapter's own."""
    training = objects("train", TRAINING, seed)
    known, read = (features(model, each["item"].images) for each in (training, test))
    draw = torch.Generator().manual_seed(seed)
    yield "the adapter's own", None, None
    yield "random", None, torch.randn(len(read), read.shape[-1], generator=draw)
    for name in LABELS:
        patch, mean = centres(read, test[name]), class_means(known, training[name])[test[name].labels]
        yield "patch", name, patch
        yield "patch, less the mean", name, patch - read.mean(1)
        yield "class mean, less the mean", name, mean - known.mean((0, 1))


def look(model: nn.Module, images: Tensor, embedding: Tensor | None) -> AttentionMaps:
    """Looks at a model that is told what to attend to."""
    with nullcontext() if embedding is None else toast.attend_to(model, embedding), torch.no_grad():
        return toast.look(model, normalise(images))


def measure(model: nn.Module, count: int, seed: int) -> dict[str, dict[str, list[float]]]:
    """Returns, by embedding and object that is meant: attention on it and the other, selection in and out."""
    test = objects("test", count, seed)
    images, found = test["item"].images, dict[str, dict[str, list[float]]]()
    for how, meant, embedding in ways(model, test, seed):
        maps = look(model, images, embedding)
        assert maps.frozen is not None
        assert maps.selection is not None
        for name in LABELS if meant is None else (meant,):
            boxes = [test[name].boxes, *(test[other].boxes for other in LABELS if other != name)]
            frozen, steered = (
                [float(share_in_target(each.values, box, CELL).mean()) for box in boxes]
                for each in (maps.frozen, maps.attention)
            )
            weights = inside_and_outside(maps.selection, boxes[0], maps.size)
            found.setdefault("nothing: unsteered", {})[name] = frozen
            found.setdefault(how, {})[name] = [*steered, *(float(each.mean()) for each in weights)]
    return found


def untrained(select_from: int | None, seed: int) -> nn.Module:
    """Returns a model whose adapter nobody trained, which gives the selected features to every block."""
    torch.manual_seed(seed)
    model = toast.wrap(load_backbone(), select_from=select_from).eval()
    toast.calibrate(model, normalise(objects("train", 100, seed)["item"].images))
    for maps in steering_of(model, "untrained")[1].maps:
        nn.init.eye_(maps.to_signal.weight)  # type: ignore[arg-type]
    return model


def draw(model: nn.Module, out: Path) -> None:
    """Draws the first test picture, attended to in three ways, beside the model unsteered."""
    test = objects("test", 100, 0)  # a mean feature is of the first alone; the rest makes classes complete
    picture = Preparation.of_pixels(MEAN, STD).shown(normalise(test["item"].images)[0])
    columns: list[tuple[str, AttentionMaps | None, str | None]] = [("unsteered", None, None)]
    for how, meant, embedding in ways(model, test, 0):
        title = {"patch, less the mean": "its centre's patch", "class mean, less the mean": "its class"}.get(
            how
        )
        if embedding is not None and title is not None and (meant, title) != ("item", "its class"):
            columns.append((f"{meant}: {title}", look(model, test["item"].images[:1], embedding[:1]), meant))
    plain = columns[1][1]
    assert plain is not None
    figure = Figure(figsize=(1.7 * len(columns), 3.7), layout="constrained", facecolor="white")
    panels = figure.subplots(2, len(columns), squeeze=False)
    for column, (title, maps, meant) in enumerate(columns):
        box = None if meant is None else test[meant].boxes[0].tolist()
        attention = plain.frozen if maps is None else maps.attention
        assert attention is not None
        above = shown(picture) if maps is None else _shown(picture, maps.selection.values[0], box, 1.0)  # type: ignore[union-attr]
        panels[0, column].imshow(above)
        panels[1, column].imshow(_shown(picture, attention.values[0], box, float(attention.values[0].max())))
        panels[0, column].set_title(title, fontsize=8)
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    panels[0, 0].set_ylabel("selection weights", fontsize=8)
    panels[1, 0].set_ylabel("attention", fontsize=8)
    with beside(out) as new:
        figure.savefig(new, format="png", dpi=100)


def _shown(picture: Tensor, values: Tensor, box: list[float] | None, high: float) -> object:
    return shown(picture, values, CELL, high, 0.0, box)


def main(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs of stage one.")],
    count: Annotated[int, typer.Option("--pictures", help="Test pictures of each run.")] = 100,
    out: Annotated[Path | None, typer.Option(help="Where the picture of the first run goes.")] = None,
) -> None:
    """Prints the table: means over runs, in brackets the lowest and the highest."""
    models = [toast.load_run(run).model for run in runs]
    if out is not None:
        draw(models[0], out)
    table = Table(
        "adapter", "attended by", "meant", "on it", "on the other", "weight inside", "weight outside"
    )
    read = steering_of(models[0], "attended")[1].config.select_from
    for kind in ("untrained", "stage one"):
        made = (untrained(read, seed) if kind == "untrained" else models[seed] for seed in range(len(runs)))
        measured = [measure(model, count, seed) for seed, model in enumerate(made)]
        for how, by_object in measured[0].items():
            for name in by_object:
                figures = zip(*(each[how][name] for each in measured), strict=True)
                cells = (f"{sum(c) / len(c):.3f} ({min(c):.3f} to {max(c):.3f})" for c in figures)
                table.add_row(kind, how, name, *cells)
        table.add_section()
    Console(soft_wrap=True, width=200).print(table)


if __name__ == "__main__":
    run_script(main)
