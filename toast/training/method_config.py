"""Settings of a run's method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, model_validator

from toast.presets import OFFICIAL
from toast.training.method_table import METHODS, Method, names_of
from toast.training.setting_types import SECTION, Integer, Number


def _known_method(name: str) -> str:
    if name not in METHODS:
        raise ValueError(f"needs one of {', '.join(METHODS)}; got {name!r}")
    return name


def refuse_missing(start: Path) -> None:
    """Refuses to start from what is not there.

    Raises:
        ValueError: If it is not.
    """
    if not start.exists():
        raise ValueError(
            f"method.start: {start} does not exist; needs an adapter's folder or an official file."
        )


class MethodConfig(BaseModel):
    """What is trained, and from where it starts.

    Args:
        name: The method, a row of `toast.training.method_table.METHODS`.
        start: `toast`, `toast-lite`: folder of a pre-tuned adapter, or an official checkpoint. `lora`: folder
            of a LoRA tuned on another task, whose factors are taken over and whose head is not. None starts
            from nothing.
        preset: An official variant whose settings are taken over: `vision`, `language`, `convnext`, or one
            with `-lite`.
        train: `toast`, `toast-lite`: trained groups by name, or `all`; None is the method's own.
        rank: Of `lora` and `toast-lite`, or the bottleneck of `adapter`; None is 8, 4 and 64.
        prompts: Of `vpt-shallow` and `vpt-deep`.
        freeze: Of `partial`: how many of the first blocks stay frozen.
        head: Whether the head is trained; None is yes for vision, no for language.
        head_bias: What each class's bias starts from; None leaves the library's (official: −log 99).
        calibrate: `toast` and `toast-lite` from nothing: point the task embedding by training samples.
        options: Further fields of the method's configuration (`ToastConfig`, PEFT's `LoraConfig`), or
            arguments of the baseline, such as `queries` of `attentive`.
    """

    model_config = SECTION

    name: Annotated[str, AfterValidator(_known_method)] = "toast"
    start: Path | None = None
    preset: str | None = None
    train: list[str] | Literal["all"] | None = None
    rank: Annotated[Integer, Field(gt=0)] | None = None
    prompts: Annotated[Integer, Field(gt=0)] = 10
    freeze: Annotated[Integer, Field(ge=0)] = 0
    head: bool | None = None
    head_bias: Number | None = None
    calibrate: bool = True
    options: dict[str, Any] = {}

    @property
    def row(self) -> Method:
        """What is known of the method."""
        return METHODS[self.name]

    @property
    def is_toast(self) -> bool:
        """Whether the top-down module is what is trained."""
        return self.row.steers

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _fits(self) -> MethodConfig:
        if self.preset is not None and self.preset not in OFFICIAL:
            raise ValueError(f"preset: needs one of {', '.join(OFFICIAL)}; got {self.preset!r}")
        if self.start and not self.row.starts:
            able = names_of(lambda row: row.starts)
            raise ValueError(f"start: belongs to {able}; the method is {self.name}")
        if (self.preset or self.train) and not self.is_toast:
            able = names_of(lambda row: row.steers)
            raise ValueError(f"preset, train: belong to {able}; the method is {self.name}")
        return self
