"""Reads a model's features of a split into a file for other tools: what `toast features` does."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from toast.baselines.heads import head_of
from toast.families.anatomy import find_anatomy
from toast.files.atomic import try_file
from toast.files.feature_files import Features, check_suffix, write_features
from toast.files.tensors import checksum
from toast.passes import Observer
from toast.signals import Selection
from toast.steering import find_steering, steering_of
from toast.thread_state import observing
from toast.training import run_folder
from toast.training.accelerating import make_accelerator
from toast.training.cached_passes import Stored, place_of, stored_first_pass
from toast.training.config_files import load_config
from toast.training.finite import sample_name
from toast.training.frozen_features import build
from toast.training.many_heads import Heads
from toast.training.methods import Tuned, apply_method, load_method
from toast.training.objective import Objective
from toast.training.preparing import Prepared, active_module, open_all
from toast.training.run_config import AugmentConfig, RunConfig
from toast.training.split_measures import refuse_bad
from toast.visual.grids import has_class_token, sequence_grid
from toast.visual.modes import evaluating
from toast.visual.seeing import find_parts

What = Literal["pooled", "class", "selected"]
#: What is computed of a sample beside the file, until it is whole.
_BESIDE: Final = ".parts"


def write_split(
    place: Path,
    out: Path,
    overrides: Iterable[str] = (),
    split: str = "train",
    what: What = "pooled",
    say: Callable[[str], None] = tqdm.write,
) -> Path:
    """Writes the features of a split, with labels and names.

    They are computed in parts beside the file, so that a call that was interrupted goes on, and the parts are
    removed when the file is whole. A stored first pass of the training split is used where there is one.

    Args:
        place: A run's folder, or a configuration, whose model is taken as it starts.
        out: The file; `.safetensors` or `.parquet`.
        overrides: Settings on top, such as other data.
        split: `train`, `validation`, `test`, or one of `evaluation.splits`. Nothing is augmented.
        what: `pooled`: what the model's head reads, the linear probe's features; `class`: the class token
            behind the final norm; `selected`: what a TOAST model selects of the frozen features, w · h. Of
            tokens (`selected`; all of text) the mean is taken.
        say: Shows a line.

    Returns:
        The file.

    Raises:
        ValueError: If there is no such split, or the model has not what is asked for.
    """
    check_suffix(out)
    try_file(out, "--out")
    if what not in get_args(What):
        raise ValueError(f"--what: needs one of {', '.join(get_args(What))}; got {what!r}.")
    config = load_config(place, overrides)
    config = config.model_copy(update={"augment": AugmentConfig()})
    if config.task == "language" and config.data.packing == "documents":
        raise ValueError(
            "data.packing: features are of a row, and one of packed documents has several; needs none."
        )
    if config.evaluation.corruption is not None:
        raise ValueError("evaluation.corruption: features are of the pictures as they are; needs null.")
    accelerator = make_accelerator(config)
    prepared = _open(place, config)
    splits = {"train": prepared.splits.train, **prepared.splits.held_out}
    if split not in splits:
        raise ValueError(f"--split: {place} has {', '.join(splits)}; got {split!r}.")
    data, model = splits[split], prepared.method.model.to(accelerator.device)
    stored = _stored(config, accelerator, prepared, what, say) if split == "train" else None
    reader = Reader(prepared.objective, prepared.head, what, stored)

    def samples(rows: range) -> tuple[dict[str, Any] | None, list[int]]:
        items = [data[0, row] for row in rows]
        good = [number for number, item in enumerate(items) if "bad" not in item]
        return (prepared.splits.collate([items[number] for number in good]) if good else None), good

    source = data.source if hasattr(data, "source") else data.rows
    fingerprint = {
        "model": _weights(model),
        "data": f"{source.fingerprint} {prepared.backbone.data}",
        "what": what,
        "precision": [accelerator.mixed_precision, config.model.dtype],
    }
    beside = out.with_name(f".{out.name}{_BESIDE}")
    advice = "Name another file with --out."
    store = build(
        beside, fingerprint, reader, samples, None, len(data), accelerator, say,
        called="features", setting="--out", advice=advice,
    )  # fmt: skip
    assert store is not None
    bad = {sample_name(data, index): "cannot be read" for index in sorted(store.unread)}
    refuse_bad(bad, len(data), split, config.data.bad_share)
    for name in bad:
        say(f"left out {name}")
    rows = [index for index in range(len(data)) if index not in store.unread]
    labels, about = _labels(prepared, data, rows)
    if accelerator.is_main_process:
        features = Features(
            width=store.tensors["features"].width,
            names=[sample_name(data, row) for row in rows],
            labels=labels,
            read=lambda some: store.read([rows[place] for place in some])["features"].float().flatten(1),
            about=about | {"split": split, "what": what, "model": str(place)},
        )
        write_features(out, features)
        shutil.rmtree(beside)
    accelerator.wait_for_everyone()
    say(f"{len(rows):,} samples of the {split} split, {store.tensors['features'].width} numbers each: {out}")
    return out


class Reader:
    """Calls a model on a batch and returns what was seen of it.

    Args:
        objective: Calls the model.
        head: Its head.
        what: What is read, see `write_split`.
        stored: The stored first pass of the samples; None computes it.

    Raises:
        ValueError: If the model has not what is asked for.
    """

    def __init__(
        self, objective: Objective, head: nn.Module | None, what: What, stored: Stored | None
    ) -> None:
        self.objective = objective
        self.head = head
        self.what = what
        self.stored = stored
        self.seen: Tensor | None = None
        if what == "class":
            self.parts = find_parts(objective.model)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns `features`, `(batch, width)`."""
        held = batch if self.stored is None else self.stored.complete(batch, epoch=0)
        with evaluating(self.objective), ExitStack() as watched:
            self._watch(watched)
            self.objective(held, predict=True)
        seen, self.seen = self.seen, None
        assert seen is not None
        if self.what == "class":
            grid = sequence_grid(self.parts, seen.shape[1], batch["pixels"].shape[-2:])
            if not has_class_token(self.parts, grid):
                raise ValueError(f"--what class: {type(self.parts.trunk).__name__} has no class token.")
            return {"features": seen[:, 0]}
        if "input_ids" in batch and seen.ndim == 3:  # a mean over the row, without what fills it up
            mask = batch["attention_mask"][..., None].to(seen)
            return {"features": (seen * mask).sum(1) / mask.sum(1)}
        return {"features": seen.mean(1) if self.what == "selected" else seen.flatten(1)}

    def _watch(self, watched: ExitStack) -> None:
        if self.what == "selected":
            selecting, _ = steering_of(self.objective.model, "--what selected")
            watched.enter_context(observing(selecting, _Selecting(self)))
        elif self.what == "class":
            steering = find_steering(self.objective.model)
            norm: nn.Module = (
                find_anatomy(self.objective.model).norm if steering is None else steering.selector
            )
            watched.enter_context(norm.register_forward_hook(lambda _, __, out: self._keep(out)))
        else:
            if self.head is None:
                raise ValueError("--what pooled: no head of this model is known, so nothing reads features.")
            watched.enter_context(
                self.head.register_forward_pre_hook(lambda _, inputs: self._keep(inputs[0]))
            )

    def _keep(self, seen: Tensor) -> None:
        self.seen = seen  # the last call's: that of the second pass


