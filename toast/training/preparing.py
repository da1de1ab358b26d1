"""Opens data and model and applies the method: all that can go wrong before a run starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate.utils import set_seed
from torch import nn

from toast.calibrating import calibrate
from toast.sizing import input_sizes
from toast.training.backbones import Backbone, open_backbone
from toast.training.data import (
    Splits,
    head_answers,
    language_splits,
    vision_answers,
    vision_sources,
    vision_splits,
)
from toast.training.methods import Tuned, apply_method
from toast.training.objective import Objective
from toast.training.optimizers import scales_rates
from toast.training.run_config import RunConfig
from toast.training.text_targets import text_sources, text_splits
from toast.visual.modes import evaluating

Stage = Literal["pretune", "tune"]

#: Samples that the task embedding is pointed by; a row of text has many tokens.
_CALIBRATION = {"vision": 64, "language": 8}
#: Samples that the sizes of the blocks' inputs are measured on, which differ little between samples.
_SIZING = {"vision": 8, "language": 2}


@dataclass
class Prepared:
    """What a run is made of, before Accelerate has it.

    Args:
        backbone: The model and how it is fed.
        splits: The data.
        method: What is trained.
        head: The module that gives the logits; None if it is not known.
        objective: The loss.
        input_sizes: What `toast.input_sizes` measured, which rates follow from; empty if none do.
    """

    backbone: Backbone
    splits: Splits
    method: Tuned
    head: nn.Module | None
    objective: Objective
    input_sizes: dict[str, float] = field(default_factory=dict)


def prepare(config: RunConfig, stage: Stage, empty: bool = False) -> Prepared:
    """Opens data and model, and applies the method.

    Args:
        config: The run's configuration.
        stage: `pretune` or `tune`.
        empty: Leave the weights out, for another process sends them: what is frozen is on the meta device,
            what is trained has no values yet.

    Raises:
        ValueError: If something is missing or does not fit.
    """
    config.check_stage(stage)
    backbone, splits = open_all(config, empty)
    if not backbone.model.training:  # of one that is in training mode, what is in evaluation mode stays there
        backbone.model.train()
    set_seed(config.seed)  # what the method draws does not depend on what the data drew
    method = apply_method(backbone, config, stage, config.folder, empty)
    if config.checkpointing:
        checkpoint_activations(backbone.model)
    sizes: dict[str, float] = {}
    if config.method.is_toast and not empty:
        if config.method.start is None and config.method.calibrate:
            _on_samples(calibrate, _CALIBRATION[config.task], config, method.model, backbone, splits)
        if scales_rates(config.optimizer):
            sizes = _on_samples(input_sizes, _SIZING[config.task], config, method.model, backbone, splits)
    head = None if method.head_name is None else active_module(method.model, method.head_name)
    objective = Objective(method.model, backbone, splits.answers, stage, head)
    return Prepared(backbone, splits, method, head, objective, sizes)


def remarks_on(prepared: Prepared, config: RunConfig) -> list[str]:
    """Returns remarks on a run before it begins.

    Whether packed documents see each other is among it; it depends on attention kernel and method.
    """
    remarks = list(prepared.splits.remarks)
    if config.task == "language" and config.data.packing == "documents":
        from toast.data.language import leaks

        if leaks(prepared.method.model, len(prepared.backbone.tokenizer)):
            remarks.append(
                "packed documents attend to each other in this model: its attention ignores positions that "
                "restart. Load it with attn_implementation=sdpa, or set data.packing=none."
            )
    return remarks


def open_all(config: RunConfig, empty: bool = False, record: Any = None) -> tuple[Backbone, Splits]:
    """Opens backbone and data; the backbone without its weights if they are left out.

    Args:
        config: The run's configuration.
        empty: Leave the weights out.
        record: What a run has recorded of its heads; None makes them from the training split.

    Raises:
        ValueError: If something is missing or malformed.
    """
    if config.task == "vision":
        sources = vision_sources(config)
        answers = vision_answers(config, sources["train"], record)
        backbone = open_seeded(config, answers.outputs, empty)
        return backbone, vision_splits(config, sources, backbone, answers)
    if config.heads:
        texts = text_sources(config)
        answers = head_answers(config, texts["train"], record)
        backbone = open_seeded(config, answers.outputs, empty)
        return backbone, text_splits(config, texts, backbone, answers)
    backbone = open_seeded(config, None, empty)
    return backbone, language_splits(config, backbone)


def open_seeded(config: RunConfig, classes: int | None, empty: bool = False) -> Backbone:
    """Opens the backbone; what is drawn (a new head, weights that are not pre-trained) follows the seed."""
    set_seed(config.seed)
    return open_backbone(config, classes, empty)


def _on_samples(
    call: Callable[..., Any], wanted: int, config: RunConfig, model: nn.Module, backbone: Backbone,
    splits: Splits,
) -> Any:  # fmt: skip
    """Returns what a function of a model and its inputs gives for a few training samples."""
    count = len(splits.train)
    rows = sorted({index * count // wanted for index in range(wanted)})
    args, kwargs = backbone.feed(splits.collate([splits.train[0, row] for row in rows]))
    dtype = getattr(torch, config.model.dtype)
    with evaluating(model), torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        return call(model, *args, **kwargs)


def checkpoint_activations(model: nn.Module) -> None:
    """Switches activation checkpointing on, the kind that is not re-entrant.

    Raises:
        ValueError: If the model has none.
    """
    # transformers has renamed it.
    switch: Any = getattr(model, "activation_checkpointing_enable", None)
    switch = switch or getattr(model, "gradient_checkpointing_enable", None)
    if switch is not None:
        switch({"use_reentrant": False})
        return
    switch = getattr(model, "set_grad_checkpointing", None)
    if switch is None:
        raise ValueError(f"checkpointing: {type(model).__name__} has no activation checkpointing.")
    switch(True)


def active_module(model: nn.Module, name: str) -> nn.Module:
    """Returns a module of the backbone as it is called, wrapped by PEFT or not."""
    from peft import PeftModel

    return (model.get_base_model() if isinstance(model, PeftModel) else model).get_submodule(name)
