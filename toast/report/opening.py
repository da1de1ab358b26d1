"""What a user names, a run or an adapter, as a model that can be looked at."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from torch import nn

from toast.families.table import FAMILIES
from toast.files.adapter_folder import weights_of
from toast.files.json_files import read_json
from toast.files.tensors import TensorFile
from toast.training import run_folder
from toast.training.backbones import Backbone, open_backbone
from toast.training.config_files import make_config
from toast.training.loaded import load_run
from toast.training.methods import load_method
from toast.training.preparing import open_seeded
from toast.training.run_config import RunConfig

#: The weight of a classifier in an adapter's file, as the libraries' vision models call it.
_HEAD = re.compile(r"base_model\.model\.(head|fc|classifier)(\.\w+)*\.weight")
#: How timm spells the places that it loads a model from, beside its own names.
_TIMM_PLACES = ("hf-hub:", "hf_hub:", "local-dir:")


@dataclass(frozen=True)
class OpenedModel:
    """A model, and what has to be known to look at it.

    Args:
        name: What it is called in a table.
        model: The model, in evaluation mode, on the device of this process.
        backbone: How it is fed; for language, its tokenizer.
        config: The run's configuration; of an adapter, one that names its backbone.
        classes: Vision: names of the labels; empty if they are not known.
        classifies: Vision: whether its head is one that was trained, and says one of some classes.
        outputs: Of a run: outputs of its head.
    """

    name: str
    model: nn.Module
    backbone: Backbone
    config: RunConfig
    classes: tuple[str, ...] = ()
    classifies: bool = True

    outputs: int | None = None

    @property
    def is_language(self) -> bool:
        """Whether it is a language model."""
        return self.config.task == "language"


def open_model(
    place: Path, base: str | None = None, weights: Path | None = None, demo: bool = False
) -> OpenedModel:
    """Opens a run or an adapter.

    Args:
        place: Folder of a run of the training system, or of an adapter in PEFT's format.
        base: Of an adapter: the backbone's name in timm, or a folder or Hub name of transformers. None is
            the one that the adapter names itself, if it does.
        weights: Of an adapter: a file with the backbone's weights, instead of the library's own (timm).
        demo: Of an adapter: the backbone is the one that the package contains.

    Raises:
        ValueError: If it is neither, the backbone is not known, or the two do not fit.
    """
    if run_folder.holds_run(place):
        if base is not None or weights is not None or demo:
            raise ValueError(
                f"{place} is a run, whose configuration names its backbone; --model, --weights and --demo "
                "are for adapters."
            )
        run = load_run(place)
        model = run.model.to(PartialState().device)
        return OpenedModel(
            place.resolve().name, model, run.backbone, run.config, run.classes,
            classifies=not run.config.heads, outputs=run.answers.outputs,
        )  # fmt: skip
    return _open_adapter(place, base, weights, demo)


def _open_adapter(place: Path, base: str | None, weights: Path | None, demo: bool) -> OpenedModel:
    settings = read_json(place / run_folder.ADAPTER_CONFIG)
    if demo and (base is not None or weights is not None):
        raise ValueError("--demo is a backbone of its own; pass it without --model and --weights.")
    base = base or settings.get("base_model_name_or_path")
    if base is None and not demo:
        raise ValueError(
            f"{place} is an adapter that does not say on which backbone. Pass --model NAME (of timm, with "
            "--weights FILE if they cannot be downloaded; or a folder of transformers), or --demo for the "
            "one that the package contains."
        )
    is_language = _is_language(settings)
    if demo or base is None:
        model: dict[str, Any] = {"library": "demo"}
    elif is_language or _of_transformers(base):
        model = {"library": "transformers", "name": base}
    else:
        model = {"library": "timm", "name": base, "weights": weights}
    if weights is not None and model["library"] != "timm":
        raise ValueError("--weights is a file for a model of timm; a folder of transformers has its own.")
    data = {"source": "demo", "test": "test"} if demo else {"source": "folder"}
    config = make_config({"task": "language" if is_language else "vision", "model": model, "data": data})
    rows = None if is_language else _rows_of_head(place)
    own = 0 if is_language else _own_classes(config)
    backbone = open_backbone(config, rows or own or 1)  # a head that nobody reads, where none is known
    try:
        trained = load_method(backbone, config, place).to(PartialState().device)
    except RuntimeError as error:  # PyTorch's, with a line for each tensor of another size
        first = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise ValueError(f"{place} does not fit {base or 'the backbone of the demo'}: {first}") from error
    return OpenedModel(
        place.resolve().name, trained, backbone, config,
        classes=_demo_classes(rows) if demo else (),
        classifies=rows is not None or own > 0,
    )  # fmt: skip


def _is_language(settings: dict[str, Any]) -> bool:
    kinds = {family.name: family.kind for family in FAMILIES}
    return settings.get("task_type") == "CAUSAL_LM" or kinds.get(settings.get("family") or "") == "decoder"


def _of_transformers(base: str) -> bool:
    """Whether a name is one of transformers: a folder or `owner/name`."""
    return not base.startswith(_TIMM_PLACES) and (Path(base).is_dir() or "/" in base)


def _rows_of_head(place: Path) -> int | None:
    """Returns the outputs of the head that an adapter holds; None if it holds none."""
    path = weights_of(place)
    if not path.is_file():
        return None
    heads = [shape for name, shape in TensorFile(path).shapes.items() if _HEAD.fullmatch(name)]
    return next((shape[0] for shape in reversed(heads) if len(shape) == 2), None)


def _own_classes(config: RunConfig) -> int:
    """Returns the classes of the head that a backbone comes with; 0 if that is not loaded."""
    if config.model.library != "timm" or config.model.weights is not None:
        return 0
    from timm.models import get_pretrained_cfg

    assert config.model.name is not None
    known = get_pretrained_cfg(config.model.name)
    return 0 if known is None else int(known.num_classes or 0)


def _demo_classes(rows: int | None) -> tuple[str, ...]:
    """Returns the names of the demo's classes where a head has as many; that of stage one has others."""
    from toast.embedded.task import CLASSES

    return CLASSES if rows == len(CLASSES) else ()


def check_same_backbone(opened: Sequence[OpenedModel]) -> None:
    """Checks that models may be held against each other, on the same pixels.

    Raises:
        ValueError: If one is of language, or they are not of one backbone that is fed in one way.
    """
    for each in opened:
        if each.is_language:
            raise ValueError(f"{each.name} is a language model; only vision models can be compared.")
    first = opened[0]
    for other in opened[1:]:
        if _identity(other) != _identity(first):
            raise ValueError(
                f"{first.name} and {other.name} have different backbones, or prepare pictures differently: "
                f"{_identity(first)} and {_identity(other)}. Compare those of one backbone."
            )


def _identity(opened: OpenedModel) -> str:
    model, data = opened.config.model, opened.backbone.data
    is_drawn = model.library != "demo" and not model.pretrained and model.weights is None
    seed = f", random weights of seed {opened.config.seed}" if is_drawn else ""
    size = "x".join(str(side) for side in data["input_size"])
    parts = [model.library, model.name, model.weights, model.options or None, size]
    return " ".join(str(part) for part in parts if part is not None) + seed


def frozen_model(opened: Sequence[OpenedModel]) -> nn.Module | None:
    """Returns the backbone of runs as it was, if none of them holds it: where all were tuned without PEFT."""
    if any(isinstance(each.model, PeftModel) for each in opened):
        return None
    first = opened[0]
    model = open_seeded(first.config, first.outputs).model
    return model.to(PartialState().device).eval()
