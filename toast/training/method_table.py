"""The methods that a run can train by, a row each: all that the program and the reports ask of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Method:
    """What is known of a method: all that the training program and the reports ask of it.

    Args:
        title: What it is called.
        puts_in: What puts it into a backbone: `toast.wrap`, PEFT's LoRA, or `toast.baselines`.
        rank: Its rank, or the width of its bottleneck, where none is given; None has none.
        attention: What becomes of the frozen model's attention.
        stores: Tasks on which the frozen backbone runs before all that is trained, so that what it computes
            of a sample can be stored.
        steers: Whether the top-down module is what is trained.
        pretunes: Whether stage one trains it.
        starts: Whether it can start from a saved adapter (`method.start`).
        keeps_backbone: Whether its model still is the frozen one when it is switched off, or always.
        trains_head_on_text: Whether a language model's head is trained, unless set otherwise.
        may_leave_out: Whether a step may leave a trained parameter out, such as a pooler that the head does
            not read.
        generates: Whether a language model can generate with it.
        classifies_text: Whether it works on a text classifier.
    """

    title: str
    puts_in: Literal["baselines", "lora", "toast"] = "baselines"
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
    classifies_text: bool = True

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
    "attentive": Method("attentive probe", attention="pooling", stores=("vision",), classifies_text=False),
    "full": Method("full tuning", trains_head_on_text=True, may_leave_out=True),
    "partial": Method("partial tuning", trains_head_on_text=True, may_leave_out=True),
    "bias": Method("bias tuning", may_leave_out=True),
    "lora": Method("LoRA", puts_in="lora", rank=8, starts=True, keeps_backbone=True),
    "vpt-shallow": Method("VPT-shallow", generates=False, classifies_text=False),
    "vpt-deep": Method("VPT-deep", generates=False, classifies_text=False),
    # Its bottlenecks stand beside the MLPs.
    "adapter": Method("AdaptFormer", rank=64),
    "toast": Method(
        "TOAST", puts_in="toast", attention="refocused", stores=("vision", "language"),
        steers=True, pretunes=True, starts=True, keeps_backbone=True,
    ),
    "toast-lite": Method(
        "TOAST-Lite", puts_in="toast", rank=4, attention="refocused", stores=("vision", "language"),
        steers=True, starts=True, keeps_backbone=True,
    ),
}  # fmt: skip


def names_of(has: Callable[[Method], object]) -> str:
    """Returns the names of the methods that have something, for a message."""
    *most, last = (name for name, method in METHODS.items() if has(method))
    return f"{', '.join(most)} and {last}" if most else last
