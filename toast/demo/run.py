"""`toast demo`: both stages on what is embedded, beside a linear probe and LoRA."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from peft import PeftModel
from rich.console import Console
from rich.table import Table

import toast
from toast.demo import measures, picture
from toast.demo.methods import METHODS, RECIPES, pre_tune, shortened
from toast.demo.task import load_generic, load_task
from toast.files import beside, strict_json, try_folder

NAMES = {"linear": "linear probe", "lora": "LoRA (PEFT)", "toast": "TOAST", "toast-lite": "TOAST-Lite"}


@dataclass(frozen=True)
class Size:
    """How much of the demonstration is run.

    Args:
        train: Pictures to train on, at most 3,000.
        test: Held-out pictures, at most 1,000.
        generic: Pictures of stage one.
        share: Share of the epochs of every recipe.
    """

    train: int = 1000
    test: int = 500
    generic: int = 1000
    share: float = 1.0


def run(out: Path, size: Size | None = None, seed: int = 0, console: Console | None = None) -> dict[str, Any]:
    """Runs the demonstration.

    Args:
        out: Folder for `attention.png`, `result.json` and the adapters in PEFT's format.
        size: How much of it; None is all.
        seed: Of the pictures, the initial parameters and the order of the data.
        console: Where the table is printed; None is the standard output.

    Returns:
        What `result.json` holds.
    """
    size, console = size or Size(), console or Console()
    picture.require_matplotlib()
    try_folder(out, "out")
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    console.print(
        f"Fashion-MNIST items among clip-art: {size.train} pictures to train on, {size.test} held out. "
        f"The backbone (ViT, 5.5 M parameters) stays frozen. Results go to {out}/."
    )
    train, test = load_task(size.train, size.test, seed)
    area = measures.box_share_of_area(test)

    set_seed(seed)
    pretrained = out / "toast-pretrained"
    generic = load_generic(size.generic, seed)
    stage_one = pre_tune(generic, pretrained, shortened(RECIPES["pre-tuning"], size.share), seed)
    results: dict[str, dict[str, Any]] = {}
    for name, train_method in METHODS.items():
        set_seed(seed)
        trained = train_method(train, pretrained, shortened(RECIPES[name], size.share), seed)
        accuracy, on_target = measures.evaluate(trained.model, test)
        results[name] = {
            "accuracy": round(accuracy, 4),
            "trainable_parameters": trained.trainable,
            "seconds": round(trained.seconds, 1),
            "attention_on_target": round(on_target, 4),
        }
        if isinstance(trained.model, PeftModel):
            toast.save_adapter(trained.model, out / name)
        if name == "toast":
            steered = trained.model
    result = {
        "methods": results,
        "box_share_of_area": round(area, 4),
        "pre_tuning_seconds": round(stage_one, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "seed": seed,
        "size": vars(size),
        "versions": {
            "toast": toast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    with beside(out / "result.json") as new:
        new.write_text(strict_json(result, indent=2) + "\n")
    assert isinstance(steered, PeftModel)
    title = "Class-token attention of the last block, before and after steering (held-out pictures)"
    picture.draw(steered, test, torch.arange(6), out / "attention.png", title)
    console.print(as_table(result))
    console.print(
        f"The item's box is {area:.3f} of the area. Pre-tuning took {stage_one:.0f} s, everything "
        f"{result['seconds']:.0f} s.\nPicture: {out / 'attention.png'}   figures: {out / 'result.json'}   "
        f"adapters: {', '.join(str(out / name) for name in ('lora', 'toast', 'toast-lite'))}"
    )
    return result


def as_table(result: dict[str, Any]) -> Table:
    """Returns the table of the methods."""
    table = Table(title=f"{result['size']['test']} held-out pictures")
    table.add_column("method")
    for heading in ("accuracy", "attention on target", "trained parameters", "seconds"):
        table.add_column(heading, justify="right")
    for name, row in result["methods"].items():
        table.add_row(
            NAMES[name],
            f"{row['accuracy']:.3f}",
            f"{row['attention_on_target']:.3f}",
            f"{row['trainable_parameters']:,}",
            f"{row['seconds']:.0f}",
        )
    return table
