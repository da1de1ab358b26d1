"""The methods that a run can train by, a row each; applied to a backbone, saved, and loaded again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import nn

import toast
from toast.baselines.heads import head_of
from toast.rates import Groups, trained_groups
from toast.training.applying import Made, put_in_baseline, put_in_lora, put_in_toast

if TYPE_CHECKING:
    from toast.training.backbones import Backbone
    from toast.training.run_config import RunConfig


@dataclass(frozen=True)
class Method:
    """What is known of a method: all that the training program and the reports ask of it.

    Args:
        title: What it is called.
        put_in: Puts it into a backbone; see `toast.training.applying`.
        rank: Its rank, or the width of its bottleneck, where none is given; None has none.
        attention: What becomes of the frozen model's attention.
        stores: Tasks on which the frozen backbone runs before all that is trained, so that what it computes
            of a sample can be stored.
        steers: Whether the top-down module is what is trained.
        pretunes: Whether stage one trains it.
        starts: Whether it can start from a saved adapter (`method.start`).
        keeps_backbone: Whether its model still is the frozen one when it is switched off, or always.
        trains_head_on_text: Whether a language model's head is trained, if nothing is said of it.
        may_leave_out: Whether a step may leave a trained parameter out, such as a pooler that the head does
            not read.
        generates: Whether a language model can generate with it.
    """

    title: str
    put_in: Callable[[Backbone, RunConfig, str | None, Path | None], Made] = put_in_baseline
    rank: int | None = None
    attention: Literal["frozen", "pooling", "tuned", "refocused"] = "tuned"
    stores: tuple[Literal["vision", "language"], ...] = ()
    steers: bool = False
    pretunes: bool = False
    starts: bool = False
    keeps_backbone: bool = False
    trains_head_on_text: bool = False
    may_leave_out: bool = False
    generates: bool = True

    def why_not_stored(self, task: Literal["vision", "language"]) -> str | None:
        """Returns why nothing of a sample can be stored on a task; None if it can."""
        if task in self.stores:
            return None
        if self.stores:
            return "features of every token are not stored for a language model's head"
        return "it has no frozen first pass"


#: The methods by the names that configurations have for them.
METHODS = {
    "linear": Method(
        "linear probe", attention="frozen", stores=("vision",), keeps_backbone=True, trains_head_on_text=True
    ),
    # Its queries pool the final tokens.
    "attentive": Method("attentive probe", attention="pooling", stores=("vision",)),
    "full": Method("full tuning", trains_head_on_text=True, may_leave_out=True),
    "partial": Method("partial tuning", trains_head_on_text=True, may_leave_out=True),
    "bias": Method("bias tuning", may_leave_out=True),
    "lora": Method("LoRA", put_in_lora, rank=8, keeps_backbone=True),
    "vpt-shallow": Method("VPT-shallow", generates=False),
    "vpt-deep": Method("VPT-deep", generates=False),
    # Its bottlenecks stand beside the MLPs.
    "adapter": Method("AdaptFormer", rank=64),
    "toast": Method(
        "TOAST", put_in_toast, attention="refocused", stores=("vision", "language"), steers=True,
        pretunes=True, starts=True, keeps_backbone=True,
    ),
    "toast-lite": Method(
        "TOAST-Lite", put_in_toast, rank=4, attention="refocused", stores=("vision", "language"), steers=True,
        starts=True, keeps_backbone=True,
    ),
}  # fmt: skip


def names_of(has: Callable[[Method], object]) -> str:
    """Returns the names of the methods that have something, for a message."""
    *most, last = (name for name, method in METHODS.items() if has(method))
    return f"{', '.join(most)} and {last}" if most else last


@dataclass
class Tuned:
    """A backbone with what is trained.

    Args:
        model: The model to call.
        groups: Trained parameters by group.
        head_name: Name of the head in the backbone; None if it has none.
    """

    model: nn.Module
    groups: Groups
    head_name: str | None


def apply_method(backbone: Backbone, config: RunConfig, stage: str, folder: Path | None = None) -> Tuned:
    """Makes a backbone one that the configured method trains.

    Args:
        backbone: The backbone; it is changed in place.
        config: The run's configuration.
        stage: `pretune` or `tune`; the former trains the whole top-down module.
        folder: Where an official checkpoint that is started from is imported to.

    Raises:
        ValueError: If the method does not fit the model or the stage.
    """
    method = config.method
    if stage == "pretune" and not method.row.pretunes:
        able = names_of(lambda row: row.pretunes)
        raise ValueError(f"method: pre-tuning trains the whole top-down module, {able}; got {method.name!r}.")
    backbone.model.requires_grad_(False)
    head_name, head = head_of(backbone.model)
    if method.head_bias is not None:
        _set_bias(head, method.head_bias)
    trains_head = method.head
    if trains_head is None:
        trains_head = config.task == "vision" or method.row.trains_head_on_text
    model, named = method.row.put_in(backbone, config, head_name if trains_head else None, folder)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    by_name = {name: group for group, names in named.items() for name in names}
    groups = trained_groups(model, by_name)
    if not groups:
        raise ValueError(f"method: {method.name} leaves nothing to train in {type(model).__name__}.")
    return Tuned(model, groups, head_name)


def _set_bias(head: nn.Module, value: float) -> None:
    bias: nn.Parameter | None = getattr(head, "bias", None)
    if bias is None:
        raise ValueError(f"method.head_bias: {type(head).__name__} has no bias.")
    nn.init.constant_(bias, value)


def save_method(model: nn.Module, config: RunConfig, folder: Path) -> None:
    """Writes what was trained: in PEFT's format where PEFT has the method. Whole or not at all."""
    if isinstance(model, PeftModel):
        toast.save_adapter(model, folder)
    else:
        from toast.baselines.weights import save_trained

        meta = {"method": config.method.name, "settings": config.method.model_dump(mode="json")}
        save_trained(model, folder, meta)


def load_method(backbone: Backbone, config: RunConfig, folder: Path) -> nn.Module:
    """Returns a backbone with what a run has trained, in evaluation mode.

    Raises:
        ValueError: If the folder holds nothing that fits.
    """
    if (folder / CONFIG_NAME).is_file():
        return PeftModel.from_pretrained(backbone.model, str(folder)).eval()  # type: ignore[no-any-return]
    from toast.baselines.weights import load_trained

    load_trained(backbone.model, folder)  # puts in prompts and adapters, too
    return backbone.model.requires_grad_(False).eval()