class _Selecting(Observer):
    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def on_selection(self, selection: Selection) -> None:
        self.reader.seen = selection.tokens


def _open(place: Path, config: RunConfig) -> Prepared:
    """Opens a run's model, or that of a configuration as it starts, and the data."""
    trained, recorded = place / run_folder.ADAPTER, place / run_folder.LABELS
    record = run_folder.read_labels(recorded, True) if config.heads and recorded.is_file() else None
    backbone, splits = open_all(config, record=record)
    name, _ = head_of(backbone.model)
    if trained.is_dir():
        model = load_method(backbone, config, trained)
        # As in training, where what is frozen names the stored first pass.
        active_module(model, name).requires_grad_(True)
    else:
        model = apply_method(backbone, config, "tune").model
    head = active_module(model, name)
    objective = Objective(model, backbone, splits.answers, "tune", head)
    return Prepared(backbone, splits, Tuned(model, {}, name), head, objective)


def _stored(
    config: RunConfig, accelerator: Any, prepared: Prepared, what: What, say: Callable[[str], None]
) -> Stored | None:
    """Returns the first pass of the training split, if a run has stored it."""
    steers = find_steering(prepared.method.model) is not None
    if config.task not in config.method.row.stores or (what != "pooled" and not steers):
        return None
    if not (place_of(config, accelerator, prepared)[0] / "header.json").is_file():
        return None
    first_pass = config.first_pass.model_copy(update={"mode": "cached"})
    wanted = config.model_copy(update={"first_pass": first_pass})
    return stored_first_pass(wanted, "tune", accelerator, prepared, say)


def _weights(model: nn.Module) -> str:
    """Returns the SHA-256 over all weights."""
    held = [(name, checksum(parameter.detach().cpu())) for name, parameter in model.named_parameters()]
    return hashlib.sha256(json.dumps(sorted(held)).encode()).hexdigest()


def _labels(
    prepared: Prepared, data: Any, rows: Sequence[int]
) -> tuple[dict[str, Sequence[Any]], dict[str, Any]]:
    """Returns the columns of labels of some samples, and what has to be known of them."""
    source, answers = getattr(data, "source", None), prepared.splits.answers
    if isinstance(answers, Heads):
        columns = {name for head in answers.targets.values() for name in head.config.columns or [head.name]}
        fields = data.source.fields.subset(rows).columns
        return {name: fields[name] for name in sorted(columns)}, {"heads": answers.record()}
    if source is None:
        return {}, {}
    return {"label": [source.labels[row] for row in rows]}, {"classes": list(prepared.splits.classes)}
